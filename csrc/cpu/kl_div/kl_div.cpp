// KL divergence from logits on the CPU: from tensors to rows and classes.
#include "kl_div.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/cross_entropy/threads.h"
#include "cpu/memory.h"
#include "cpu/simd/isa.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalDtype = std::optional<at::ScalarType>;

// (N, C) with adjacent classes: a view where one stride leads from row to row, else a copy.
Tensor rows_of(const Tensor& t) {
  const int64_t classes = t.size(-1);
  const Tensor rows = t.dim() == 2 ? t : t.reshape({t.numel() / classes, classes});
  return rows.stride(1) == 1 || classes == 1 ? rows : rows.contiguous();
}

template <class Acc>
const KlDivDtype<Acc>& kernels_of(at::ScalarType dtype) {
  const KlDivKernels& all = instruction_set().kl_div;
  if constexpr (std::is_same_v<Acc, double>) {
    return all.float64;
  } else {
    return dtype == at::kFloat ? all.float32 : dtype == at::kBFloat16 ? all.bfloat16 : all.float16;
  }
}

template <class Acc>
double run_over_blocks(const KlDivProblem<Acc>& problem, const KlDivDtype<Acc>& kernels) {
  const int64_t blocks = pair_block_count(problem.classes);
  std::vector<PairSums<Acc>> sums(problem.rows * blocks), merged(problem.rows);
  over_range(problem.rows * blocks, true,
             [&](int64_t i) { sums[i] = kernels.block_sums(problem, i / blocks, i % blocks); });
  double total = 0;
  for (int64_t r = 0; r < problem.rows; ++r)
    total += kernels.merge_blocks(problem, r, &sums[r * blocks], &merged[r]);
  if (problem.grad)
    over_range(problem.rows * blocks, true, [&](int64_t i) {
      kernels.block_gradient(problem, i / blocks, i % blocks, merged[i / blocks]);
    });
  return total;
}

// A call's problem together with the tensors that own what its pointers point to.
template <class Acc>
struct Call {
  const Tensor student, teacher;
  const double denominator;
  KlDivProblem<Acc> problem{};

  Call(const Tensor& x, const Tensor& z, double temperature, int64_t reduction)
      : student(rows_of(x)), teacher(rows_of(z)), denominator(kl_div_denominator(x, reduction)) {
    set_logits<Acc>(problem, student, teacher, temperature, denominator);
  }

  void set_gradient(Tensor& grad) {
    problem.grad = grad.mutable_data_ptr();
    problem.streaming_stores = int64_t(grad.nbytes()) >= kStreamingBytes;
  }

  double run() const {
    const KlDivDtype<Acc>& kernels = kernels_of<Acc>(student.scalar_type());
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    // Rows longer than a chunk, too few to keep every thread busy to the end.
    if (threads > 1 && problem.classes >= kParallelElements && problem.rows < 4 * threads)
      return run_over_blocks(problem, kernels);
    const bool few_classes = problem.classes <= kTileClasses;
    const auto kernel = few_classes ? kernels.tiles : kernels.rows;
    return sum_over_chunks(Shape(student), few_classes ? kLeastLanes : 1,
                           [&](int64_t begin, int64_t end) { return kernel(problem, begin, end); });
  }
};

// Runs the call and returns the loss, a row or reduced.
template <class Acc>
Tensor loss_of(Call<Acc>& call, const Tensor& student, int64_t reduction, OptionalDtype out_dtype) {
  const at::ScalarType dtype = out_dtype.value_or(student.scalar_type());
  if (reduction != kNone)
    return at::scalar_tensor(call.run() / call.denominator, at::TensorOptions().dtype(dtype));
  const auto sizes = student.sizes().slice(0, student.dim() - 1);
  Tensor losses = at::empty(sizes, student.options().dtype(accumulate_type(student)));
  call.problem.loss = losses.mutable_data_ptr<Acc>();
  call.run();
  return losses.to(dtype);
}

Tensor forward(const Tensor& student, const Tensor& teacher, double temperature, int64_t reduction,
               OptionalDtype out_dtype) {
  return with_call<Call>(student, teacher, temperature, reduction,
                         [&](auto& call) { return loss_of(call, student, reduction, out_dtype); });
}

std::tuple<Tensor, Tensor> forward_gradient(const Tensor& student, const Tensor& teacher, double temperature,
                                            int64_t reduction, OptionalDtype out_dtype) {
  return with_call<Call>(student, teacher, temperature, reduction, [&](auto& call) {
    Tensor grad = empty_recycled(student.sizes(), student.scalar_type());
    call.set_gradient(grad);
    Tensor loss = loss_of(call, student, reduction, out_dtype);
    return std::make_tuple(loss, grad);
  });
}

Tensor backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher, double temperature,
                int64_t reduction) {
  return with_call<Call>(student, teacher, temperature, reduction, [&](auto& call) {
    using Acc = std::remove_pointer_t<decltype(call.problem.loss)>;
    Tensor grad = empty_recycled(student.sizes(), student.scalar_type());
    call.set_gradient(grad);
    const Tensor upstream = grad_loss.to(accumulate_type(student)).contiguous();
    if (reduction == kNone) {
      call.problem.row_scale = upstream.template const_data_ptr<Acc>();
    } else {
      call.problem.scale *= *upstream.template const_data_ptr<Acc>();
    }
    call.run();
    return grad;
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("kl_div_forward", forward);
  m.impl("kl_div_forward_gradient", forward_gradient);
  m.impl("kl_div_backward", backward);
}

}  // namespace mbperf
