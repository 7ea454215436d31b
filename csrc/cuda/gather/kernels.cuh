// Rows of a tensor (N, row) picked by index (B,) -> (B, row), as they are or as (row - mean) * scale in
// another dtype. The rows may lie in pinned host memory. No torch inside.
#pragma once

#include "cuda/chip.cuh"
#include "cuda/gather/problem.h"
#include "cuda/row_copy.cuh"

namespace mbperf::cuda {

// The row is checked before its address is formed.
inline __device__ const char* picked_row(const PickedRows& p, int64_t k) {
  const int64_t row = p.index[k];
  MBPERF_KERNEL_ASSERT(row >= 0 && row < p.rows);
  return p.input + row * p.row_stride_bytes;
}

template <typename Vector>
__global__ void __launch_bounds__(kRowThreads)
    pick_rows_kernel(PickedRows p, int64_t row_bytes, RowGrid grid) {
  for (int64_t k = first_row(grid); k < p.picked; k += row_step(grid))
    copy_row<Vector>(picked_row(p, k), p.out + k * row_bytes, row_bytes / int64_t(sizeof(Vector)), grid);
}

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T value[kWidth];
};

inline __device__ void store_as(float value, float& out) { out = value; }
inline __device__ void store_as(float value, BFloat16& out) { out = Vector<BFloat16>::narrow(value); }
inline __device__ void store_as(float value, Float16& out) { out = Vector<Float16>::narrow(value); }

// (x - mean) * scale is a difference and a product, which no compiler contracts: the bits are torch's.
template <typename In, typename Out, int kWidth>
__device__ Pack<Out, kWidth> converted(const Pack<In, kWidth>& in, uint32_t element,
                                       const ChannelScale& how) {
  Pack<Out, kWidth> out;
  uint32_t channel = 0, left = how.run;
  if (how.channels > 1) {
    channel = element / how.run % how.channels;
    left = how.run - element % how.run;
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    store_as((float(in.value[j]) - how.mean[channel]) * how.scale[channel], out.value[j]);
    if (how.channels > 1 && --left == 0) {
      left = how.run;
      channel = channel + 1 == how.channels ? 0 : channel + 1;
    }
  }
  return out;
}

// Rows of less than 2^31 elements.
template <typename In, typename Out, int kWidth>
__global__ void __launch_bounds__(kRowThreads)
    convert_rows_kernel(PickedRows p, int64_t row_elements, RowGrid grid,
                        const __grid_constant__ ChannelScale how) {
  const int64_t vectors = row_elements / kWidth, step = vector_step(grid);
  for (int64_t k = first_row(grid); k < p.picked; k += row_step(grid)) {
    const Pack<In, kWidth>* const in = vectors_at<Pack<In, kWidth>>(picked_row(p, k));
    Pack<Out, kWidth>* const out = vectors_at<Pack<Out, kWidth>>(p.out) + k * vectors;
    for (int64_t i = first_vector(grid); i < vectors; i += kRowLoads * step) {
      Pack<In, kWidth> loaded[kRowLoads];
#pragma unroll
      for (int u = 0; u < kRowLoads; ++u)
        if (i + u * step < vectors) loaded[u] = in[i + u * step];
#pragma unroll
      for (int u = 0; u < kRowLoads; ++u)
        if (i + u * step < vectors)
          out[i + u * step] = converted<In, Out, kWidth>(loaded[u], uint32_t(i + u * step) * kWidth, how);
    }
  }
}

}  // namespace mbperf::cuda
