// Copies of rows of bytes by vectors: what gather and collate share on the device. No torch inside.
#pragma once

#include <cstdint>

namespace mbperf::cuda {

constexpr int kRowThreads = 256;  // of a block
constexpr int kRowLoads = 4;      // vectors a thread has in flight before it stores the first

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// A block is `lanes` threads along a row times `rows` rows; the grid is rows times pieces of a row.
struct RowGrid {
  unsigned lanes, rows;
  unsigned row_blocks, pieces;
};

// Short rows share a warp; a long row is cut into pieces, so that few long rows fill the device as well.
inline RowGrid row_grid(int64_t count, int64_t vectors) {
  constexpr int64_t kMostBlocks = 0x7fffffff, kMostPieces = 65535;
  const int64_t wanted = vectors <= 32 ? vectors : (vectors + kRowLoads - 1) / kRowLoads;
  unsigned lanes = vectors <= 32 ? 1 : 32;
  while (lanes < kRowThreads && lanes < wanted) lanes *= 2;
  const unsigned rows = kRowThreads / lanes;
  const int64_t row_blocks = (count + rows - 1) / rows;
  const int64_t pieces = (vectors + lanes * kRowLoads - 1) / (lanes * kRowLoads);
  return {lanes, rows, unsigned(row_blocks < kMostBlocks ? row_blocks : kMostBlocks),
          unsigned(pieces < 1             ? 1
                   : pieces < kMostPieces ? pieces
                                          : kMostPieces)};
}

// The widest power of two, at most 16 bytes, that divides every address and length or'ed into `bits`.
inline int vector_bytes(uint64_t bits) {
  int bytes = 16;
  while (bits & uint64_t(bytes - 1)) bytes /= 2;
  return bytes;
}

// This thread's first vector of a row, and how far on its next one is.
inline __device__ int64_t first_vector() { return int64_t(blockIdx.y) * blockDim.x + threadIdx.x; }
inline __device__ int64_t vector_step() { return int64_t(gridDim.y) * blockDim.x; }

// This thread's first row, and how far on its next one is.
inline __device__ int64_t first_row() { return int64_t(blockIdx.x) * blockDim.y + threadIdx.y; }
inline __device__ int64_t row_step() { return int64_t(gridDim.x) * blockDim.y; }

// One row, by the threads of this block and of its neighbours along the row.
template <typename Vector>
__device__ void copy_row(const char* from, char* to, int64_t vectors) {
  const auto* const in = reinterpret_cast<const Vector*>(from);
  auto* const out = reinterpret_cast<Vector*>(to);
  const int64_t step = vector_step();
  for (int64_t i = first_vector(); i < vectors; i += kRowLoads * step) {
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
