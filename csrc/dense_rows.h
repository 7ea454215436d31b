// Whether rows can be copied or converted as plain runs of elements.
#pragma once

#include <ATen/core/Tensor.h>

namespace mbperf {

// A row of both is one dense block with its elements in the same order. `out` has elements.
inline bool same_dense_rows(const at::Tensor& input, const at::Tensor& out) {
  if (input.sizes().slice(1) != out.sizes().slice(1)) return false;
  const int64_t row = c10::multiply_integers(out.sizes().slice(1));
  int64_t extent = 1;
  for (int64_t d = 1; d < out.dim(); ++d) {
    if (out.size(d) > 1 && input.stride(d) != out.stride(d)) return false;
    extent += (out.size(d) - 1) * out.stride(d);
  }
  return extent == row && (out.size(0) < 2 || out.stride(0) == row);
}

}  // namespace mbperf
