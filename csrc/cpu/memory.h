// Large fresh buffers on huge pages.
#pragma once

#include <ATen/ATen.h>

namespace mbperf {

// at::empty whose pages, where the buffer is large, are asked to be huge: on 64 MB the 16,000 faults of
// 4 KiB pages take longer than writing the data.
at::Tensor empty_on_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options);

// Bytes of the last level of cache, or an assumed 32 MiB where the system does not say.
int64_t last_cache_bytes();

}  // namespace mbperf
