// What every cross entropy kernel does with one row, whoever reads its logits: the target, the loss and the
// slope of the gradient, by the formulas of problem.h.
#pragma once

#include "cuda/reduce.cuh"

namespace mbperf::cuda {

// How q, the target distribution of a row, is spread: one class; that class and a constant; any way, which is
// probabilities, or smoothing with a weight a class.
enum class Target { kHard, kSmooth, kAny };

// Whether classes other than the target's have a share of q.
template <Target kTarget>
constexpr bool kSpread = kTarget != Target::kHard;

template <class Acc>
__device__ __forceinline__ int64_t offset_of(const Problem<Acc>& p, const Strides& strides,
                                             int64_t position) {
  if (p.inner == p.positions) return position * strides.inner;  // two 64-bit divisions saved a row
  return position / p.inner * strides.outer + position % p.inner * strides.inner;
}

template <class Acc>
struct Row {
  int64_t y;  // class of a hard target, -1 without one
  Acc hard;   // its share of q, beside the smoothing's
  bool ignored;
};

template <Target kTarget, class Acc>
__device__ __forceinline__ Row<Acc> row_at(const Problem<Acc>& p, int64_t position) {
  if (kTarget == Target::kAny && !p.target) return {-1, 0, false};
  const int64_t y = p.target[position];
  if (y == p.ignore_index) return {-1, 0, true};
  MBPERF_KERNEL_ASSERT(y >= 0 && y < p.classes);
  return {y, p.weight ? p.target_coeff * p.weight[y] : p.target_coeff, false};
}

// Of a row that is not ignored.
template <Target kTarget, class Acc>
__device__ __forceinline__ bool has_class(const Row<Acc>& row) {
  return kTarget != Target::kAny || row.y >= 0;
}

// q_c but for the share of a hard target's class; `soft` is the probability, 0 where targets are hard.
template <Target kTarget, class Acc>
__device__ __forceinline__ Acc spread_share(const Problem<Acc>& p, int64_t c, Acc soft) {
  if constexpr (kTarget == Target::kSmooth) return p.prob_coeff;
  const Acc q = p.prob_coeff + soft * p.target_coeff;
  return p.weight ? q * p.weight[c] : q;
}

template <Target kTarget, class Acc>
__device__ __forceinline__ bool softmax_is_known(const Problem<Acc>& p) {
  return kTarget == Target::kHard && p.known_softmax;  // else q has to be summed over the classes anyway
}

// The statistics of softmax_is_known.
template <class Acc>
__device__ __forceinline__ Softmax<Acc> known_softmax(const Problem<Acc>& p, int64_t position) {
  return {p.row_max[position], p.row_sum[position], 0, 0};
}

template <class Acc>
__device__ __forceinline__ Acc z_loss_of(const Problem<Acc>& p) {
  return p.totals ? p.z_loss * Acc(p.totals->z_ratio) : p.z_loss;
}

template <class Acc>
__device__ __forceinline__ void write_row(const Problem<Acc>& p, int64_t position, Acc loss, Acc max,
                                          Acc sum) {
  if (p.known_softmax) return;
  if (p.loss) p.loss[position] = loss;
  if (p.row_max) p.row_max[position] = max;
  if (p.row_sum) p.row_sum[position] = sum;
}

// By one thread a row; `at_target` is the logit of class row.y.
template <Target kTarget, class Acc>
__device__ __forceinline__ void finish_row(const Problem<Acc>& p, int64_t position, const Row<Acc>& row,
                                           Softmax<Acc> s, Acc at_target) {
  if (row.ignored) return write_row(p, position, Acc(0), Acc(0), Acc(1));
  if (has_class<kTarget>(row)) {
    s.linear += row.hard * (at_target - s.max);
    s.mass += row.hard;
  }
  const Acc log_sum = log_of(s.sum);
  Acc loss = s.mass * log_sum - s.linear;
  if (p.z_loss != 0) {
    const Acc lse = s.max + log_sum;
    loss += z_loss_of(p) * lse * lse;
  }
  write_row(p, position, loss, s.max, s.sum);
}

// d(result)/d(x_c) = exp(x_c - centre) factor - q_c scale
template <class Acc>
struct Slope {
  Acc centre, factor, scale;
};

template <class Acc>
__device__ __forceinline__ Slope<Acc> slope_of(const Problem<Acc>& p, int64_t position, const Row<Acc>& row,
                                               const Softmax<Acc>& s) {
  Acc scale = p.totals ? Acc(p.totals->scale) : p.scale;
  if (p.upstream) scale *= p.upstream[p.upstream_per_position ? position : 0];
  Acc lse_coeff = s.mass + row.hard;
  if (p.z_loss != 0) lse_coeff += 2 * z_loss_of(p) * (s.max + log_of(s.sum));
  return {finite(s.max), lse_coeff * scale / s.sum, scale};
}

}  // namespace mbperf::cuda
