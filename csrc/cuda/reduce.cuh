// Softmax statistics merged over the lanes of a warp, the warps of a block and the blocks of a cluster, and
// sums of pairs. Every order of additions is fixed, no atomics: two runs give the same bits.
#pragma once

#include "cuda/chip.cuh"

namespace mbperf::cuda {

constexpr int kWarp = 32;

// What is summed over the classes beside exp(x_c - m): nothing, terms of t_c, or exp(z_c) z_c for an entropy.
enum class Sums { kNone, kTarget, kMoment };

// Statistics of some classes of a row, or of all once merged, in the letters of problem.h.
template <class Acc>
struct alignas(16) Softmax {
  Acc m;       // largest logit
  Acc s;       // sum of exp(x_c - m)
  Acc tx_sum;  // sum of t_c (x_c - m)
  Acc t_sum;   // sum of t_c

  static __device__ __forceinline__ Softmax none() { return {Acc(-INFINITY), 0, 0, 0}; }

  // The sum of exp(z_c) z_c, in the place of a sum that is 0 where an entropy is wanted.
  __device__ __forceinline__ Acc& moment() { return tx_sum; }
};

// Subtracting this instead of a maximum of -inf leaves exp(-inf) = 0 rather than NaN.
template <class Acc>
__device__ __forceinline__ Acc finite(Acc m) {
  return m == Acc(-INFINITY) ? Acc(0) : m;
}

// The larger number, and a number rather than NaN: NaN shows in the sum of exponentials.
template <class Acc>
__device__ __forceinline__ Acc larger(Acc a, Acc b) {
  if constexpr (sizeof(Acc) == 4) {
    return fmaxf(a, b);
  } else {
    return fmax(a, b);
  }
}

// The same classes seen from a maximum that is at least theirs.
template <Sums kSums, class Acc>
__device__ __forceinline__ void rebase(Softmax<Acc>* softmax, Acc m, Acc inverse_temperature) {
  Acc shift = softmax->m - finite(m);
  if constexpr (kSums == Sums::kMoment) shift *= inverse_temperature;
  const Acc ratio = exp_of(shift);
  if constexpr (kSums == Sums::kMoment)  // shift is infinite where there were no classes
    softmax->moment() = ratio == 0 ? Acc(0) : ratio * (softmax->moment() + softmax->s * shift);
  softmax->s *= ratio;
  if constexpr (kSums == Sums::kTarget) {
    if (softmax->t_sum != 0) softmax->tx_sum += softmax->t_sum * shift;  // no classes yet: 0 * -inf
  }
  softmax->m = m;
}

template <Sums kSums, class Acc>
__device__ __forceinline__ void absorb(Softmax<Acc>* softmax, Softmax<Acc> other, Acc inverse_temperature) {
  const Acc m = larger(softmax->m, other.m);
  rebase<kSums>(softmax, m, inverse_temperature);
  rebase<kSums>(&other, m, inverse_temperature);
  softmax->s += other.s;
  if constexpr (kSums != Sums::kNone) softmax->tx_sum += other.tx_sum;
  if constexpr (kSums == Sums::kTarget) softmax->t_sum += other.t_sum;
}

template <int kLanes, class T, class Combine>
__device__ __forceinline__ T over_lanes(unsigned mask, T value, const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(mask, value, step));
  return value;
}

// Every one of kLanes neighbouring lanes gets the statistics of all, in the same bits.
template <Sums kSums, int kLanes, class Acc>
__device__ __forceinline__ Softmax<Acc> merged_over_lanes(unsigned mask, Softmax<Acc> softmax,
                                                          Acc inverse_temperature) {
  const auto add = [](Acc a, Acc b) { return a + b; };
  rebase<kSums>(&softmax, over_lanes<kLanes>(mask, softmax.m, [](Acc a, Acc b) { return larger(a, b); }),
                inverse_temperature);
  softmax.s = over_lanes<kLanes>(mask, softmax.s, add);
  if constexpr (kSums != Sums::kNone) softmax.tx_sum = over_lanes<kLanes>(mask, softmax.tx_sum, add);
  if constexpr (kSums == Sums::kTarget) softmax.t_sum = over_lanes<kLanes>(mask, softmax.t_sum, add);
  return softmax;
}

// Every thread of a block, or of a cluster of them, gets the statistics of all. `slots` is shared memory for
// one a warp of the cluster. Each warp writes its own to every block, so that one barrier is enough; whoever
// called cluster_arrive at its start knows by the wait here that all blocks have started.
template <Sums kSums, int kWarps, class Acc>
__device__ Softmax<Acc> merged_over_blocks(Softmax<Acc>* slots, Softmax<Acc> softmax,
                                           Acc inverse_temperature) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, blocks = cluster_size();
  softmax = merged_over_lanes<kSums, kWarp>(kAll, softmax, inverse_temperature);
  if (blocks == 1) {
    if (lane == 0) slots[warp] = softmax;
    __syncthreads();
  } else {
    cluster_wait();
    if (lane < blocks) *shared_memory_of(slots + cluster_rank() * kWarps + warp, lane) = softmax;
    cluster_arrive();
    cluster_wait();
  }
  Softmax<Acc> all = Softmax<Acc>::none();
  for (unsigned i = lane; i < blocks * kWarps; i += kWarp) absorb<kSums>(&all, slots[i], inverse_temperature);
  return merged_over_lanes<kSums, kWarp>(kAll, all, inverse_temperature);
}

// The sum over a block of kThreads, in thread 0. `slots` is shared memory for one a warp.
template <int kThreads>
__device__ Pair summed_over_block(Pair* slots, Pair value) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto add = [](double a, double b) { return a + b; };
  const auto over_warp = [&](Pair p) {
    return Pair{over_lanes<kWarp>(kAll, p.first, add), over_lanes<kWarp>(kAll, p.second, add)};
  };
  value = over_warp(value);
  if (lane == 0) slots[warp] = value;
  __syncthreads();
  return over_warp(lane < kThreads / kWarp ? slots[lane] : Pair{0, 0});
}

}  // namespace mbperf::cuda
