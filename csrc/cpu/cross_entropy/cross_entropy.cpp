// Cross entropy on the CPU: from tensors to positions and classes.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/cross_entropy/cross_entropy.h"
#include "cpu/cross_entropy/threads.h"
#include "cpu/memory.h"
#include "cpu/simd/isa.h"
#include "shape.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Arguments = CrossEntropyArguments;

// The strides of a tensor that a single inner stride describes. One class has no stride: 0 rather than 1 says
// that vectors run along positions.
Strides tile_strides(const Tensor& t, const Shape& shape) {
  Strides strides = *strides_of(t, shape);
  if (shape.classes == 1) strides.classes = 0;
  return strides;
}

// Overrides choose() for this process, or nothing.
std::atomic<const Path*> forced_path{nullptr};

// The paths by the names that users meet.
constexpr std::pair<const char*, Path> kPaths[] = {
    {"rows", Path::kRows}, {"groups", Path::kGroups}, {"tiles", Path::kTiles}, {"columns", Path::kColumns}};

template <class Acc>
const DtypeKernels<Acc>& kernels_of(at::ScalarType dtype) {
  const RowKernels& all = instruction_set().rows;
  if constexpr (std::is_same_v<Acc, double>) {
    return all.float64;
  } else {
    return dtype == at::kFloat ? all.float32 : dtype == at::kBFloat16 ? all.bfloat16 : all.float16;
  }
}

// A weight a class, in the type that is accumulated in. For a few, `to` would cost as much as a small loss.
Tensor accumulated(const Tensor& weight, at::ScalarType dtype) {
  if (weight.scalar_type() == dtype || weight.numel() > 64 || !weight.is_contiguous())
    return weight.to(dtype).contiguous();
  Tensor result = at::detail::empty_cpu(weight.sizes(), dtype, /*pin_memory=*/false, std::nullopt);
  AT_DISPATCH_REDUCED_FLOATING_TYPES(weight.scalar_type(), "cross_entropy", [&] {
    const scalar_t* from = weight.const_data_ptr<scalar_t>();
    std::copy(from, from + weight.numel(), result.mutable_data_ptr<float>());
  });
  return result;
}

Tensor index_target(const Tensor& target) { return target.to(at::kLong).contiguous(); }

// How many of a range of targets are not ignored, and where the first out of bounds is, or -1.
struct Scan {
  int64_t live = 0, bad = -1;

  friend Scan operator+(Scan a, Scan b) { return {a.live + b.live, a.bad >= 0 ? a.bad : b.bad}; }
};

// Raises for a target out of bounds; returns how many are not ignored.
int64_t count_targets(const Tensor& index, int64_t classes, int64_t ignore_index) {
  const int64_t* target = index.const_data_ptr<int64_t>();
  const Scan all = over_targets<Scan>(index.numel(), [&](int64_t begin, int64_t end) {
    Scan scan;
    const int64_t bad =
        instruction_set().rows.scan_targets(target + begin, end - begin, classes, ignore_index, &scan.live);
    if (bad >= 0) scan.bad = begin + bad;
    return scan;
  });
  TORCH_CHECK_INDEX(all.bad < 0, "Target ", target[all.bad], " is out of bounds.");
  return all.live;
}

template <class Acc>
double weight_of_targets(const Problem<Acc>& problem) {
  return over_targets<double>(problem.positions, [&](int64_t begin, int64_t end) {
    return sum_of(begin, end, [&](int64_t p) {
      const int64_t y = problem.target[p];
      return y == problem.ignore_index ? 0.0 : double(problem.weight[y]);
    });
  });
}

// A call's problem together with the tensors that own what its pointers point to.
template <class Acc>
struct Call {
  Shape shape;
  Tensor input, target, weight;
  Problem<Acc> problem{};
  int64_t live = 0;        // positions that count
  double denominator = 1;  // of the mean

  explicit Call(const Arguments& a) : shape(a.input), input(with_one_inner_stride(a.input, shape)) {
    // To share a target out among one class changes nothing: exactly, without 1 - s + s.
    const double smoothing = shape.classes == 1 && !is_soft(a.input, a.target) ? 0 : a.label_smoothing;
    problem.input = input.const_data_ptr();
    problem.input_strides = tile_strides(input, shape);
    problem.positions = shape.positions();
    problem.inner = shape.inner;
    problem.classes = shape.classes;
    problem.ignore_index = a.ignore_index;
    problem.target_coeff = Acc(1 - smoothing);
    problem.prob_coeff = Acc(smoothing / double(shape.classes));
    problem.weight_sum = Acc(shape.classes);
    problem.z_loss = Acc(a.z_loss);
    problem.scale = 1;
    if (a.weight && a.weight->defined()) {
      weight = accumulated(*a.weight, accumulate_type(input));
      problem.weight = weight.const_data_ptr<Acc>();
      if (smoothing != 0)
        problem.weight_sum =
            Acc(sum_of(0, shape.classes, [&](int64_t c) { return double(problem.weight[c]); }));
    }
    set_target(a);
    if (a.reduction == kMean) set_mean();
  }

  void set_target(const Arguments& a) {
    if (is_soft(a.input, a.target)) {
      target = with_one_inner_stride(a.target, shape);
      problem.soft_target = target.const_data_ptr();
      problem.soft_strides = tile_strides(target, shape);
      live = problem.positions;
    } else {
      target = index_target(a.target);
      live = count_targets(target, shape.classes, a.ignore_index);
      problem.target = target.const_data_ptr<int64_t>();
    }
  }

  void set_mean() {
    denominator = double(live);
    if (problem.weight && problem.target) {
      denominator = weight_of_targets(problem);
      // The z loss is averaged over positions, the loss over weights: this denominator must do for both.
      problem.z_loss *= Acc(denominator / double(live));
    }
    problem.scale = Acc(1 / denominator);
  }

  void set_gradient(Tensor& grad) {
    problem.grad = grad.mutable_data_ptr();
    problem.grad_strides = tile_strides(grad, shape);
    problem.streaming_stores =
        int64_t(grad.nbytes()) >= streaming_bytes(problem.grad_strides, grad.element_size());
  }

  const DtypeKernels<Acc>& kernels() const { return kernels_of<Acc>(input.scalar_type()); }

  Path path() const {
    const VectorShape vector = kernels().vector;
    if (const Path* forced = forced_path.load(std::memory_order_relaxed))
      if (serves(*forced, problem, vector)) return *forced;
    return choose(problem, vector, at::in_parallel_region() ? 1 : at::get_num_threads());
  }

  double run() {
    const Path chosen = path();
    return chosen == Path::kColumns ? run_over_columns(problem, kernels())
                                    : run_over_rows(problem, kernels(), shape, chosen);
  }
};

// Calls body(Call<Acc>&) with the accumulation type of the logits.
template <class Body>
auto with_call(const Arguments& a, const Body& body) {
  if (a.input.scalar_type() == at::kDouble) {
    Call<double> call(a);
    return body(call);
  }
  Call<float> call(a);
  return body(call);
}

Tensor scalar(double value, at::ScalarType dtype) {
  Tensor result = at::empty({}, at::TensorOptions().dtype(dtype));
  // fill_ would cost more than 64 rows of 10 logits.
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "cross_entropy", [&] {
    *result.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(value);
  });
  return result;
}

// Runs the call and returns the loss, per position in the shape of a hard target or reduced.
template <class Acc>
Tensor loss_of(Call<Acc>& call, const Arguments& a, std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType dtype = out_dtype.value_or(a.input.scalar_type());
  if (a.reduction != kNone) {
    const double total = call.run();
    return scalar(a.reduction == kMean ? total / call.denominator : total, dtype);
  }
  std::vector<int64_t> sizes = a.input.sizes().vec();
  sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
  Tensor rows = at::empty(sizes, a.input.options().dtype(accumulate_type(a.input)));
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

Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& row_max,
                const Tensor& row_sum, int64_t reduction, int64_t ignore_index, double label_smoothing,
                double z_loss, const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    Tensor grad = empty_recycled(input.sizes(), input.scalar_type());
    call.set_gradient(grad);
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
  m.impl("cross_entropy_backward", backward);
  m.impl("cross_entropy_scale_gradient_", scale_gradient_);
  m.impl("cross_entropy_rescale_gradient_", rescale_gradient_);
}

}  // namespace mbperf
