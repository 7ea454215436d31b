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

}  // namespace mbperf::cuda
