// Cross entropy on CUDA: from tensors to positions and classes.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cuda/cross_entropy/call.h"

namespace mbperf {
namespace {

using at::Tensor;
using cuda::Call, cuda::check, cuda::current_device, cuda::dtype_of, cuda::index_target, cuda::stream;
using OptionalTensor = std::optional<Tensor>;
using Arguments = CrossEntropyArguments;

// Calls body(Call<Acc>&) with the accumulation type of the logits, on their device.
template <class Body>
auto with_call(const Arguments& a, const Body& body) {
  const c10::cuda::CUDAGuard guard(a.input.device());
  if (a.input.scalar_type() == at::kDouble) {
    Call<double> call(a);
    return body(call);
  }
  Call<float> call(a);
  return body(call);
}

// Runs the call and returns the loss, per position in the shape of a hard target or reduced.
template <class Acc>
Tensor loss_of(Call<Acc>& call, const Arguments& a, std::optional<at::ScalarType> out_dtype) {
  std::vector<int64_t> sizes = a.input.sizes().vec();
  sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
  const Tensor losses = at::empty(sizes, a.input.options().dtype(accumulate_type(a.input)));
  call.problem.loss = losses.template mutable_data_ptr<Acc>();
  call.run();
  const at::ScalarType dtype = out_dtype.value_or(a.input.scalar_type());
  return a.reduction == kNone ? losses.to(dtype) : call.reduced(losses, dtype);
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
    Tensor grad = at::empty(input.sizes(), input.options());
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
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    Tensor max = at::empty({call.shape.positions()}, input.options().dtype(accumulate_type(input)));
    Tensor sum = at::empty_like(max);
    call.problem.row_max = max.template mutable_data_ptr<Acc>();
    call.problem.row_sum = sum.template mutable_data_ptr<Acc>();
    Tensor loss = loss_of(call, a, out_dtype);
    return std::make_tuple(loss, max, sum);
  });
}

// For reduction none, and for a loss with its lse: one read of the logits and one write of the gradient,
// after the one read of the forward pass. Any targets have the statistics of their rows merged again, for the
// sums of t; the others take row_max and row_sum as they are.
Tensor backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& row_max,
                const Tensor& row_sum, int64_t reduction, int64_t ignore_index, double label_smoothing,
                double z_loss, const OptionalTensor& weight) {
  const Arguments a{input, target, weight, reduction, ignore_index, label_smoothing, z_loss};
  return with_call(a, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    Tensor grad = at::empty(input.sizes(), input.options());
    call.set_gradient(grad);
    call.upstream = grad_loss.to(accumulate_type(input)).contiguous();
    call.problem.upstream = call.upstream.template const_data_ptr<Acc>();
    call.problem.upstream_per_position = reduction == kNone;
    call.problem.known_softmax = true;
    // Inputs only here: the kernels do not write statistics that are already known.
    call.problem.row_max = const_cast<Acc*>(row_max.template const_data_ptr<Acc>());
    call.problem.row_sum = const_cast<Acc*>(row_sum.template const_data_ptr<Acc>());
    call.run();
    return grad;
  });
}

void run_scaling(at::ScalarType dtype, const cuda::Scaling& scaling) {
  switch (dtype) {
    case at::kDouble:
      return check(cuda::launch_scaling<double>(scaling, current_device(), stream()));
    case at::kBFloat16:
      return check(cuda::launch_scaling<BFloat16>(scaling, current_device(), stream()));
    case at::kHalf:
      return check(cuda::launch_scaling<Float16>(scaling, current_device(), stream()));
    default:
      return check(cuda::launch_scaling<float>(scaling, current_device(), stream()));
  }
}

void scale_gradient_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& target,
                     int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(grad_input.device());
  const Tensor upstream = is_fused_dtype(grad_loss.scalar_type()) ? grad_loss : grad_loss.to(at::kFloat);
  const Tensor index = is_soft(grad_input, target) ? Tensor() : index_target(target);
  cuda::Scaling scaling{};
  // The kernel walks elements that are adjacent; in any other layout they are scaled by torch, after it has
  // checked the targets.
  const bool adjacent = grad_input.is_non_overlapping_and_dense();
  scaling.grad = grad_input.mutable_data_ptr();
  scaling.n = adjacent ? grad_input.numel() : 0;
  scaling.upstream = upstream.const_data_ptr();
  scaling.upstream_dtype = dtype_of(upstream.scalar_type());
  if (index.defined()) {
    scaling.target = index.const_data_ptr<int64_t>();
    scaling.positions = index.numel();
    scaling.classes = grad_input.size(grad_input.dim() == 1 ? 0 : 1);
    scaling.ignore_index = ignore_index;
  }
  run_scaling(grad_input.scalar_type(), scaling);
  if (!adjacent) grad_input.mul_(grad_loss);
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) {
  m.impl("cross_entropy_forward", forward);
  m.impl("cross_entropy_forward_gradient", forward_gradient);
  m.impl("cross_entropy_forward_gradient_", forward_gradient_);
  m.impl("cross_entropy_forward_softmax", forward_softmax);
  m.impl("cross_entropy_backward", backward);
  m.impl("cross_entropy_scale_gradient_", scale_gradient_);
}

}  // namespace mbperf
