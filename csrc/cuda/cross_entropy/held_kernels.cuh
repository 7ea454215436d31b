// Cross entropy of rows whose classes are adjacent: part of a warp, a block or a cluster of blocks holds a
// row in registers, so that each logit is read once and its gradient written once, 16 bytes at a time.
#pragma once

#include "cuda/cross_entropy/row.cuh"

namespace mbperf::cuda {

// A row is held by kLanes threads, kVectors times 16 bytes each.
template <int kLanes>
struct HeldShape {
  static constexpr int kThreads = kLanes > 128 ? kLanes : 128;
  static constexpr int kRows = kThreads / kLanes;  // a block
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr bool kWholeBlock = kLanes == kThreads;
};

// 16-byte vectors a thread of a long row: with more, double precision exponentials leave too few registers.
template <class S>
constexpr int kLongVectors = sizeof(S) == 8 ? 4 : 8;

// This block's share of a row: 16-byte vectors, the first and the last of the row perhaps not full.
struct HeldSpan {
  int head;        // elements of the first vector that lie before the row
  int begin, end;  // vectors of this block
};

template <class S>
__device__ __forceinline__ HeldSpan held_span(const S* row, int classes, unsigned rank, unsigned blocks) {
  constexpr int E = Vector<S>::kSize;
  const int head = int(reinterpret_cast<uintptr_t>(row) / sizeof(S) % E);
  const int vectors = (head + classes + E - 1) / E;
  const int share = (vectors + int(blocks) - 1) / int(blocks);
  const int begin = int(rank) * share;
  return {head, begin, begin + share < vectors ? begin + share : vectors};
}

template <class S, Target kTarget, int kLanes, int kVectors>
struct Held {
  using Acc = AccumulateType<S>;
  using V = Vector<S>;
  static constexpr int E = V::kSize;

  const Problem<Acc>& p;
  const S* soft;  // row of probabilities, or nullptr
  HeldSpan span;
  int lane, classes;
  uint4 raw[kVectors];

  __device__ __forceinline__ int vector(int i) const { return span.begin + i * kLanes + lane; }

  __device__ __forceinline__ void load(const S* row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (vector(i) < span.end) raw[i] = load_vector(row, vector(i) * E - span.head, classes);
  }

  __device__ __forceinline__ void load_soft(int first, Acc (&q)[E]) const {
    if (kTarget == Target::kAny && soft) V::unpack(load_vector(soft, first, classes), q);
  }

  // Statistics of this thread's classes, without the hard target.
  __device__ __forceinline__ Softmax<Acc> statistics() const {
    Softmax<Acc> s = Softmax<Acc>::none();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vector(i) >= span.end) break;
      Acc x[E];
      V::unpack(raw[i], x);
#pragma unroll
      for (int e = 0; e < E; ++e) s.max = larger(s.max, x[e]);
    }
    const Acc centre = finite(s.max);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vector(i) >= span.end) break;
      Acc x[E];
      V::unpack(raw[i], x);
#pragma unroll
      for (int e = 0; e < E; ++e) s.sum += exp_of(x[e] - centre);
      if constexpr (kSpread<kTarget>) add_spread(vector(i) * E - span.head, x, centre, &s);
    }
    return s;
  }

  __device__ __forceinline__ void add_spread(int first, const Acc (&x)[E], Acc centre,
                                             Softmax<Acc>* s) const {
    Acc soft_share[E] = {};
    load_soft(first, soft_share);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (unsigned(first + e) >= unsigned(classes)) continue;
      const Acc q = spread_share<kTarget>(p, first + e, soft_share[e]);
      s->linear += q * (x[e] - centre);
      if constexpr (kTarget == Target::kAny) s->mass += q;
    }
    if constexpr (kTarget == Target::kSmooth) {
      const int last = first + E < classes ? first + E : classes;
      s->mass += p.prob_coeff * Acc(last - (first > 0 ? first : 0));
    }
  }

  // Each gradient is rounded once, the hard target's share taken off before.
  __device__ __forceinline__ void store_gradient(S* grad, const Row<Acc>& row,
                                                 const Slope<Acc>& slope) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vector(i) >= span.end) break;
      const int first = vector(i) * E - span.head;
      Acc g[E];
      V::unpack(raw[i], g);
#pragma unroll
      for (int e = 0; e < E; ++e) g[e] = exp_of(g[e] - slope.centre) * slope.factor;
      if constexpr (kSpread<kTarget>) subtract_spread(first, slope.scale, g);
      const unsigned at = unsigned(int(row.y) - first);
      if (at < unsigned(E)) {
#pragma unroll
        for (int e = 0; e < E; ++e)
          if (at == unsigned(e)) g[e] -= row.hard * slope.scale;
      }
      store_vector(grad, first, classes, V::pack(g));
    }
  }

  __device__ __forceinline__ void subtract_spread(int first, Acc scale, Acc (&g)[E]) const {
    Acc soft_share[E] = {};
    load_soft(first, soft_share);
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (unsigned(first + e) < unsigned(classes))
        g[e] -= spread_share<kTarget>(p, first + e, soft_share[e]) * scale;
  }

  __device__ __forceinline__ void store_zeros(S* grad) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (vector(i) < span.end) store_vector(grad, vector(i) * E - span.head, classes, uint4{0, 0, 0, 0});
  }
};

template <class S, class Acc>
__device__ __forceinline__ S* grad_row(const Problem<Acc>& p, int64_t position) {
  return static_cast<S*>(p.grad) + offset_of(p, p.grad_strides, position);
}

// Threads a multiprocessor should hold at once. 1,024 leave 64 registers each, of which 32 are the row's: 128
// KiB in flight a multiprocessor, several times what covers the latency of its share of the bandwidth. Any
// other q takes up to 95 registers, for the probabilities and weights beside the row, and double precision
// exponentials more than 64: for these 512 threads have to do.
template <class S, Target kTarget>
constexpr int kHeldThreads = kTarget == Target::kAny || sizeof(S) == 8 ? 512 : 1024;

// One block a cluster where kLanes is less than 512. The rows of input, grad and soft_target start at the
// same place modulo 16 bytes.
template <class S, Target kTarget, int kLanes, int kVectors>
__global__ void __launch_bounds__(HeldShape<kLanes>::kThreads,
                                  kHeldThreads<S, kTarget> / HeldShape<kLanes>::kThreads)
    held_rows_kernel(const __grid_constant__ Problem<AccumulateType<S>> p) {
  using Acc = AccumulateType<S>;
  using Shape = HeldShape<kLanes>;
  constexpr bool kClusters = kLanes == 512;
  const unsigned blocks = kClusters ? cluster_size() : 1, rank = kClusters ? cluster_rank() : 0;
  const int lane = threadIdx.x % kLanes;
  const int64_t position = int64_t(blockIdx.x / blocks) * Shape::kRows + threadIdx.x / kLanes;
  if (position >= p.positions) return;
  const S* const x = static_cast<const S*>(p.input) + offset_of(p, p.input_strides, position);
  const Row<Acc> row = row_at<kTarget>(p, position);
  Held<S, kTarget, kLanes, kVectors> held{p,    nullptr,        held_span(x, int(p.classes), rank, blocks),
                                          lane, int(p.classes), {}};
  const bool leads = lane == 0 && rank == 0;
  if (row.ignored) {  // alike for all threads of a row, so that none waits for another below
    if (leads) finish_row<kTarget>(p, position, row, Softmax<Acc>::none(), Acc(0));
    if (p.grad) held.store_zeros(grad_row<S>(p, position));
    return;
  }
  if (blocks > 1) cluster_arrive();
  if (kTarget == Target::kAny && p.soft_target)
    held.soft = static_cast<const S*>(p.soft_target) + offset_of(p, p.soft_strides, position);
  held.load(x);
  // Before the merger, after which the gradient may overwrite it.
  const Acc at_target = leads && has_class<kTarget>(row) ? Vector<S>::widen(x[row.y]) : Acc(0);
  Softmax<Acc> s = held.statistics();
  if constexpr (Shape::kWholeBlock) {
    s = merged_over_blocks<kSpread<kTarget>, Shape::kWarps>(shared_memory<Softmax<Acc>>(), s);
  } else {
    constexpr unsigned kAll = kLanes == kWarp ? 0xffffffffu : (1u << (kLanes % kWarp)) - 1;
    const unsigned mask = kAll << (threadIdx.x % kWarp / kLanes * kLanes);
    s = merged_over_lanes<kSpread<kTarget>, kLanes>(mask, s);
    __syncwarp(mask);
  }
  if (leads) finish_row<kTarget>(p, position, row, s, at_target);
  if (p.grad) held.store_gradient(grad_row<S>(p, position), row, slope_of(p, position, row, s));
}

}  // namespace mbperf::cuda
