// Copies of rows of bytes by vectors: what gather and collate share on the device. No torch inside.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"

namespace mbperf::cuda {

constexpr int kRowThreads = 256;  // of a block
constexpr int kRowLoads = 4;      // vectors a thread has in flight before it stores the first

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// A block is `lanes` threads along a row times `rows` rows; `pieces` neighbouring blocks share their rows.
struct RowGrid {
  uint32_t lanes, rows;
  uint32_t row_blocks, pieces;

  Grid grid() const { return {int64_t(row_blocks) * pieces, lanes, rows}; }
};

// Short rows share a warp; a long row is cut into pieces, so that few long rows fill the device as well.
inline RowGrid row_grid(int64_t count, int64_t vectors) {
  constexpr int64_t kMostPieces = 65536;
  const int64_t wanted = vectors <= 32 ? vectors : (vectors + kRowLoads - 1) / kRowLoads;
  uint32_t lanes = vectors <= 32 ? 1 : 32;
  while (lanes < kRowThreads && lanes < wanted) lanes *= 2;
  const uint32_t rows = kRowThreads / lanes;
  const int64_t pieces =
      std::min(std::max<int64_t>(1, (vectors + lanes * kRowLoads - 1) / (lanes * kRowLoads)), kMostPieces);
  return {lanes, rows, uint32_t(std::min((count + rows - 1) / rows, kMostBlocks / pieces)), uint32_t(pieces)};
}

// The widest power of two, at most 16 bytes, that divides every address and length or'ed into `bits`.
inline int vector_bytes(uint64_t bits) {
  int bytes = 16;
  while (bits & uint64_t(bytes - 1)) bytes /= 2;
  return bytes;
}

// Calls `run` with a zero of the type that this many bytes are copied by.
template <typename Run>
int with_vector(int bytes, const Run& run) {
  switch (bytes) {
    case 16:
      return run(Bytes16{});
    case 8:
      return run(uint64_t{});
    case 4:
      return run(uint32_t{});
    case 2:
      return run(uint16_t{});
    default:
      return run(uint8_t{});
  }
}

// This thread's first vector of a row, and how far on its next one is.
inline __device__ int64_t first_vector(const RowGrid& grid) {
  return int64_t(blockIdx.x % grid.pieces) * grid.lanes + threadIdx.x;
}
inline __device__ int64_t vector_step(const RowGrid& grid) { return int64_t(grid.pieces) * grid.lanes; }

// This thread's first row, and how far on its next one is.
inline __device__ int64_t first_row(const RowGrid& grid) {
  return int64_t(blockIdx.x / grid.pieces) * grid.rows + threadIdx.y;
}
inline __device__ int64_t row_step(const RowGrid& grid) { return int64_t(grid.row_blocks) * grid.rows; }

// An address as that of vectors. A chip refuses a misaligned one; on the CPU it would pass unseen.
template <typename Vector>
__device__ __forceinline__ Vector* vectors_at(const char* at) {
#ifndef __CUDACC__
  MBPERF_KERNEL_ASSERT(reinterpret_cast<uint64_t>(at) % alignof(Vector) == 0);
#endif
  return reinterpret_cast<Vector*>(const_cast<char*>(at));
}

// One row, by the threads of this block and of its neighbours along the row.
template <typename Vector>
__device__ void copy_row(const char* from, char* to, int64_t vectors, const RowGrid& grid) {
  const Vector* const in = vectors_at<Vector>(from);
  Vector* const out = vectors_at<Vector>(to);
  const int64_t step = vector_step(grid);
  for (int64_t i = first_vector(grid); i < vectors; i += kRowLoads * step) {
    Vector loaded[kRowLoads];
#pragma unroll
    for (int u = 0; u < kRowLoads; ++u)
      if (i + u * step < vectors) loaded[u] = in[i + u * step];
#pragma unroll
    for (int u = 0; u < kRowLoads; ++u)
      if (i + u * step < vectors) out[i + u * step] = loaded[u];
  }
}

}  // namespace mbperf::cuda
