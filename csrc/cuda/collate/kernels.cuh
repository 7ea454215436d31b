// Samples of equal size, anywhere on the device -> the rows of one batch, by a table of pointers. The table
// travels as a kernel parameter: nothing to stage, nothing to wait for, and a captured graph keeps its own.
#pragma once

#include "cuda/row_copy.cuh"

namespace mbperf::cuda {

// 448 pointers fit the 4 KiB of parameters that any launch takes cheaply; 4,000 the 32,764 bytes that
// CUDA 12.1 and later allow from sm_70 on. A larger batch takes one launch per 4,000 samples.
constexpr int kSmallTable = 448, kLargeTable = 4000;

template <int kPointers>
struct RowTable {
  const char* row[kPointers];
};

template <typename Vector, int kPointers>
__global__ void __launch_bounds__(kRowThreads)
    stack_rows_kernel(const __grid_constant__ RowTable<kPointers> table, int64_t count, char* out,
                      int64_t row_bytes, RowGrid grid) {
  for (int64_t k = first_row(grid); k < count; k += row_step(grid))
    copy_row<Vector>(table.row[k], out + k * row_bytes, row_bytes / int64_t(sizeof(Vector)), grid);
}

template <typename Vector, int kPointers>
int launch_table(const char* const* rows, int64_t count, char* out, int64_t row_bytes, Stream stream) {
  RowTable<kPointers> table{};
  std::copy_n(rows, count, table.row);
  const RowGrid grid = row_grid(count, row_bytes / int64_t(sizeof(Vector)));
  return launch(stack_rows_kernel<Vector, kPointers>, grid.grid(), stream, table, count, out, row_bytes,
                grid);
}

// rows: `count` addresses on the device, of row_bytes each -> out, one after the other. A cudaError_t.
inline int launch_stack(const char* const* rows, int64_t count, char* out, int64_t row_bytes, Stream stream) {
  uint64_t bits = reinterpret_cast<uint64_t>(out) | uint64_t(row_bytes);
  for (int64_t k = 0; k < count; ++k) bits |= reinterpret_cast<uint64_t>(rows[k]);
  return with_vector(vector_bytes(bits), [&](auto vector) {
    using Vector = decltype(vector);
    if (count <= kSmallTable) return launch_table<Vector, kSmallTable>(rows, count, out, row_bytes, stream);
    int error = 0;
    for (int64_t k = 0; k < count && !error; k += kLargeTable)
      error = launch_table<Vector, kLargeTable>(rows + k, std::min<int64_t>(kLargeTable, count - k),
                                                out + k * row_bytes, row_bytes, stream);
    return error;
  });
}

}  // namespace mbperf::cuda
