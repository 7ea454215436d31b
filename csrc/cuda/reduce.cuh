// Softmax statistics merged over the lanes of a warp, the warps of a block and the blocks of a cluster, and
// sums of pairs. Every order of additions is fixed, no atomics: two runs give the same bits.
#pragma once

#include "cuda/chip.cuh"

namespace mbperf::cuda {

constexpr int kWarp = 32;

// Of some classes of a row, or of all once merged.
template <class Acc>
struct alignas(16) Softmax {
  Acc max;     // largest logit
  Acc sum;     // sum of exp(logit - max)
  Acc linear;  // sum of q_c (logit_c - max): q is the target distribution
  Acc mass;    // sum of q_c

  static __device__ __forceinline__ Softmax none() { return {Acc(-INFINITY), 0, 0, 0}; }
};

// Subtracting this instead of a maximum of -inf leaves exp(-inf) = 0 rather than NaN.
template <class Acc>
__device__ __forceinline__ Acc finite(Acc max) {
  return max == Acc(-INFINITY) ? Acc(0) : max;
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
template <bool kLinear, class Acc>
__device__ __forceinline__ void rebase(Softmax<Acc>* s, Acc max) {
  const Acc shift = s->max - finite(max);
  s->sum *= exp_of(shift);
  if constexpr (kLinear) {
    if (s->mass != 0) s->linear += s->mass * shift;  // no classes yet: 0 * -inf
  }
  s->max = max;
}

template <bool kLinear, class Acc>
__device__ __forceinline__ void absorb(Softmax<Acc>* s, Softmax<Acc> other) {
  const Acc max = larger(s->max, other.max);
  rebase<kLinear>(s, max);
  rebase<kLinear>(&other, max);
  s->sum += other.sum;
  if constexpr (kLinear) {
    s->linear += other.linear;
    s->mass += other.mass;
  }
}

template <int kLanes, class T, class Combine>
__device__ __forceinline__ T over_lanes(unsigned mask, T value, const Combine& combine) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(mask, value, step));
  return value;
}

// Every one of kLanes neighbouring lanes gets the statistics of all, in the same bits.
template <bool kLinear, int kLanes, class Acc>
__device__ __forceinline__ Softmax<Acc> merged_over_lanes(unsigned mask, Softmax<Acc> s) {
  const auto add = [](Acc a, Acc b) { return a + b; };
  rebase<kLinear>(&s, over_lanes<kLanes>(mask, s.max, [](Acc a, Acc b) { return larger(a, b); }));
  s.sum = over_lanes<kLanes>(mask, s.sum, add);
  if constexpr (kLinear) {
    s.linear = over_lanes<kLanes>(mask, s.linear, add);
    s.mass = over_lanes<kLanes>(mask, s.mass, add);
  }
  return s;
}

// Every thread of a block, or of a cluster of them, gets the statistics of all. `slots` is shared memory for
// one a warp of the cluster. Each warp writes its own to every block, so that one barrier is enough; whoever
// called cluster_arrive at its start knows by the wait here that all blocks have started.
template <bool kLinear, int kWarps, class Acc>
__device__ Softmax<Acc> merged_over_blocks(Softmax<Acc>* slots, Softmax<Acc> s) {
  constexpr unsigned kAll = 0xffffffffu;
  const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, blocks = cluster_size();
  s = merged_over_lanes<kLinear, kWarp>(kAll, s);
  if (blocks == 1) {
    if (lane == 0) slots[warp] = s;
    __syncthreads();
  } else {
    cluster_wait();
    if (lane < blocks) *shared_memory_of(slots + cluster_rank() * kWarps + warp, lane) = s;
    cluster_arrive();
    cluster_wait();
  }
  Softmax<Acc> all = Softmax<Acc>::none();
  for (unsigned i = lane; i < blocks * kWarps; i += kWarp) absorb<kLinear>(&all, slots[i]);
  return merged_over_lanes<kLinear, kWarp>(kAll, all);
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
