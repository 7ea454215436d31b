// Cross entropy by a running maximum: rows staged in shared memory (few classes), threads along positions
// (strided classes, coalesced all the same), and a block a row for what no registers hold.
#pragma once

#include "cuda/cross_entropy/row.cuh"

namespace mbperf::cuda {

// Logits of one position in device memory, `stride` apart.
template <class S>
struct Column {
  S* at;
  int64_t stride;

  __device__ __forceinline__ int64_t class_of(int64_t i) const { return i; }
  __device__ __forceinline__ AccumulateType<S> get(int64_t i) const {
    return Vector<S>::widen(at[i * stride]);
  }
  __device__ __forceinline__ void set(int64_t i, AccumulateType<S> v) const {
    at[i * stride] = Vector<S>::narrow(v);
  }
};

// A row in shared memory, walked from class `start` on and round: rows of an even number of words would
// otherwise have the threads of a warp meet in the same banks.
template <class S>
struct StagedRow {
  S* at;
  int start, classes;

  __device__ __forceinline__ int64_t class_of(int64_t i) const {
    const int c = int(i) + start;
    return c < classes ? c : c - classes;
  }
  __device__ __forceinline__ AccumulateType<S> get(int64_t i) const {
    return Vector<S>::widen(at[class_of(i)]);
  }
  __device__ __forceinline__ void set(int64_t i, AccumulateType<S> v) const {
    at[class_of(i)] = Vector<S>::narrow(v);
  }
};

// Adds classes i, i + step, ... to s: kLoads of them, loaded independently of each other.
template <Target kTarget, int kLoads, class Acc, class X, class Q>
__device__ __forceinline__ void add_classes(const Problem<Acc>& p, const X& x, const Q& soft, int64_t i,
                                            int64_t step, Softmax<Acc>* s) {
  Acc v[kLoads], max = s->max;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) v[u] = x.get(i + u * step);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) max = larger(max, v[u]);
  rebase<kSpread<kTarget>>(s, max);
  const Acc centre = finite(max);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    s->sum += exp_of(v[u] - centre);
    if constexpr (kSpread<kTarget>) {
      const Acc share = soft.at ? soft.get(i + u * step) : Acc(0);
      const Acc q = spread_share<kTarget>(p, x.class_of(i + u * step), share);
      s->linear += q * (v[u] - centre);
      s->mass += q;
    }
  }
}

// Statistics of classes first, first + step, ...
template <Target kTarget, int kLoads, class Acc, class X, class Q>
__device__ __forceinline__ Softmax<Acc> online_softmax(const Problem<Acc>& p, const X& x, const Q& soft,
                                                       int64_t first, int64_t step) {
  Softmax<Acc> s = Softmax<Acc>::none();
  int64_t i = first;
  for (; i + (kLoads - 1) * step < p.classes; i += kLoads * step)
    add_classes<kTarget, kLoads>(p, x, soft, i, step, &s);
  for (; i < p.classes; i += step) add_classes<kTarget, 1>(p, x, soft, i, step, &s);
  return s;
}

template <Target kTarget, int kLoads, class Acc, class X, class Q, class G>
__device__ __forceinline__ void set_gradients(const Problem<Acc>& p, const X& x, const Q& soft, const G& grad,
                                              const Row<Acc>& row, const Slope<Acc>& slope, int64_t i,
                                              int64_t step) {
  Acc v[kLoads];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) v[u] = x.get(i + u * step);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const int64_t k = i + u * step, c = x.class_of(k);
    Acc g = exp_of(v[u] - slope.centre) * slope.factor;
    if constexpr (kSpread<kTarget>)
      g -= spread_share<kTarget>(p, c, soft.at ? soft.get(k) : Acc(0)) * slope.scale;
    if (c == row.y) g -= row.hard * slope.scale;
    grad.set(k, g);
  }
}

// The gradient of the same classes, or zeros; x and grad may be the same place.
template <Target kTarget, int kLoads, class Acc, class X, class Q, class G>
__device__ __forceinline__ void online_gradient(const Problem<Acc>& p, const X& x, const Q& soft,
                                                const G& grad, const Row<Acc>& row, const Slope<Acc>& slope,
                                                int64_t first, int64_t step) {
  int64_t i = first;
  if (row.ignored) {
    for (; i < p.classes; i += step) grad.set(i, Acc(0));
    return;
  }
  for (; i + (kLoads - 1) * step < p.classes; i += kLoads * step)
    set_gradients<kTarget, kLoads>(p, x, soft, grad, row, slope, i, step);
  for (; i < p.classes; i += step) set_gradients<kTarget, 1>(p, x, soft, grad, row, slope, i, step);
}

template <class S, class Acc>
__device__ __forceinline__ Column<S> column_at(const Problem<Acc>& p, const void* base,
                                               const Strides& strides, int64_t position) {
  S* const at = static_cast<S*>(const_cast<void*>(base));
  return {base ? at + offset_of(p, strides, position) : nullptr, strides.classes};
}

// Double precision exponentials take a dozen registers each while they are interleaved.
template <class S, int kNarrow>
constexpr int kLoadsOf = sizeof(S) == 8 ? 2 : kNarrow;

constexpr int kTileThreads = 128;  // and rows
constexpr int kTileRowBytes = 128;

// Rows [first, first + count) between device memory and a tile of adjacent rows; 16 bytes at a time where
// they are adjacent in device memory as well.
template <bool kLoad, class S, class Acc>
__device__ __forceinline__ void move_tile(const Problem<Acc>& p, void* base, const Strides& strides,
                                          int64_t first, int count, S* tile) {
  const int classes = int(p.classes), n = count * classes;
  const Column<S> start = column_at<S>(p, base, strides, first);
  const bool adjacent = p.inner == p.positions && strides.inner == classes &&
                        (strides.classes == 1 || classes == 1) &&
                        reinterpret_cast<uintptr_t>(start.at) % 16 == 0;
  const int vectors = adjacent ? n / Vector<S>::kSize : 0;
  uint4* const device = reinterpret_cast<uint4*>(start.at);
  uint4* const shared = reinterpret_cast<uint4*>(tile);
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += kTileThreads)
    (kLoad ? shared : device)[i] = (kLoad ? device : shared)[i];
  for (int i = vectors * Vector<S>::kSize + threadIdx.x; i < n; i += kTileThreads) {
    const int r = i / classes;
    S* const element = column_at<S>(p, base, strides, first + r).at + (i - r * classes) * strides.classes;
    (kLoad ? tile[i] : *element) = kLoad ? *element : tile[i];
  }
}

// At most kTileRowBytes a row: a thread a row, walked in shared memory, that device memory is read and
// written along.
template <class S, Target kTarget>
__global__ void __launch_bounds__(kTileThreads, 6)
    tile_kernel(const __grid_constant__ Problem<AccumulateType<S>> p) {
  using Acc = AccumulateType<S>;
  constexpr int kLoads = kLoadsOf<S, 4>;
  const int classes = int(p.classes);
  S* const tile = shared_memory<S>();
  S* const soft_tile = p.soft_target ? tile + kTileThreads * classes : nullptr;
  const int64_t first = int64_t(blockIdx.x) * kTileThreads;
  const int count = p.positions - first < kTileThreads ? int(p.positions - first) : kTileThreads;
  move_tile<true>(p, const_cast<void*>(p.input), p.input_strides, first, count, tile);
  if (kTarget == Target::kAny && soft_tile)
    move_tile<true>(p, const_cast<void*>(p.soft_target), p.soft_strides, first, count, soft_tile);
  __syncthreads();
  const int r = threadIdx.x;
  if (r < count) {
    constexpr int kBank = sizeof(S) < 4 ? 4 : sizeof(S);
    const int start = classes * sizeof(S) % (2 * kBank) == 0 ? r % classes : 0;
    const StagedRow<S> x{tile + r * classes, start, classes},
        soft{soft_tile ? soft_tile + r * classes : nullptr, start, classes};
    const Row<Acc> row = row_at<kTarget>(p, first + r);
    Softmax<Acc> s = Softmax<Acc>::none();
    if (!row.ignored) s = online_softmax<kTarget, kLoads>(p, x, soft, 0, 1);
    const Acc at_target = row.y >= 0 ? Vector<S>::widen(x.at[row.y]) : Acc(0);
    finish_row<kTarget>(p, first + r, row, s, at_target);
    if (p.grad) online_gradient<kTarget, kLoads>(p, x, soft, x, row, slope_of(p, first + r, row, s), 0, 1);
  }
  if (!p.grad) return;
  __syncthreads();
  move_tile<false>(p, p.grad, p.grad_strides, first, count, tile);
}

constexpr int kPositionThreads = 256;

// blockDim.x neighbouring positions, the classes of each shared by blockDim.y threads.
template <class S, Target kTarget>
__global__ void __launch_bounds__(kPositionThreads)
    positions_kernel(const __grid_constant__ Problem<AccumulateType<S>> p) {
  using Acc = AccumulateType<S>;
  constexpr int kLoads = kLoadsOf<S, 4>;
  Softmax<Acc>* const slots = shared_memory<Softmax<Acc>>();
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool inside = position < p.positions, known = softmax_is_known<kTarget>(p);
  Row<Acc> row{-1, 0, true};
  if (inside) row = row_at<kTarget>(p, position);
  const Column<S> x = column_at<S>(p, p.input, p.input_strides, inside ? position : 0);
  const Column<S> soft = column_at<S>(p, p.soft_target, p.soft_strides, inside ? position : 0);
  Softmax<Acc> s = Softmax<Acc>::none();
  if (!row.ignored)
    s = known ? known_softmax(p, position)
              : online_softmax<kTarget, kLoads>(p, x, soft, threadIdx.y, blockDim.y);
  const bool leads = inside && threadIdx.y == 0;
  const Acc at_target = leads && row.y >= 0 ? x.get(row.y) : Acc(0);
  if (blockDim.y > 1 && !known) {
    slots[threadIdx.y * blockDim.x + threadIdx.x] = s;
    __syncthreads();
    s = slots[threadIdx.x];
    for (unsigned k = 1; k < blockDim.y; ++k)
      absorb<kSpread<kTarget>>(&s, slots[k * blockDim.x + threadIdx.x]);
  }
  if (leads) finish_row<kTarget>(p, position, row, s, at_target);
  if (inside && p.grad)
    online_gradient<kTarget, kLoads>(p, x, soft, column_at<S>(p, p.grad, p.grad_strides, position), row,
                                     slope_of(p, position, row, s), threadIdx.y, blockDim.y);
}

constexpr int kLoopThreads = 512;

// A block a row of any length and layout; the gradient reads the row again, most of it from the cache.
template <class S, Target kTarget>
__global__ void __launch_bounds__(kLoopThreads, sizeof(S) == 8 ? 1 : 2)
    looped_rows_kernel(const __grid_constant__ Problem<AccumulateType<S>> p) {
  using Acc = AccumulateType<S>;
  constexpr int kLoads = kLoadsOf<S, 8>;
  const int64_t position = blockIdx.x;
  const bool known = softmax_is_known<kTarget>(p);
  const Row<Acc> row = row_at<kTarget>(p, position);
  const Column<S> x = column_at<S>(p, p.input, p.input_strides, position);
  const Column<S> soft = column_at<S>(p, p.soft_target, p.soft_strides, position);
  const bool leads = threadIdx.x == 0;
  const Acc at_target = leads && row.y >= 0 ? x.get(row.y) : Acc(0);
  Softmax<Acc> s = Softmax<Acc>::none();
  if (!row.ignored) {
    s = known ? known_softmax(p, position)
              : merged_over_blocks<kSpread<kTarget>, kLoopThreads / kWarp>(
                    shared_memory<Softmax<Acc>>(),
                    online_softmax<kTarget, kLoads>(p, x, soft, threadIdx.x, kLoopThreads));
  }
  if (leads) finish_row<kTarget>(p, position, row, s, at_target);
  if (p.grad)
    online_gradient<kTarget, kLoads>(p, x, soft, column_at<S>(p, p.grad, p.grad_strides, position), row,
                                     slope_of(p, position, row, s), threadIdx.x, kLoopThreads);
}

}  // namespace mbperf::cuda
