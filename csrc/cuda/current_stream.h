// Torch's current stream as launches take it, and what they return as torch raises it. For host files alone.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/stream.h"

namespace mbperf::cuda {

inline Stream stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline void check(int code) { C10_CUDA_CHECK(static_cast<cudaError_t>(code)); }

}  // namespace mbperf::cuda
