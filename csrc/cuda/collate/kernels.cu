// The launch of collate: the widest vectors that all rows allow, and the smallest table that holds them.
#include "cuda/collate/kernels.cuh"

#include <algorithm>

#include "cuda/collate/problem.h"

namespace mbperf::cuda {
namespace {

template <typename Vector, int kPointers>
int launch_table(const char* const* rows, int64_t count, char* out, int64_t row_bytes, Stream stream) {
  RowTable<kPointers> table{};
  std::copy_n(rows, count, table.row);
  const RowGrid grid = row_grid(count, row_bytes / int64_t(sizeof(Vector)));
  return launch(stack_rows_kernel<Vector, kPointers>, grid.grid(), stream, table, count, out, row_bytes,
                grid);
}

}  // namespace

int launch_stack(const char* const* rows, int64_t count, char* out, int64_t row_bytes, Stream stream) {
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
