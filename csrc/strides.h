// The place of the element (position, class) of a tensor. Plain data, no torch: kernels include it too.
#pragma once

#include <cstdint>

namespace mbperf {

// Positions p = 0..positions-1 are numbered outer-major: element (p, c) of a tensor lies at
// (p / inner) * outer_stride + (p % inner) * inner_stride + c * class_stride, in elements.
struct Strides {
  int64_t outer, inner, classes;
};

}  // namespace mbperf
