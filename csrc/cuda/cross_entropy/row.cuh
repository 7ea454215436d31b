// The terms of a row that all cross entropy kernels share, whoever reads its logits: t_c, the loss from m, s
// and the sums of t, the slope of the gradient (formulas in problem.h).
#pragma once

#include "cuda/reduce.cuh"

namespace mbperf::cuda {

// The target distribution t of a row: one class; that class and a constant; any, which is probabilities, or
// smoothing with a weight a class.
enum class Target { kHard, kSmooth, kAny };

// Whether t_c is other than 0 for classes other than the target's.
template <Target kTarget>
constexpr bool kSpread = kTarget != Target::kHard;

template <class Acc>
__device__ __forceinline__ int64_t offset_of(const Problem<Acc>& problem, const Strides& strides,
                                             int64_t position) {
  if (problem.inner == problem.positions)
    return position * strides.inner;  // two 64-bit divisions saved a row
  return position / problem.inner * strides.outer + position % problem.inner * strides.inner;
}

template <class Acc>
struct Row {
  int64_t y;  // class of a hard target, -1 without one
  Acc t_y;    // its t, beside the smoothing's
  bool ignored;
};

template <Target kTarget, class Acc>
__device__ __forceinline__ Row<Acc> row_at(const Problem<Acc>& problem, int64_t position) {
  if (kTarget == Target::kAny && !problem.target) return {-1, 0, false};
  const int64_t y = problem.target[position];
  if (y == problem.ignore_index) return {-1, 0, true};
  MBPERF_KERNEL_ASSERT(y >= 0 && y < problem.classes);
  return {y, problem.weight ? problem.target_coeff * problem.weight[y] : problem.target_coeff, false};
}

// Whether a row that is not ignored has a hard target.
template <Target kTarget, class Acc>
__device__ __forceinline__ bool has_class(const Row<Acc>& row) {
  return kTarget != Target::kAny || row.y >= 0;
}

// t_c without the t_y of a hard target; `probability` is 0 where targets are hard.
template <Target kTarget, class Acc>
__device__ __forceinline__ Acc t_of_class(const Problem<Acc>& problem, int64_t c, Acc probability) {
  if constexpr (kTarget == Target::kSmooth) return problem.prob_coeff;
  const Acc t = problem.prob_coeff + probability * problem.target_coeff;
  return problem.weight ? t * problem.weight[c] : t;
}

template <Target kTarget, class Acc>
__device__ __forceinline__ bool softmax_is_known(const Problem<Acc>& problem) {
  return kTarget == Target::kHard &&
         problem.known_softmax;  // else t has to be summed over the classes anyway
}

// The statistics of softmax_is_known.
template <class Acc>
__device__ __forceinline__ Softmax<Acc> known_softmax(const Problem<Acc>& problem, int64_t position) {
  return {problem.row_max[position], problem.row_sum[position], 0, 0};
}

template <class Acc>
__device__ __forceinline__ Acc z_loss_of(const Problem<Acc>& problem) {
  return problem.totals ? problem.z_loss * Acc(problem.totals->z_ratio) : problem.z_loss;
}

template <class Acc>
__device__ __forceinline__ void write_row(const Problem<Acc>& problem, int64_t position, Acc loss, Acc m,
                                          Acc s) {
  if (problem.known_softmax) return;
  if (problem.loss) problem.loss[position] = loss;
  if (problem.row_max) problem.row_max[position] = m;
  if (problem.row_sum) problem.row_sum[position] = s;
}

// By one thread a row; x_y is the logit of class row.y.
template <Target kTarget, class Acc>
__device__ __forceinline__ void finish_row(const Problem<Acc>& problem, int64_t position, const Row<Acc>& row,
                                           Softmax<Acc> softmax, Acc x_y) {
  if (row.ignored) return write_row(problem, position, Acc(0), Acc(0), Acc(1));
  if (has_class<kTarget>(row)) {
    softmax.tx_sum += row.t_y * (x_y - softmax.m);
    softmax.t_sum += row.t_y;
  }
  const Acc log_s = log_of(softmax.s);
  Acc loss = softmax.t_sum * log_s - softmax.tx_sum;
  if (problem.z_loss != 0) {
    const Acc lse = softmax.m + log_s;
    loss += z_loss_of(problem) * lse * lse;
  }
  write_row(problem, position, loss, softmax.m, softmax.s);
}

// grad_c = exp(x_c - centre) factor - t_c scale, with factor = (sum t_c + 2 z_loss lse) scale / s
template <class Acc>
struct Slope {
  Acc centre, factor, scale;
};

template <class Acc>
__device__ __forceinline__ Slope<Acc> slope_of(const Problem<Acc>& problem, int64_t position,
                                               const Row<Acc>& row, const Softmax<Acc>& softmax) {
  Acc scale = problem.totals ? Acc(problem.totals->scale) : problem.scale;
  if (problem.upstream) scale *= problem.upstream[problem.upstream_per_position ? position : 0];
  Acc lse_coeff = softmax.t_sum + row.t_y;
  if (problem.z_loss != 0) lse_coeff += 2 * z_loss_of(problem) * (softmax.m + log_of(softmax.s));
  return {finite(softmax.m), lse_coeff * scale / softmax.s, scale};
}

}  // namespace mbperf::cuda
