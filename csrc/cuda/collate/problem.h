// The launch of collate. No torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace mbperf::cuda {

// rows: `count` addresses on the device, of row_bytes each -> out, one after the other. Returns a
// cudaError_t; 0 is success.
int launch_stack(const char* const* rows, int64_t count, char* out, int64_t row_bytes, Stream stream);

}  // namespace mbperf::cuda
