// Cross entropy by a running maximum m, to which s and the sums of t are rebased: rows staged in shared
// memory (few classes), threads along positions (strided classes, coalesced all the same), and a block a row
// for what no registers hold.
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

// Adds classes i, i + step, ... to the statistics: kLoads of them, loaded independently of each other.
template <Target kTarget, int kLoads, class Acc, class X, class Q>
__device__ __forceinline__ void add_classes(const Problem<Acc>& problem, const X& x, const Q& soft, int64_t i,
                                            int64_t step, Softmax<Acc>* softmax) {
  Acc v[kLoads], m = softmax->m;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) v[u] = x.get(i + u * step);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) m = larger(m, v[u]);
  rebase<kSums<kTarget>>(softmax, m, problem.inverse_temperature);
  const Acc centre = finite(m);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    add_exponential<kTarget>(problem, v[u] - centre, softmax);
    if constexpr (kSpread<kTarget>) {
      const Acc probability = soft.at ? soft.get(i + u * step) : Acc(0);
      const Acc t = t_of_class<kTarget>(problem, x.class_of(i + u * step), probability);
      softmax->tx_sum += t * (v[u] - centre);
      softmax->t_sum += t;
    }
  }
}

// Statistics of classes first, first + step, ...
template <Target kTarget, int kLoads, class Acc, class X, class Q>
__device__ __forceinline__ Softmax<Acc> online_softmax(const Problem<Acc>& problem, const X& x, const Q& soft,
                                                       int64_t first, int64_t step) {
  Softmax<Acc> softmax = Softmax<Acc>::none();
  int64_t i = first;
  for (; i + (kLoads - 1) * step < problem.classes; i += kLoads * step)
    add_classes<kTarget, kLoads>(problem, x, soft, i, step, &softmax);
  for (; i < problem.classes; i += step) add_classes<kTarget, 1>(problem, x, soft, i, step, &softmax);
  return softmax;
}

// Classes that a thread adds to one float: of 25,000 the rounding of a sum would reach its sixth digit.
constexpr int kStretch = 256;

// The same of all classes, a stretch at a time, where a thread may have thousands of them.
template <Target kTarget, int kLoads, class Acc, class X, class Q>
__device__ __forceinline__ Softmax<Acc> softmax_by_stretches(const Problem<Acc>& problem, const X& x,
                                                             const Q& soft, int64_t first, int64_t step) {
  if constexpr (sizeof(Acc) == 8) return online_softmax<kTarget, kLoads>(problem, x, soft, first, step);
  Softmax<Acc> all = Softmax<Acc>::none();
  int64_t i = first;
  while (i < problem.classes) {
    Softmax<Acc> stretch = Softmax<Acc>::none();
    int left = kStretch / kLoads;
    for (; left > 0 && i + (kLoads - 1) * step < problem.classes; --left, i += kLoads * step)
      add_classes<kTarget, kLoads>(problem, x, soft, i, step, &stretch);
    for (; left > 0 && i < problem.classes; i += step)
      add_classes<kTarget, 1>(problem, x, soft, i, step, &stretch);
    absorb<kSums<kTarget>>(&all, stretch, problem.inverse_temperature);
  }
  return all;
}

template <Target kTarget, int kLoads, class Acc, class X, class Q, class G>
__device__ __forceinline__ void set_gradients(const Problem<Acc>& problem, const X& x, const Q& soft,
                                              const G& grad, const Row<Acc>& row, const Slope<Acc>& slope,
                                              int64_t i, int64_t step) {
  Acc v[kLoads];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) v[u] = x.get(i + u * step);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const int64_t k = i + u * step, c = x.class_of(k);
    Acc g = gradient_of<kTarget>(problem, slope, v[u]);
    if constexpr (kSpread<kTarget>)
      g -= t_of_class<kTarget>(problem, c, soft.at ? soft.get(k) : Acc(0)) * slope.scale;
    if (c == row.y) g -= row.t_y * slope.scale;
    grad.set(k, g);
  }
}

// The gradient of the same classes, or zeros; x and grad may be the same place.
template <Target kTarget, int kLoads, class Acc, class X, class Q, class G>
__device__ __forceinline__ void online_gradient(const Problem<Acc>& problem, const X& x, const Q& soft,
                                                const G& grad, const Row<Acc>& row, const Slope<Acc>& slope,
                                                int64_t first, int64_t step) {
  int64_t i = first;
  if (row.ignored) {
    for (; i < problem.classes; i += step) grad.set(i, Acc(0));
    return;
  }
  for (; i + (kLoads - 1) * step < problem.classes; i += kLoads * step)
    set_gradients<kTarget, kLoads>(problem, x, soft, grad, row, slope, i, step);
  for (; i < problem.classes; i += step)
    set_gradients<kTarget, 1>(problem, x, soft, grad, row, slope, i, step);
}

template <class S, class Acc>
__device__ __forceinline__ Column<S> column_at(const Problem<Acc>& problem, const void* base,
                                               const Strides& strides, int64_t position) {
  S* const at = static_cast<S*>(const_cast<void*>(base));
  return {base ? at + offset_of(problem, strides, position) : nullptr, strides.classes};
}

// Double precision exponentials take a dozen registers each while they are interleaved.
template <class S, int kNarrow>
constexpr int kLoadsOf = sizeof(S) == 8 ? 2 : kNarrow;

constexpr int kTileThreads = 128;  // and rows
constexpr int kTileRowBytes = 128;

// Rows [first, first + count) between device memory and a tile of adjacent rows; 16 bytes at a time where
// they are adjacent in device memory as well.
template <bool kLoad, class S, class Acc>
__device__ __forceinline__ void move_tile(const Problem<Acc>& problem, void* base, const Strides& strides,
                                          int64_t first, int count, S* tile) {
  const int classes = int(problem.classes), n = count * classes;
  const Column<S> start = column_at<S>(problem, base, strides, first);
  const bool adjacent = problem.inner == problem.positions && strides.inner == classes &&
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
    S* const element =
        column_at<S>(problem, base, strides, first + r).at + (i - r * classes) * strides.classes;
    (kLoad ? tile[i] : *element) = kLoad ? *element : tile[i];
  }
}

// At most kTileRowBytes a row: a thread walks its row in shared memory, while device memory is read and
// written along whole lines.
//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
template <class S, Target kTarget>
__global__ void __launch_bounds__(kTileThreads, 6)
    tile_kernel(const __grid_constant__ Problem<AccumulateType<S>> problem) {
  using Acc = AccumulateType<S>;
  constexpr int kLoads = kLoadsOf<S, 4>;
  const int classes = int(problem.classes);
  S* const tile = shared_memory<S>();
  S* const soft_tile = problem.soft_target ? tile + kTileThreads * classes : nullptr;
  const int64_t first = int64_t(blockIdx.x) * kTileThreads;
  const int count = problem.positions - first < kTileThreads ? int(problem.positions - first) : kTileThreads;
  move_tile<true>(problem, const_cast<void*>(problem.input), problem.input_strides, first, count, tile);
  if (kTarget == Target::kAny && soft_tile)
    move_tile<true>(problem, const_cast<void*>(problem.soft_target), problem.soft_strides, first, count,
                    soft_tile);
  __syncthreads();
  const int r = threadIdx.x;
  if (r < count) {
    constexpr int kBank = sizeof(S) < 4 ? 4 : sizeof(S);
    const int start = classes * sizeof(S) % (2 * kBank) == 0 ? r % classes : 0;
    const StagedRow<S> x{tile + r * classes, start, classes},
        soft{soft_tile ? soft_tile + r * classes : nullptr, start, classes};
    const Row<Acc> row = row_at<kTarget>(problem, first + r);
    Softmax<Acc> softmax = Softmax<Acc>::none();
    if (!row.ignored)
      softmax = softmax_is_known<kTarget>(problem) ? known_softmax<kTarget>(problem, first + r)
                                                   : online_softmax<kTarget, kLoads>(problem, x, soft, 0, 1);
    const Acc x_y = row.y >= 0 ? Vector<S>::widen(x.at[row.y]) : Acc(0);
    finish_row<kTarget>(problem, first + r, row, softmax, x_y);
    if (problem.grad)
      online_gradient<kTarget, kLoads>(problem, x, soft, x, row,
                                       slope_of<kTarget>(problem, first + r, row, softmax), 0, 1);
  }
  if (!problem.grad) return;
  __syncthreads();
  move_tile<false>(problem, problem.grad, problem.grad_strides, first, count, tile);
}

constexpr int kPositionThreads = 256;

// Blocks a multiprocessor; 0 leaves it to the compiler, which has doubles beside an entropy spill on sm_90a.
template <class S>
constexpr int kPositionBlocks = sizeof(S) == 8 ? 2 : 0;

// blockDim.x neighbouring positions, the classes of each divided among blockDim.y threads.
//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
template <class S, Target kTarget>
__global__ void __launch_bounds__(kPositionThreads, kPositionBlocks<S>)
    positions_kernel(const __grid_constant__ Problem<AccumulateType<S>> problem) {
  using Acc = AccumulateType<S>;
  constexpr int kLoads = kLoadsOf<S, 4>;
  Softmax<Acc>* const slots = shared_memory<Softmax<Acc>>();
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool inside = position < problem.positions, known = softmax_is_known<kTarget>(problem);
  Row<Acc> row{-1, 0, true};
  if (inside) row = row_at<kTarget>(problem, position);
  const Column<S> x = column_at<S>(problem, problem.input, problem.input_strides, inside ? position : 0);
  const Column<S> soft =
      column_at<S>(problem, problem.soft_target, problem.soft_strides, inside ? position : 0);
  Softmax<Acc> softmax = Softmax<Acc>::none();
  if (!row.ignored)
    softmax = known ? known_softmax<kTarget>(problem, position)
                    : softmax_by_stretches<kTarget, kLoads>(problem, x, soft, threadIdx.y, blockDim.y);
  const bool leads = inside && threadIdx.y == 0;
  const Acc x_y = leads && !known && row.y >= 0 ? x.get(row.y) : Acc(0);
  if (blockDim.y > 1 && !known) {
    slots[threadIdx.y * blockDim.x + threadIdx.x] = softmax;
    __syncthreads();
    softmax = slots[threadIdx.x];
    for (unsigned k = 1; k < blockDim.y; ++k)
      absorb<kSums<kTarget>>(&softmax, slots[k * blockDim.x + threadIdx.x], problem.inverse_temperature);
  }
  if (leads) finish_row<kTarget>(problem, position, row, softmax, x_y);
  if (inside && problem.grad)
    online_gradient<kTarget, kLoads>(
        problem, x, soft, column_at<S>(problem, problem.grad, problem.grad_strides, position), row,
        slope_of<kTarget>(problem, position, row, softmax), threadIdx.y, blockDim.y);
}

constexpr int kLoopThreads = 512;

// A block a row of any length and layout; the gradient reads the row again, most of it from the cache.
//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
template <class S, Target kTarget>
__global__ void __launch_bounds__(kLoopThreads, sizeof(S) == 8 ? 1 : 2)
    looped_rows_kernel(const __grid_constant__ Problem<AccumulateType<S>> problem) {
  using Acc = AccumulateType<S>;
  constexpr int kLoads = kLoadsOf<S, 8>;
  const int64_t position = blockIdx.x;
  const bool known = softmax_is_known<kTarget>(problem);
  const Row<Acc> row = row_at<kTarget>(problem, position);
  const Column<S> x = column_at<S>(problem, problem.input, problem.input_strides, position);
  const Column<S> soft = column_at<S>(problem, problem.soft_target, problem.soft_strides, position);
  const bool leads = threadIdx.x == 0;
  const Acc x_y = leads && !known && row.y >= 0 ? x.get(row.y) : Acc(0);
  Softmax<Acc> softmax = Softmax<Acc>::none();
  if (!row.ignored) {
    softmax = known ? known_softmax<kTarget>(problem, position)
                    : merged_over_blocks<kSums<kTarget>, kLoopThreads / kWarp>(
                          shared_memory<Softmax<Acc>>(),
                          online_softmax<kTarget, kLoads>(problem, x, soft, threadIdx.x, kLoopThreads),
                          problem.inverse_temperature);
  }
  if (leads) finish_row<kTarget>(problem, position, row, softmax, x_y);
  if (problem.grad)
    online_gradient<kTarget, kLoads>(
        problem, x, soft, column_at<S>(problem, problem.grad, problem.grad_strides, position), row,
        slope_of<kTarget>(problem, position, row, softmax), threadIdx.x, kLoopThreads);
}

}  // namespace mbperf::cuda
