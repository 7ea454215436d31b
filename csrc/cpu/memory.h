// Large result buffers: on huge pages, and used again.
#pragma once

#include <ATen/ATen.h>

namespace mbperf {

// at::empty for results that a loop makes anew in every step. When the tensor of a large buffer is freed,
// the buffer waits for the next one of its size: the kernel's clearing of 64 MB of fresh pages takes longer
// than writing a gradient there. From 4 MB on it lies on huge pages. At most four buffers wait; beyond 256 MB
// together the kernel may take them back (MADV_FREE), so that they do not stand in the way of other memory.
at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype,
                          at::MemoryFormat format = at::MemoryFormat::Contiguous);

}  // namespace mbperf
