// Softmax statistics merged over the lanes of a warp, the warps of a block and the blocks of a cluster, and
// sums of pairs. Every order of additions is fixed, no atomics: two runs give the same bits.
#pragma once

#include "cuda/chip.cuh"

namespace mbperf::cuda {

constexpr int kWarp = 32;

// Statistics of some classes of a row, or of all once merged, in the letters of problem.h.
template <class Acc>
struct alignas(16) Softmax {
  Acc m;       // largest logit
  Acc s;       // sum of exp(x_c - m)
  Acc tx_sum;  // sum of t_c (x_c - m)
  Acc t_sum;   // sum of t_c

  static __device__ __forceinline__ Softmax none() { return {Acc(-INFINITY), 0, 0, 0}; }
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
template <bool kTargetSums, class Acc>
__device__ __forceinline__ void rebase(Softmax<Acc>* softmax, Acc m) {
  const Acc shift = softmax->m - finite(m);
  softmax->s *= exp_of(shift);
  if constexpr (kTargetSums) {
    if (softmax->t_sum != 0) softmax->tx_sum += softmax->t_sum * shift;  // no classes yet: 0 * -inf
  }
  softmax->m = m;
}

template <bool kTargetSums, class Acc>
__device__ __forceinline__ void absorb(Softmax<Acc>* softmax, Softmax<Acc> other) {
  const Acc m = larger(softmax->m, other.m);
  rebase<kTargetSums>(softmax, m);
  rebase<kTargetSums>(&other, m);
  softmax->s += other.s;
  if constexpr (kTargetSums) {
    softmax->tx_sum += other.tx_sum;
    softmax->t_sum += other.t_sum;
  }
}

template <int kLanes, class T, class Combine>
__device__ __forceinline__ T over_lanes(unsigned mask, T value, const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(mask, value, step));
  return value;
}

// Every one of kLanes neighbouring lanes gets the statistics of all, in the same bits.
template <bool kTargetSums, int kLanes, class Acc>
__device__ __forceinline__ Softmax<Acc> merged_over_lanes(unsigned mask, Softmax<Acc> softmax) {
  const auto add = [](Acc a, Acc b) { return a + b; };
  rebase<kTargetSums>(&softmax,
                      over_lanes<kLanes>(mask, softmax.m, [](Acc a, Acc b) { return larger(a, b); }));
  softmax.s = over_lanes<kLanes>(mask, softmax.s, add);
  if constexpr (kTargetSums) {
    softmax.tx_sum = over_lanes<kLanes>(mask, softmax.tx_sum, add);
    softmax.t_sum = over_lanes<kLanes>(mask, softmax.t_sum, add);
  }
  return softmax;
}

// Every thread of a block, or of a cluster of them, gets the statistics of all. `slots` is shared memory for
// one a warp of the cluster. Each warp writes its own to every block, so that one barrier is enough; whoever
// called cluster_arrive at its start knows by the wait here that all blocks have started.
template <bool kTargetSums, int kWarps, class Acc>
__device__ Softmax<Acc> merged_over_blocks(Softmax<Acc>* slots, Softmax<Acc> softmax) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, blocks = cluster_size();
  softmax = merged_over_lanes<kTargetSums, kWarp>(kAll, softmax);
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
  for (unsigned i = lane; i < blocks * kWarps; i += kWarp) absorb<kTargetSums>(&all, slots[i]);
  return merged_over_lanes<kTargetSums, kWarp>(kAll, all);
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
