// The sums around the rows of cross entropy: the divisor of `mean`, the loss from the losses l_i of the rows,
// and the upstream gradient that scales a gradient taken in the forward pass. No atomics, nothing the host
// waits for.
#pragma once

#include "cuda/cross_entropy/row.cuh"

namespace mbperf::cuda {

constexpr int kSumThreads = 512;

// The terms of a sum: a pair for each i.
template <class Acc>
struct TargetWeights {
  const int64_t* target;
  const Acc* weight;
  int64_t classes, ignore_index;

  __device__ __forceinline__ Pair operator()(int64_t i) const {
    const int64_t y = target[i];
    if (y == ignore_index) return {0, 0};
    MBPERF_KERNEL_ASSERT(y >= 0 && y < classes);
    return {weight ? double(weight[y]) : 1.0, 1.0};
  }
};

template <class Acc>
struct Losses {
  const Acc* loss;

  __device__ __forceinline__ Pair operator()(int64_t i) const { return {double(loss[i]), 0}; }
};

struct Partials {
  const Pair* partial;

  __device__ __forceinline__ Pair operator()(int64_t i) const { return partial[i]; }
};

// The destinations of a sum.
struct ToTotals {
  Totals* totals;

  __device__ __forceinline__ void operator()(Pair sum) const {
    *totals = {sum.first, 1 / sum.first, sum.first / sum.second};
  }
};

struct ToLoss {
  LossSum of;

  __device__ __forceinline__ void operator()(Pair sum) const {
    const double loss = sum.first / (of.totals ? of.totals->denominator : of.denominator);
    switch (of.dtype) {
      case Dtype::kFloat32:
        *static_cast<float*>(of.loss) = float(loss);
        return;
      case Dtype::kFloat64:
        *static_cast<double*>(of.loss) = loss;
        return;
      case Dtype::kBFloat16:
        *static_cast<BFloat16*>(of.loss) = Vector<BFloat16>::narrow(float(loss));
        return;
      case Dtype::kFloat16:
        *static_cast<Float16*>(of.loss) = Vector<Float16>::narrow(float(loss));
        return;
    }
  }
};

//   loss = sum l_i / denominator,  denominator = sum w[y_i] over the positions that count
// Block b sums [b * chunk, (b + 1) * chunk); a grid of one hands its sum to `finish`, others leave partials.
template <class Source, class Finish>
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const Source source, int64_t n, int64_t chunk, Pair* partial, const Finish finish) {
  const int64_t begin = blockIdx.x * chunk, end = begin + chunk < n ? begin + chunk : n;
  Pair sum{0, 0};
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kSumThreads) {
    const Pair term = source(i);
    sum.first += term.first;
    sum.second += term.second;
  }
  sum = summed_over_block<kSumThreads>(shared_memory<Pair>(), sum);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    finish(sum);
  } else {
    partial[blockIdx.x] = sum;
  }
}

__device__ __forceinline__ double number_at(const void* p, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return *static_cast<const float*>(p);
    case Dtype::kFloat64:
      return *static_cast<const double*>(p);
    case Dtype::kBFloat16:
      return Vector<BFloat16>::widen(*static_cast<const BFloat16*>(p));
    case Dtype::kFloat16:
      return Vector<Float16>::widen(*static_cast<const Float16*>(p));
  }
  return 0;
}

constexpr int kScalingThreads = 256;

// grad *= upstream
template <class S>
__global__ void __launch_bounds__(kScalingThreads) scaling_kernel(const Scaling s) {
  using Acc = AccumulateType<S>;
  constexpr int E = Vector<S>::kSize;
  const int64_t thread = int64_t(blockIdx.x) * kScalingThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kScalingThreads;
  for (int64_t i = thread; s.target && i < s.positions; i += threads) {
    const int64_t y = s.target[i];
    MBPERF_KERNEL_ASSERT(y == s.ignore_index || (y >= 0 && y < s.classes));
  }
  const Acc upstream = Acc(number_at(s.upstream, s.upstream_dtype));
  if (upstream == 1) return;
  S* const grad = static_cast<S*>(s.grad);
  const int64_t head = int64_t(reinterpret_cast<uintptr_t>(grad) / sizeof(S) % E);
#pragma unroll 4
  for (int64_t i = thread * E - head; i < s.n; i += threads * E) {
    Acc g[E];
    Vector<S>::unpack(load_vector(grad, i, s.n), g);
#pragma unroll
    for (int e = 0; e < E; ++e) g[e] *= upstream;
    store_vector(grad, i, s.n, Vector<S>::pack(g));
  }
}

}  // namespace mbperf::cuda
