// The copy at the end of collate: rows of bytes from anywhere -> the rows of one batch. No Python, no types.
#pragma once

#include <cstdint>
#include <vector>

namespace mbperf {

// One field of the batch. Row k is `sizes[k]` bytes (`stride` where sizes is null) and goes to byte
// k * stride of `out` (`starts[k]` where starts is given); what is left of its stride is filled.
struct RowCopy {
  char* out;
  const char* const* rows;
  int64_t n;
  int64_t stride;
  const int64_t* sizes = nullptr;
  const int64_t* starts = nullptr;  // n + 1 offsets
  const char* fill = nullptr;       // one element
  int64_t fill_bytes = 0;

  int64_t bytes() const { return starts ? starts[n] : n * stride; }
};

// Copies every field, in parallel over bytes where there are enough of them.
void copy_rows(const std::vector<RowCopy>& fields);

}  // namespace mbperf
