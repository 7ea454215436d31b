// Cross entropy on CUDA: from tensors to the problem that the kernels read. Everything is queued on the
// current stream and nothing waits for the device, so that a captured graph can hold it.
#include "cuda/cross_entropy/problem.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "shape.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Arguments = CrossEntropyArguments;

void check(int code) { C10_CUDA_CHECK(static_cast<cudaError_t>(code)); }

cuda::Device current_device() {
  const auto attribute = [device = c10::cuda::current_device()](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrComputeCapabilityMajor) >= 9};
}

cuda::Stream stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

cuda::Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return cuda::Dtype::kFloat64;
    case at::kBFloat16:
      return cuda::Dtype::kBFloat16;
    case at::kHalf:
      return cuda::Dtype::kFloat16;
    default:
      return cuda::Dtype::kFloat32;
  }
}

Tensor index_target(const Tensor& target) { return target.to(at::kLong).contiguous(); }

// A call's problem together with the tensors that own what its pointers point to.
template <class Acc>
struct Call {
  Shape shape;
  Tensor input, target, weight, upstream, scratch;
  cuda::Problem<Acc> problem{};
  double denominator = 1;  // of the mean, where the host knows it

  explicit Call(const Arguments& a) : shape(a.input), input(with_one_inner_stride(a.input, shape)) {
    problem.input = input.const_data_ptr();
    problem.input_strides = *strides_of(input, shape);
    problem.positions = shape.positions();
    problem.inner = shape.inner;
    problem.classes = shape.classes;
    problem.ignore_index = a.ignore_index;
    problem.target_coeff = Acc(1 - a.label_smoothing);
    problem.prob_coeff = Acc(a.label_smoothing / double(shape.classes));
    problem.z_loss = Acc(a.z_loss);
    if (a.weight && a.weight->defined()) {
      weight = a.weight->to(accumulate_type(input)).contiguous();
      problem.weight = weight.const_data_ptr<Acc>();
    }
    set_target(a);
    if (a.reduction == kMean) set_mean();
    problem.scale = Acc(1 / denominator);
  }

  void set_target(const Arguments& a) {
    if (is_soft(a.input, a.target)) {
      target = with_one_inner_stride(a.target, shape);
      problem.soft_target = target.const_data_ptr();
      problem.soft_strides = *strides_of(target, shape);
    } else {
      target = index_target(a.target);
      problem.target = target.const_data_ptr<int64_t>();
    }
  }

  // Totals first, then the partial sums.
  double* doubles() {
    constexpr int64_t kTotals = sizeof(cuda::Totals) / sizeof(double);
    if (!scratch.defined())
      scratch = at::empty({kTotals + cuda::kScratchDoubles}, input.options().dtype(at::kDouble));
    return scratch.mutable_data_ptr<double>() + kTotals;
  }

  void set_mean() {
    if (!problem.target) {
      denominator = double(problem.positions);
      return;
    }
    double* const partial = doubles();
    auto* const totals = reinterpret_cast<cuda::Totals*>(scratch.mutable_data_ptr<double>());
    check(cuda::launch_totals(problem, totals, partial, stream()));
    problem.totals = totals;
  }

  void set_gradient(Tensor& grad) {
    problem.grad = grad.mutable_data_ptr();
    problem.grad_strides = *strides_of(grad, shape);
  }

  void run() {
    if constexpr (std::is_same_v<Acc, double>) {
      check(cuda::launch_rows<double>(problem, current_device(), stream()));
    } else if (input.scalar_type() == at::kFloat) {
      check(cuda::launch_rows<float>(problem, current_device(), stream()));
    } else if (input.scalar_type() == at::kBFloat16) {
      check(cuda::launch_rows<BFloat16>(problem, current_device(), stream()));
    } else {
      check(cuda::launch_rows<Float16>(problem, current_device(), stream()));
    }
  }

  Tensor reduced(const Tensor& losses, at::ScalarType dtype) {
    Tensor loss = at::empty({}, input.options().dtype(dtype));
    const cuda::LossSum sum{problem.positions, denominator, problem.totals, loss.mutable_data_ptr(),
                            dtype_of(dtype)};
    check(cuda::launch_loss(losses.const_data_ptr<Acc>(), sum, doubles(), stream()));
    return loss;
  }
};

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
// after the one read of the forward pass. Rows in registers or shared memory have their statistics merged
// again, which costs no traffic; kernels that would read hard-target rows twice for that take row_max and
// row_sum instead.
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
