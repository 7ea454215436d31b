// Cross entropy of rows whose classes are adjacent: part of a warp, a block or a cluster of blocks holds a
// row in registers, so that each logit is read once and its gradient written once, 16 bytes at a time. Of a
// long row without a gradient a block holds a piece at a time.
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

  const Problem<Acc>& problem;
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

  __device__ __forceinline__ void load_soft(int first, Acc (&t)[E]) const {
    if (kTarget == Target::kAny && soft) V::unpack(load_vector(soft, first, classes), t);
  }

  // Statistics of this thread's classes, without the hard target.
  __device__ __forceinline__ Softmax<Acc> statistics() const {
    Softmax<Acc> softmax = Softmax<Acc>::none();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vector(i) >= span.end) break;
      Acc x[E];
      V::unpack(raw[i], x);
#pragma unroll
      for (int e = 0; e < E; ++e) softmax.m = larger(softmax.m, x[e]);
    }
    const Acc centre = finite(softmax.m);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vector(i) >= span.end) break;
      Acc x[E];
      V::unpack(raw[i], x);
#pragma unroll
      for (int e = 0; e < E; ++e) add_exponential<kTarget>(problem, x[e] - centre, &softmax);
      if constexpr (kSpread<kTarget>) add_target_terms(vector(i) * E - span.head, x, centre, &softmax);
    }
    return softmax;
  }

  __device__ __forceinline__ void add_target_terms(int first, const Acc (&x)[E], Acc centre,
                                                   Softmax<Acc>* softmax) const {
    Acc probability[E] = {};
    load_soft(first, probability);
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (unsigned(first + e) >= unsigned(classes)) continue;
      const Acc t = t_of_class<kTarget>(problem, first + e, probability[e]);
      softmax->tx_sum += t * (x[e] - centre);
      if constexpr (kTarget == Target::kAny) softmax->t_sum += t;
    }
    if constexpr (kTarget == Target::kSmooth) {
      const int last = first + E < classes ? first + E : classes;
      softmax->t_sum += problem.prob_coeff * Acc(last - (first > 0 ? first : 0));
    }
  }

  // Each gradient is rounded once, after t_y was taken off.
  __device__ __forceinline__ void store_gradient(S* grad, const Row<Acc>& row,
                                                 const Slope<Acc>& slope) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vector(i) >= span.end) break;
      const int first = vector(i) * E - span.head;
      Acc g[E];
      V::unpack(raw[i], g);
#pragma unroll
      for (int e = 0; e < E; ++e) g[e] = gradient_of<kTarget>(problem, slope, g[e]);
      if constexpr (kSpread<kTarget>) subtract_target_terms(first, slope.scale, g);
      const unsigned at = unsigned(int(row.y) - first);
      if (at < unsigned(E)) {
#pragma unroll
        for (int e = 0; e < E; ++e)
          if (at == unsigned(e)) g[e] -= row.t_y * slope.scale;
      }
      store_vector(grad, first, classes, V::pack(g));
    }
  }

  __device__ __forceinline__ void subtract_target_terms(int first, Acc scale, Acc (&g)[E]) const {
    Acc probability[E] = {};
    load_soft(first, probability);
#pragma unroll
    for (int e = 0; e < E; ++e)
      if (unsigned(first + e) < unsigned(classes))
        g[e] -= t_of_class<kTarget>(problem, first + e, probability[e]) * scale;
  }

  __device__ __forceinline__ void store_zeros(S* grad) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      if (vector(i) < span.end) store_vector(grad, vector(i) * E - span.head, classes, uint4{0, 0, 0, 0});
  }
};

template <class S, class Acc>
__device__ __forceinline__ S* grad_row(const Problem<Acc>& problem, int64_t position) {
  return static_cast<S*>(problem.grad) + offset_of(problem, problem.grad_strides, position);
}

// Threads a multiprocessor should hold at once. 1,024 leave 64 registers each, of which 32 are the row's: 128
// KiB in flight a multiprocessor, several times what covers the latency of its share of the bandwidth. Any
// other t takes up to 95 registers, for the probabilities and weights beside the row, and double precision
// exponentials more than 64: for these 512 threads have to do.
template <class S, Target kTarget>
constexpr int kHeldThreads = kTarget == Target::kAny || sizeof(S) == 8 ? 512 : 1024;

//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
// One block a cluster where kLanes is less than 512. The rows of input, grad and soft_target start at the
// same place modulo 16 bytes.
template <class S, Target kTarget, int kLanes, int kVectors>
__global__ void __launch_bounds__(HeldShape<kLanes>::kThreads,
                                  kHeldThreads<S, kTarget> / HeldShape<kLanes>::kThreads)
    held_rows_kernel(const __grid_constant__ Problem<AccumulateType<S>> problem) {
  using Acc = AccumulateType<S>;
  using Shape = HeldShape<kLanes>;
  constexpr bool kClusters = kLanes == 512;
  const unsigned blocks = kClusters ? cluster_size() : 1, rank = kClusters ? cluster_rank() : 0;
  const int lane = threadIdx.x % kLanes;
  const int64_t position = int64_t(blockIdx.x / blocks) * Shape::kRows + threadIdx.x / kLanes;
  if (position >= problem.positions) return;
  const S* const x =
      static_cast<const S*>(problem.input) + offset_of(problem, problem.input_strides, position);
  const Row<Acc> row = row_at<kTarget>(problem, position);
  Held<S, kTarget, kLanes, kVectors> held{
      problem, nullptr, held_span(x, int(problem.classes), rank, blocks), lane, int(problem.classes), {}};
  const bool leads = lane == 0 && rank == 0, known = softmax_is_known<kTarget>(problem);
  if (row.ignored) {  // alike for all threads of a row, so that none waits for another below
    if (leads) finish_row<kTarget>(problem, position, row, Softmax<Acc>::none(), Acc(0));
    if (problem.grad) held.store_zeros(grad_row<S>(problem, position));
    return;
  }
  if (blocks > 1 && !known) cluster_arrive();
  if (kTarget == Target::kAny && problem.soft_target)
    held.soft =
        static_cast<const S*>(problem.soft_target) + offset_of(problem, problem.soft_strides, position);
  held.load(x);
  // Before the merger, after which the gradient may overwrite it.
  const Acc x_y = leads && !known && has_class<kTarget>(row) ? Vector<S>::widen(x[row.y]) : Acc(0);
  Softmax<Acc> softmax = Softmax<Acc>::none();
  if (known) {
    softmax = known_softmax<kTarget>(problem, position);
  } else if constexpr (Shape::kWholeBlock) {
    softmax = merged_over_blocks<kSums<kTarget>, Shape::kWarps>(
        shared_memory<Softmax<Acc>>(), held.statistics(), problem.inverse_temperature);
  } else {
    constexpr unsigned kAll = kLanes == kWarp ? 0xffffffffu : (1u << (kLanes % kWarp)) - 1;
    const unsigned mask = kAll << (threadIdx.x % kWarp / kLanes * kLanes);
    softmax = merged_over_lanes<kSums<kTarget>, kLanes>(mask, held.statistics(), problem.inverse_temperature);
    __syncwarp(mask);
  }
  if (leads) finish_row<kTarget>(problem, position, row, softmax, x_y);
  if (problem.grad)
    held.store_gradient(grad_row<S>(problem, position), row,
                        slope_of<kTarget>(problem, position, row, softmax));
}

constexpr int kStreamThreads = 512;
constexpr int kStreamVectors = 4;  // 32 KiB in flight a block, whose neighbours load while it computes

// Blocks a multiprocessor, as many as spill nothing. Even one has as much in flight as covers the latency of
// its share of the bandwidth; the other computes meanwhile.
template <class S, Target kTarget>
constexpr int kStreamBlocks = kTarget == Target::kAny || sizeof(S) == 8 ? 1 : 2;

// A long row whose gradient nobody wants: nothing has to be held, so a block walks it and no cluster waits.
//   m = max x_c,  s = sum exp(x_c - m),  loss = log(s) sum t_c - sum t_c (x_c - m)    (z loss: problem.h)
template <class S, Target kTarget>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks<S, kTarget>)
    streamed_rows_kernel(const __grid_constant__ Problem<AccumulateType<S>> problem) {
  using Acc = AccumulateType<S>;
  constexpr int kPiece = kStreamThreads * kStreamVectors;
  const int64_t position = blockIdx.x;
  const int lane = threadIdx.x, classes = int(problem.classes);
  const S* const x =
      static_cast<const S*>(problem.input) + offset_of(problem, problem.input_strides, position);
  const Row<Acc> row = row_at<kTarget>(problem, position);
  Softmax<Acc> softmax = Softmax<Acc>::none();
  if (row.ignored) {
    if (lane == 0) finish_row<kTarget>(problem, position, row, softmax, Acc(0));
    return;
  }
  const HeldSpan whole = held_span(x, classes, 0, 1);
  Held<S, kTarget, kStreamThreads, kStreamVectors> held{problem, nullptr, whole, lane, classes, {}};
  if (kTarget == Target::kAny && problem.soft_target)
    held.soft =
        static_cast<const S*>(problem.soft_target) + offset_of(problem, problem.soft_strides, position);
  const Acc x_y = lane == 0 && has_class<kTarget>(row) ? Vector<S>::widen(x[row.y]) : Acc(0);
  for (int begin = 0; begin < whole.end; begin += kPiece) {
    held.span.begin = begin;
    held.span.end = begin + kPiece < whole.end ? begin + kPiece : whole.end;
    held.load(x);
    absorb<kSums<kTarget>>(&softmax, held.statistics(), problem.inverse_temperature);
  }
  softmax = merged_over_blocks<kSums<kTarget>, kStreamThreads / kWarp>(shared_memory<Softmax<Acc>>(), softmax,
                                                                       problem.inverse_temperature);
  if (lane == 0) finish_row<kTarget>(problem, position, row, softmax, x_y);
}

}  // namespace mbperf::cuda
