// Cross entropy on the CPU: from tensors to positions and classes.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "cpu/cross_entropy/call.h"
#include "cpu/cross_entropy/cross_entropy.h"
#include "cpu/memory.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Arguments = CrossEntropyArguments;

// The paths by the names that users meet.
constexpr std::pair<const char*, Path> kPaths[] = {
    {"rows", Path::kRows}, {"groups", Path::kGroups}, {"tiles", Path::kTiles}, {"columns", Path::kColumns}};

Tensor scalar(double value, at::ScalarType dtype) {
  Tensor result = at::empty({}, at::TensorOptions().dtype(dtype));
  // fill_ would cost more than 64 rows of 10 logits.
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "cross_entropy", [&] {
    *result.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(value);
  });
  return result;
}

// Those of a hard target.
std::vector<int64_t> position_sizes(const Tensor& input) {
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
  return sizes;
}

// Runs the call and returns the loss, per position in the shape of a hard target or reduced.
template <class Acc>
Tensor loss_of(Call<Acc>& call, const Arguments& a, std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType dtype = out_dtype.value_or(a.input.scalar_type());
  if (a.reduction != kNone) {
    const double total = call.run();
    return scalar(a.reduction == kMean ? total / call.denominator : total, dtype);
  }
  Tensor rows = at::empty(position_sizes(a.input), a.input.options().dtype(accumulate_type(a.input)));
  call.problem.loss = rows.mutable_data_ptr<Acc>();
  call.run();
  return rows.to(dtype);
}

Tensor forward(const Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
               double label_smoothing, std::optional<at::ScalarType> out_dtype, double z_loss,
               const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) { return loss_of(call, a, out_dtype); });
}

std::tuple<Tensor, Tensor> forward_gradient(const Tensor& input, const Tensor& target, int64_t reduction,
                                            int64_t ignore_index, double label_smoothing,
                                            std::optional<at::ScalarType> out_dtype, double z_loss,
                                            const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    call.set_gradient(grad);
    Tensor loss = loss_of(call, a, out_dtype);
    return std::make_tuple(loss, grad);
  });
}

Tensor forward_gradient_(Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
                         double label_smoothing, std::optional<at::ScalarType> out_dtype, double z_loss,
                         const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    const bool overwrites = call.input.is_same(input);
    Tensor grad = overwrites ? input : at::empty_like(call.input);
    call.set_gradient(grad);
    // Logits read while their place is written: past the caches would be a detour.
    call.problem.streaming_stores = false;
    Tensor loss = loss_of(call, a, out_dtype);
    if (!overwrites) input.copy_(grad);
    return loss;
  });
}

std::tuple<Tensor, Tensor, Tensor> forward_softmax(const Tensor& input, const Tensor& target,
                                                   int64_t reduction, int64_t ignore_index,
                                                   double label_smoothing,
                                                   std::optional<at::ScalarType> out_dtype, double z_loss,
                                                   const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    const auto options = input.options().dtype(accumulate_type(input));
    Tensor max = at::empty({call.shape.positions()}, options), sum = at::empty_like(max);
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    call.problem.row_max = max.template mutable_data_ptr<Acc>();
    call.problem.row_sum = sum.template mutable_data_ptr<Acc>();
    Tensor loss = loss_of(call, a, out_dtype);
    return std::make_tuple(loss, max, sum);
  });
}

// Makes room for the gradient, if it is wanted, runs the call and returns what it computes of every position.
template <class Acc>
std::tuple<Tensor, Tensor, Tensor, Tensor> everything_of(Call<Acc>& call, const Arguments& a,
                                                         std::optional<at::ScalarType> out_dtype,
                                                         bool wants_gradient) {
  const auto options = a.input.options().dtype(accumulate_type(a.input));
  Tensor max = at::empty({call.shape.positions()}, options), sum = at::empty_like(max);
  call.problem.row_max = max.template mutable_data_ptr<Acc>();
  call.problem.row_sum = sum.template mutable_data_ptr<Acc>();
  Tensor grad = wants_gradient ? empty_recycled(a.input.sizes(), a.input.scalar_type())
                               : at::empty({0}, a.input.options());
  if (wants_gradient) call.set_gradient(grad);
  Tensor loss = loss_of(call, a, out_dtype);
  return {loss, grad, max, sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_softcap(const Tensor& input, const Tensor& target,
                                                           int64_t reduction, int64_t ignore_index,
                                                           double label_smoothing,
                                                           std::optional<at::ScalarType> out_dtype,
                                                           double z_loss, double softcap, bool wants_gradient,
                                                           const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    call.softcap = softcap;
    return everything_of(call, a, out_dtype, wants_gradient);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats(
    const Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
    double label_smoothing, std::optional<at::ScalarType> out_dtype, double z_loss, double softcap,
    bool wants_gradient, const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    const auto options = input.options().dtype(accumulate_type(input));
    const std::vector<int64_t> sizes = position_sizes(input);
    Tensor entropy = at::empty(sizes, options), probability = at::empty_like(entropy);
    Tensor predicted = at::empty(sizes, options.dtype(at::kLong));
    call.problem.entropy = entropy.template mutable_data_ptr<Acc>();
    call.problem.probability = probability.template mutable_data_ptr<Acc>();
    call.problem.predicted = predicted.mutable_data_ptr<int64_t>();
    call.softcap = softcap;
    return std::tuple_cat(everything_of(call, a, out_dtype, wants_gradient),
                          std::make_tuple(entropy, predicted, probability));
  });
}

Tensor backward_softcap(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                        const Tensor& row_max, const Tensor& row_sum, int64_t reduction, int64_t ignore_index,
                        double label_smoothing, double z_loss, double softcap, const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    call.set_gradient(grad);
    call.softcap = softcap;
    const Tensor upstream = grad_loss.to(accumulate_type(input)).contiguous();
    if (reduction == kNone) {
      call.problem.row_scale = upstream.template const_data_ptr<Acc>();
    } else {
      call.problem.scale *= *upstream.template const_data_ptr<Acc>();
    }
    call.problem.known_softmax = true;
    // Inputs only here: the kernels do not write statistics that are already known.
    call.problem.row_max = const_cast<Acc*>(row_max.template const_data_ptr<Acc>());
    call.problem.row_sum = const_cast<Acc*>(row_sum.template const_data_ptr<Acc>());
    call.run();
    return grad;
  });
}

Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& row_max,
                const Tensor& row_sum, int64_t reduction, int64_t ignore_index, double label_smoothing,
                double z_loss, const OptionalTensor& weight) {
  return backward_softcap(grad_loss, input, target, row_max, row_sum, reduction, ignore_index,
                          label_smoothing, z_loss, /*softcap=*/0, weight);
}

bool is_one(const Tensor& grad_loss) {
  // item would cost half a microsecond.
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_loss.scalar_type(), "cross_entropy",
      [&] { return *grad_loss.const_data_ptr<scalar_t>() == scalar_t(1); });
}

void scale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& target,
                     int64_t ignore_index) {
  if (!is_soft(grad_input, target))
    count_targets(index_target(target), grad_input.size(grad_input.dim() == 1 ? 0 : 1), ignore_index);
  if (!is_one(grad_loss)) grad_input.mul_(grad_loss);
}

void rescale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                       int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss,
                       const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  if (is_one(grad_loss)) return scale_gradient_(grad_input, grad_loss, target, ignore_index);
  with_call(a, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    call.set_gradient(grad_input);
    call.problem.scale *= Acc(grad_loss.item<double>());
    return call.run();
  });
}

}  // namespace

std::vector<std::string> cross_entropy_paths(const Tensor& input, const Tensor& target) {
  const Arguments a{input,       target, std::nullopt, kMean, /*ignore_index=*/-100, /*label_smoothing=*/0,
                    /*z_loss=*/0};
  return with_call(a, [&](auto& call) {
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    call.set_gradient(grad);
    const Path chosen = call.path();
    std::vector<std::string> names;
    for (const auto& [name, path] : kPaths)
      if (path == chosen)
        names.insert(names.begin(), name);
      else if (serves(path, call.problem, call.kernels().vector))
        names.emplace_back(name);
    return names;
  });
}

void set_cross_entropy_path(const std::optional<std::string>& wanted) {
  if (!wanted) return forced_path.store(nullptr);
  for (const auto& [name, path] : kPaths)
    if (*wanted == name) return forced_path.store(&path);
  TORCH_CHECK_VALUE(false, "set_cross_entropy_path: expected rows, groups, tiles, columns or None, got ",
                    *wanted);
}

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("cross_entropy_forward", forward);
  m.impl("cross_entropy_forward_gradient", forward_gradient);
  m.impl("cross_entropy_forward_gradient_", forward_gradient_);
  m.impl("cross_entropy_forward_softmax", forward_softmax);
  m.impl("cross_entropy_forward_stats", forward_stats);
  m.impl("cross_entropy_forward_softcap", forward_softcap);
  m.impl("cross_entropy_backward", backward);
  m.impl("cross_entropy_backward_softcap", backward_softcap);
  m.impl("cross_entropy_scale_gradient_", scale_gradient_);
  m.impl("cross_entropy_rescale_gradient_", rescale_gradient_);
}

}  // namespace mbperf
