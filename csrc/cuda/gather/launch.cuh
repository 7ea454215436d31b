// Launches of gather: the widest vectors that the rows and their addresses allow. No torch inside.
#pragma once

#include "cuda/gather/kernels.cuh"

namespace mbperf::cuda {

// The addresses of the rows or'ed together: the lowest bit that is set bounds the vectors.
inline uint64_t start_bits(const PickedRows& p) {
  return reinterpret_cast<uint64_t>(p.input) | uint64_t(p.row_stride_bytes);
}

// A cudaError_t, as every launch here.
inline int launch_pick(const PickedRows& p, int64_t row_bytes, Stream stream) {
  const uint64_t bits = start_bits(p) | reinterpret_cast<uint64_t>(p.out) | uint64_t(row_bytes);
  return with_vector(vector_bytes(bits), [&](auto vector) {
    using Vector = decltype(vector);
    const RowGrid grid = row_grid(p.picked, row_bytes / int64_t(sizeof(Vector)));
    return launch(pick_rows_kernel<Vector>, grid.grid(), stream, p, row_bytes, grid);
  });
}

template <typename In, typename Out, int kWidth>
int launch_convert_by(const PickedRows& p, int64_t row, const ChannelScale& how, Stream stream) {
  const bool fits = start_bits(p) % (sizeof(In) * kWidth) == 0 && row % kWidth == 0 &&
                    reinterpret_cast<uint64_t>(p.out) % (sizeof(Out) * kWidth) == 0;
  if constexpr (kWidth > 1) {
    if (!fits) return launch_convert_by<In, Out, kWidth / 2>(p, row, how, stream);
  }
  const RowGrid grid = row_grid(p.picked, row / kWidth);
  return launch(convert_rows_kernel<In, Out, kWidth>, grid.grid(), stream, p, row, grid, how);
}

// Rows of `row` elements, less than 2^31.
template <typename In, typename Out>
int launch_convert(const PickedRows& p, int64_t row, const ChannelScale& how, Stream stream) {
  return launch_convert_by<In, Out, 16 / int(std::max(sizeof(In), sizeof(Out)))>(p, row, how, stream);
}

}  // namespace mbperf::cuda
