// Rows of bytes -> the rows of one batch, in parallel over the bytes of all fields together.
#include "cpu/collate/collate.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace mbperf {
namespace {

// Below this a second thread costs more than it brings: waking it takes some 5 us, the time of 100 KB.
constexpr int64_t kParallelBytes = 512 * 1024;

template <typename T>
void fill_elements(char* out, int64_t bytes, const char* element) {
  T value;
  std::memcpy(&value, element, sizeof(T));
  std::fill_n(reinterpret_cast<T*>(out), bytes / static_cast<int64_t>(sizeof(T)), value);
}

void fill_rest(char* out, int64_t bytes, const char* element, int64_t element_bytes) {
  switch (element_bytes) {
    case 1:
      return fill_elements<uint8_t>(out, bytes, element);
    case 2:
      return fill_elements<uint16_t>(out, bytes, element);
    case 4:
      return fill_elements<uint32_t>(out, bytes, element);
    case 8:
      return fill_elements<uint64_t>(out, bytes, element);
    default:
      for (; bytes > 0; out += element_bytes, bytes -= element_bytes)
        std::memcpy(out, element, static_cast<size_t>(element_bytes));
  }
}

template <typename T>
void copy_elements(const RowCopy& field, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) std::memcpy(field.out + k * sizeof(T), field.rows[k], sizeof(T));
}

void copy_equal_rows(const RowCopy& field, int64_t begin, int64_t end) {
  if (field.stride == 8) return copy_elements<uint64_t>(field, begin, end);
  if (field.stride == 4) return copy_elements<uint32_t>(field, begin, end);
  const auto bytes = static_cast<size_t>(field.stride);
  for (int64_t k = begin; k < end; ++k) std::memcpy(field.out + k * field.stride, field.rows[k], bytes);
}

void copy_ragged_rows(const RowCopy& field, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    char* out = field.out + (field.starts ? field.starts[k] : k * field.stride);
    const int64_t bytes = field.sizes[k];
    if (bytes) std::memcpy(out, field.rows[k], static_cast<size_t>(bytes));
    if (!field.starts && bytes < field.stride)
      fill_rest(out + bytes, field.stride - bytes, field.fill, field.fill_bytes);
  }
}

// The first row that starts at or after this byte of the field.
int64_t row_at(const RowCopy& field, int64_t byte) {
  if (field.starts) return std::lower_bound(field.starts, field.starts + field.n, byte) - field.starts;
  return std::min(field.n, (byte + field.stride - 1) / field.stride);
}

// The rows that start within bytes [begin, end) of all fields laid end to end.
void copy_range(const std::vector<RowCopy>& fields, int64_t begin, int64_t end) {
  int64_t base = 0;
  for (const RowCopy& field : fields) {
    const int64_t bytes = field.bytes();
    if (bytes && base < end && base + bytes > begin) {
      const int64_t first = row_at(field, std::max<int64_t>(begin - base, 0));
      const int64_t last = row_at(field, std::min(end - base, bytes));
      (field.sizes ? copy_ragged_rows : copy_equal_rows)(field, first, last);
    }
    base += bytes;
  }
}

}  // namespace

void copy_rows(const std::vector<RowCopy>& fields) {
  int64_t bytes = 0;
  for (const RowCopy& field : fields) bytes += field.bytes();
  if (bytes < kParallelBytes || at::get_num_threads() == 1) return copy_range(fields, 0, bytes);
  at::parallel_for(0, bytes, kParallelBytes / 2,
                   [&](int64_t begin, int64_t end) { copy_range(fields, begin, end); });
}

}  // namespace mbperf
