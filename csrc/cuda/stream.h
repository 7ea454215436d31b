// The stream that a kernel is launched on, for headers that include neither torch nor CUDA.
#pragma once

struct CUstream_st;

namespace mbperf::cuda {

using Stream = CUstream_st*;

}  // namespace mbperf::cuda
