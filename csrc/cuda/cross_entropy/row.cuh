// The terms of a row that all cross entropy kernels share, whoever reads its logits: t_c, the loss from m, s
// and the sums of t, the slope of the gradient (formulas in problem.h).
#pragma once

#include "cuda/reduce.cuh"

namespace mbperf::cuda {

// The target distribution t of a row: one class; that class and a constant; any, which is probabilities, or
// smoothing with a weight a class; one class beside an entropy at a temperature.
enum class Target { kHard, kSmooth, kAny, kEntropy };

// Whether t_c is other than 0 for classes other than the target's.
template <Target kTarget>
constexpr bool kSpread = kTarget == Target::kSmooth || kTarget == Target::kAny;

template <Target kTarget>
constexpr Sums kSums = kSpread<kTarget>              ? Sums::kTarget
                       : kTarget == Target::kEntropy ? Sums::kMoment
                                                     : Sums::kNone;

// z of x - m: with an entropy over the temperature.
template <Target kTarget, class Acc>
__device__ __forceinline__ Acc over_temperature(const Problem<Acc>& problem, Acc difference) {
  return kTarget == Target::kEntropy ? difference * problem.inverse_temperature : difference;
}

// Adds a class to the sums of exponentials.
template <Target kTarget, class Acc>
__device__ __forceinline__ void add_exponential(const Problem<Acc>& problem, Acc difference,
                                                Softmax<Acc>* softmax) {
  const Acc z = over_temperature<kTarget>(problem, difference), e = exp_of(z);
  softmax->s += e;
  if constexpr (kTarget == Target::kEntropy) {
    if (e != 0) softmax->moment() += e * z;  // 0 log 0 is 0, not 0 * -inf
  }
}

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
  return kTarget != Target::kAny && problem.known_softmax;  // any t has to be summed over the classes anyway
}

// The statistics of softmax_is_known. They may be of more classes than are here: of those of other ranks too.
template <Target kTarget, class Acc>
__device__ __forceinline__ Softmax<Acc> known_softmax(const Problem<Acc>& problem, int64_t position) {
  Softmax<Acc> softmax{problem.row_max[position], problem.row_sum[position], 0, 0};
  if (kTarget == Target::kSmooth) softmax.t_sum = problem.prob_coeff * Acc(problem.classes);
  if (kTarget == Target::kEntropy && problem.row_moment) softmax.moment() = problem.row_moment[position];
  return softmax;
}

template <class Acc>
__device__ __forceinline__ Acc z_loss_of(const Problem<Acc>& problem) {
  return problem.totals ? problem.z_loss * Acc(problem.totals->z_ratio) : problem.z_loss;
}

template <class Acc>
__device__ __forceinline__ void write_row(const Problem<Acc>& problem, int64_t position, Acc loss, Acc m,
                                          Acc s) {
  if (problem.loss) problem.loss[position] = loss;
  if (problem.row_max) problem.row_max[position] = m;
  if (problem.row_sum) problem.row_sum[position] = s;
}

template <class Acc>
__device__ __forceinline__ void write_entropy(const Problem<Acc>& problem, int64_t position, Acc entropy,
                                              Acc moment) {
  if (problem.entropy) problem.entropy[position] = entropy;
  if (problem.row_moment) problem.row_moment[position] = moment;
}

// By one thread a row; x_y is the logit of class row.y.
template <Target kTarget, class Acc>
__device__ __forceinline__ void finish_row(const Problem<Acc>& problem, int64_t position, const Row<Acc>& row,
                                           Softmax<Acc> softmax, Acc x_y) {
  if (problem.known_softmax) return;
  if (row.ignored) {
    if constexpr (kTarget == Target::kEntropy) write_entropy(problem, position, Acc(0), Acc(0));
    return write_row(problem, position, Acc(0), Acc(0), Acc(1));
  }
  if constexpr (kTarget == Target::kEntropy) {
    const Acc log_s = log_of(softmax.s);
    write_entropy(problem, position, log_s - softmax.moment() / softmax.s, softmax.moment());
    const Acc z_y = over_temperature<kTarget>(problem, x_y - softmax.m);
    return write_row(problem, position, row.t_y * (log_s - z_y), softmax.m, softmax.s);
  }
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
// With an entropy: exp(z_c) (factor + tilt z_c) - t_c scale, with tilt = -entropy_scale / (T s) and
// factor = sum t_c scale / s - tilt mean, where scale is divided by T.
template <class Acc>
struct Slope {
  Acc centre, factor, scale, tilt;
};

// grad_c without the share of t_c.
template <Target kTarget, class Acc>
__device__ __forceinline__ Acc gradient_of(const Problem<Acc>& problem, const Slope<Acc>& slope, Acc x) {
  const Acc z = over_temperature<kTarget>(problem, x - slope.centre), e = exp_of(z);
  if constexpr (kTarget == Target::kEntropy)  // 0 log 0 has a gradient of 0; NaN comes by the factor
    return e * (slope.factor + (e != 0 ? slope.tilt * z : Acc(0)));
  return e * slope.factor;
}

template <Target kTarget, class Acc>
__device__ __forceinline__ Slope<Acc> slope_of(const Problem<Acc>& problem, int64_t position,
                                               const Row<Acc>& row, Softmax<Acc> softmax) {
  Acc scale = problem.totals ? Acc(problem.totals->scale) : problem.scale;
  if (problem.upstream) scale *= problem.upstream[problem.upstream_per_position ? position : 0];
  if constexpr (kTarget == Target::kEntropy) {
    scale *= problem.inverse_temperature;
    const Acc upstream = problem.entropy_scale ? problem.entropy_scale[position] : Acc(0);
    const Acc tilt = -upstream * problem.inverse_temperature / softmax.s;
    return {finite(softmax.m), row.t_y * scale / softmax.s - tilt * (softmax.moment() / softmax.s), scale,
            tilt};
  }
  Acc lse_coeff = softmax.t_sum + row.t_y;
  if (problem.z_loss != 0) lse_coeff += 2 * z_loss_of(problem) * (softmax.m + log_of(softmax.s));
  return {finite(softmax.m), lse_coeff * scale / softmax.s, scale, 0};
}

}  // namespace mbperf::cuda
