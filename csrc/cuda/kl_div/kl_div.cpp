// KL divergence from logits on CUDA: from tensors to the problem that the kernels read. Everything is queued
// on the current stream and nothing waits for the device, so that a captured graph can hold it.
#include "kl_div.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "cuda/current_stream.h"
#include "cuda/kl_div/problem.h"
#include "shape.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalDtype = std::optional<at::ScalarType>;

// (N, C) with adjacent classes whose rows start at the same places within 16 bytes as those of a fresh
// contiguous tensor: a view where that is so, else a copy.
Tensor rows_of(const Tensor& t) {
  const int64_t classes = t.size(-1);
  const Tensor rows = t.reshape({t.numel() / classes, classes});
  const int64_t in_16_bytes = 16 / t.element_size();
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0 &&
                       (rows.size(0) == 1 || (rows.stride(0) - classes) % in_16_bytes == 0);
  if (aligned && (rows.stride(1) == 1 || classes == 1)) return rows;
  return rows.clone(at::MemoryFormat::Contiguous);
}

template <class Acc>
struct Call {
  const c10::cuda::CUDAGuard guard;
  const Tensor student, teacher;
  const double denominator;
  cuda::KlDivProblem<Acc> problem{};

  Call(const Tensor& x, const Tensor& z, double temperature, int64_t reduction)
      : guard(x.device()),
        student(rows_of(x)),
        teacher(rows_of(z)),
        denominator(kl_div_denominator(x, reduction)) {
    set_logits<Acc>(problem, student, teacher, temperature, denominator);
  }

  void run() const {
    const cuda::Stream stream = cuda::stream();
    const auto launch = [&] {
      if constexpr (std::is_same_v<Acc, double>) {
        return cuda::launch_kl_div<double>(problem, stream);
      } else if (student.scalar_type() == at::kFloat) {
        return cuda::launch_kl_div<float>(problem, stream);
      } else if (student.scalar_type() == at::kBFloat16) {
        return cuda::launch_kl_div<BFloat16>(problem, stream);
      } else {
        return cuda::launch_kl_div<Float16>(problem, stream);
      }
    };
    cuda::check(launch());
  }
};

// Runs the call and returns the loss, a row or reduced.
template <class Acc>
Tensor loss_of(Call<Acc>& call, const Tensor& student, int64_t reduction, OptionalDtype out_dtype) {
  const auto sizes = student.sizes().slice(0, student.dim() - 1);
  const Tensor losses = at::empty(sizes, student.options().dtype(accumulate_type(student)));
  call.problem.loss = losses.mutable_data_ptr<Acc>();
  call.run();
  const at::ScalarType dtype = out_dtype.value_or(student.scalar_type());
  return reduction == kNone ? losses.to(dtype) : (losses.sum(at::kDouble) / call.denominator).to(dtype);
}

Tensor forward(const Tensor& student, const Tensor& teacher, double temperature, int64_t reduction,
               OptionalDtype out_dtype) {
  return with_call<Call>(student, teacher, temperature, reduction,
                         [&](auto& call) { return loss_of(call, student, reduction, out_dtype); });
}

std::tuple<Tensor, Tensor> forward_gradient(const Tensor& student, const Tensor& teacher, double temperature,
                                            int64_t reduction, OptionalDtype out_dtype) {
  return with_call<Call>(student, teacher, temperature, reduction, [&](auto& call) {
    Tensor grad = at::empty(student.sizes(), student.options());
    call.problem.grad = grad.mutable_data_ptr();
    Tensor loss = loss_of(call, student, reduction, out_dtype);
    return std::make_tuple(loss, grad);
  });
}

Tensor backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, double temperature,
                int64_t reduction) {
  return with_call<Call>(student, teacher, temperature, reduction, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    Tensor grad = at::empty(student.sizes(), student.options());
    call.problem.grad = grad.mutable_data_ptr();
    const Tensor upstream = grad_loss.to(accumulate_type(student)).contiguous();
    call.problem.upstream = upstream.template const_data_ptr<Acc>();
    call.problem.upstream_per_row = reduction == kNone;
    call.run();
    return grad;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) {
  m.impl("kl_div_forward", forward);
  m.impl("kl_div_forward_gradient", forward_gradient);
  m.impl("kl_div_backward", backward);
}

}  // namespace mbperf
