// Large result buffers: on huge pages, and used again.
#pragma once

#include <ATen/ATen.h>

namespace mbperf {

// at::empty for results that a loop makes anew in every step. A large buffer lies on huge pages, and when
// its tensor is freed it waits for the next one of its size: the kernel's clearing of 64 MB of fresh pages
// takes longer than writing a gradient there. While it waits the kernel may take its pages back
// (MADV_FREE), so that it never stands in the way of other memory.
at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace mbperf
