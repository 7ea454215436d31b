// A call of cross entropy, or of what its kernels compute besides, on CUDA: from tensors to the problem that
// the kernels read. Everything is queued on the current stream and nothing waits for the device, so that a
// captured graph can hold it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "checks.h"
#include "cuda/cross_entropy/problem.h"
#include "cuda/current_stream.h"
#include "shape.h"

namespace mbperf::cuda {

inline Device current_device() {
  const auto attribute = [device = c10::cuda::current_device()](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrComputeCapabilityMajor) >= 9};
}

inline Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat32;
  }
}

inline at::Tensor index_target(const at::Tensor& target) { return target.to(at::kLong).contiguous(); }

// A call's problem together with the tensors that own what its pointers point to.
template <class Acc>
struct Call {
  Shape shape;
  at::Tensor input, target, weight, upstream, scratch;
  Problem<Acc> problem{};
  double denominator = 1;  // of the mean, where the host knows it

  explicit Call(const CrossEntropyArguments& a)
      : shape(a.input), input(with_one_inner_stride(a.input, shape)) {
    problem.input = input.const_data_ptr();
    problem.input_strides = *strides_of(input, shape);
    problem.positions = shape.positions();
    problem.inner = shape.inner;
    problem.classes = shape.classes;
    problem.ignore_index = a.ignore_index;
    const double smoothing = smoothing_of(a, shape.classes);
    problem.target_coeff = Acc(1 - smoothing);
    problem.prob_coeff = Acc(smoothing / double(shape.classes));
    problem.z_loss = Acc(a.z_loss);
    if (a.weight && a.weight->defined()) {
      weight = a.weight->to(accumulate_type(input)).contiguous();
      problem.weight = weight.const_data_ptr<Acc>();
    }
    set_target(a);
    if (a.reduction == kMean) set_mean();
    problem.scale = Acc(1 / denominator);
  }

  void set_target(const CrossEntropyArguments& a) {
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
    constexpr int64_t kTotals = sizeof(Totals) / sizeof(double);
    if (!scratch.defined())
      scratch = at::empty({kTotals + kScratchDoubles}, input.options().dtype(at::kDouble));
    return scratch.mutable_data_ptr<double>() + kTotals;
  }

  void set_mean() {
    if (!problem.target) {
      denominator = double(problem.positions);
      return;
    }
    double* const partial = doubles();
    auto* const totals = reinterpret_cast<Totals*>(scratch.mutable_data_ptr<double>());
    check(launch_totals(problem, totals, partial, stream()));
    problem.totals = totals;
  }

  void set_gradient(at::Tensor& grad) {
    problem.grad = grad.mutable_data_ptr();
    problem.grad_strides = *strides_of(grad, shape);
  }

  void run() {
    if constexpr (std::is_same_v<Acc, double>) {
      check(launch_rows<double>(problem, current_device(), stream()));
    } else if (input.scalar_type() == at::kFloat) {
      check(launch_rows<float>(problem, current_device(), stream()));
    } else if (input.scalar_type() == at::kBFloat16) {
      check(launch_rows<BFloat16>(problem, current_device(), stream()));
    } else {
      check(launch_rows<Float16>(problem, current_device(), stream()));
    }
  }

  at::Tensor reduced(const at::Tensor& losses, at::ScalarType dtype) {
    at::Tensor loss = at::empty({}, input.options().dtype(dtype));
    const LossSum sum{problem.positions, denominator, problem.totals, loss.mutable_data_ptr(),
                      dtype_of(dtype)};
    check(launch_loss(losses.const_data_ptr<Acc>(), sum, doubles(), stream()));
    return loss;
  }
};

}  // namespace mbperf::cuda
