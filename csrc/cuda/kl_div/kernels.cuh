// KL divergence of rows of logits by running maxima, to which the sums are rebased: a warp or a block a row,
// 16 bytes at a time. The gradient reads the row again, most of it from the cache.
#pragma once

#include "cuda/kl_div/problem.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace mbperf::cuda {

// Sums over some classes of a row, or over all once merged, in the letters of problem.h.
template <class Acc>
struct PairSums {
  Acc m_x, s_x, m_z, s_z, d;

  static __device__ __forceinline__ PairSums none() { return {Acc(-INFINITY), 0, Acc(-INFINITY), 0, 0}; }
};

// The same classes seen from maxima that are at least theirs.
template <class Acc>
__device__ __forceinline__ void rebase(PairSums<Acc>* sums, Acc m_x, Acc m_z, Acc inverse_temperature) {
  const Acc shift = (finite(sums->m_z) - finite(m_z)) - (finite(sums->m_x) - finite(m_x));
  const Acc factor_z = exp_of((sums->m_z - finite(m_z)) * inverse_temperature);
  sums->s_x *= exp_of((sums->m_x - finite(m_x)) * inverse_temperature);
  sums->s_z *= factor_z;
  // Infinite where the student excludes a class; of no weight, that would be 0 * inf.
  sums->d = factor_z == 0 ? Acc(0) : factor_z * sums->d + sums->s_z * shift;
  sums->m_x = m_x;
  sums->m_z = m_z;
}

template <class Acc>
__device__ __forceinline__ void absorb(PairSums<Acc>* sums, PairSums<Acc> other, Acc inverse_temperature) {
  const Acc m_x = larger(sums->m_x, other.m_x), m_z = larger(sums->m_z, other.m_z);
  rebase(sums, m_x, m_z, inverse_temperature);
  rebase(&other, m_x, m_z, inverse_temperature);
  sums->s_x += other.s_x;
  sums->s_z += other.s_z;
  sums->d += other.d;
}

// Every lane of a warp gets the sums of all, in the same bits.
template <class Acc>
__device__ __forceinline__ PairSums<Acc> merged_over_warp(PairSums<Acc> sums, Acc inverse_temperature) {
  constexpr unsigned kAll = 0xffffffffu;
  const auto larger_of = [](Acc a, Acc b) { return larger(a, b); };
  const auto add = [](Acc a, Acc b) { return a + b; };
  const Acc m_x = over_lanes<kWarp>(kAll, sums.m_x, larger_of),
            m_z = over_lanes<kWarp>(kAll, sums.m_z, larger_of);
  rebase(&sums, m_x, m_z, inverse_temperature);
  sums.s_x = over_lanes<kWarp>(kAll, sums.s_x, add);
  sums.s_z = over_lanes<kWarp>(kAll, sums.s_z, add);
  sums.d = over_lanes<kWarp>(kAll, sums.d, add);
  return sums;
}

// Every thread of a block gets the sums of all. `slots` is shared memory for one a warp.
template <int kWarps, class Acc>
__device__ PairSums<Acc> merged_over_block(PairSums<Acc>* slots, PairSums<Acc> sums,
                                           Acc inverse_temperature) {
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  sums = merged_over_warp(sums, inverse_temperature);
  if (lane == 0) slots[warp] = sums;
  __syncthreads();
  return merged_over_warp(lane < kWarps ? slots[lane] : PairSums<Acc>::none(), inverse_temperature);
}

// Adds a vector of either side; classes outside the row are -inf on both.
template <class S, class Acc>
__device__ __forceinline__ void add_vectors(uint4 raw_x, uint4 raw_z, Acc inverse_temperature,
                                            PairSums<Acc>* sums) {
  constexpr int E = Vector<S>::kSize;
  Acc x[E], z[E], m_x = sums->m_x, m_z = sums->m_z;
  Vector<S>::unpack(raw_x, x);
  Vector<S>::unpack(raw_z, z);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    m_x = larger(m_x, x[e]);
    m_z = larger(m_z, z[e]);
  }
  rebase(sums, m_x, m_z, inverse_temperature);
  const Acc centre_x = finite(m_x), centre_z = finite(m_z);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const Acc d_x = x[e] - centre_x, d_z = z[e] - centre_z, e_z = exp_of(d_z * inverse_temperature);
    sums->s_x += exp_of(d_x * inverse_temperature);
    sums->s_z += e_z;
    if (e_z != 0) sums->d += e_z * (d_z - d_x);
  }
}

template <class Acc>
__device__ __forceinline__ Acc loss_of(const PairSums<Acc>& sums, Acc inverse_temperature) {
  // 0 / s_x is NaN where all logits of the student are -inf, and d / s_z where the teacher's are.
  const Acc loss = sums.d * inverse_temperature / sums.s_z + log_of(sums.s_x / sums.s_z) + Acc(0) / sums.s_x;
  return loss < 0 ? Acc(0) : loss;  // by rounding; NaN stays
}

// grad_c = (e_x ratio - e_z) factor, with ratio = s_z / s_x and factor = scale / s_z: of equal logits 0
template <class S, class Acc>
__device__ __forceinline__ uint4 gradient_of(uint4 raw_x, uint4 raw_z, const PairSums<Acc>& sums,
                                             Acc inverse_temperature, Acc scale) {
  constexpr int E = Vector<S>::kSize;
  const Acc ratio = sums.s_z / sums.s_x, factor = scale / sums.s_z;
  Acc x[E], z[E];
  Vector<S>::unpack(raw_x, x);
  Vector<S>::unpack(raw_z, z);
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const Acc e_x = exp_of((x[e] - finite(sums.m_x)) * inverse_temperature),
              e_z = exp_of((z[e] - finite(sums.m_z)) * inverse_temperature);
    x[e] = (e_x * ratio - e_z) * factor;
  }
  return Vector<S>::pack(x);
}

constexpr int kKlDivBlock = 512;  // threads of a long row
constexpr int kKlDivShort = 128;  // threads of a block of short rows, a warp each

// kThreads threads a row.
template <class S, int kThreads>
__global__ void __launch_bounds__(kThreads > kWarp ? kThreads : kKlDivShort)
    kl_div_kernel(const __grid_constant__ KlDivProblem<AccumulateType<S>> problem) {
  using Acc = AccumulateType<S>;
  constexpr int E = Vector<S>::kSize;
  constexpr bool kWholeBlock = kThreads > kWarp;
  const int64_t row =
      kWholeBlock ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * (kKlDivShort / kWarp) + threadIdx.x / kWarp;
  if (row >= problem.rows) return;  // a whole warp, or none
  const S* const x = static_cast<const S*>(problem.student) + row * problem.student_stride;
  const S* const z = static_cast<const S*>(problem.teacher) + row * problem.teacher_stride;
  const Acc inverse_temperature = problem.inverse_temperature;
  const int64_t n = problem.classes, step = int64_t{kThreads} * E;
  const int64_t first =
      int64_t(threadIdx.x % kThreads) * E - int64_t(reinterpret_cast<uintptr_t>(x) / sizeof(S) % E);
  PairSums<Acc> sums = PairSums<Acc>::none();
#pragma unroll 2
  for (int64_t i = first; i < n; i += step)
    add_vectors<S>(load_vector(x, i, n), load_vector(z, i, n), inverse_temperature, &sums);
  if constexpr (kWholeBlock) {
    sums = merged_over_block<kThreads / kWarp>(shared_memory<PairSums<Acc>>(), sums, inverse_temperature);
  } else {
    sums = merged_over_warp(sums, inverse_temperature);
  }
  if (problem.loss && threadIdx.x % kThreads == 0) problem.loss[row] = loss_of(sums, inverse_temperature);
  if (!problem.grad) return;
  Acc scale = problem.scale;
  if (problem.upstream) scale *= problem.upstream[problem.upstream_per_row ? row : 0];
  S* const g = static_cast<S*>(problem.grad) + row * n;
#pragma unroll 2
  for (int64_t i = first; i < n; i += step)
    store_vector(
        g, i, n,
        gradient_of<S>(load_vector(x, i, n), load_vector(z, i, n), sums, inverse_temperature, scale));
}

// The longest row that a warp works by itself, in vectors a thread.
constexpr int64_t kKlDivWarpVectors = 8;

template <class S>
int launch_kl_div(const KlDivProblem<AccumulateType<S>>& problem, Stream stream) {
  constexpr int64_t kRows = kKlDivShort / kWarp;
  if (problem.classes <= kKlDivWarpVectors * kWarp * Vector<S>::kSize)
    return launch(kl_div_kernel<S, kWarp>, Grid{(problem.rows + kRows - 1) / kRows, kKlDivShort}, stream,
                  problem);
  constexpr int64_t kSlots = kKlDivBlock / kWarp * int64_t(sizeof(PairSums<AccumulateType<S>>));
  return launch(kl_div_kernel<S, kKlDivBlock>, Grid{problem.rows, kKlDivBlock, 1, kSlots}, stream, problem);
}

}  // namespace mbperf::cuda
