// The launch that measures the memory limit.
#include "cuda/roof/kernels.cuh"

#include <algorithm>

namespace mbperf::cuda {

int launch_roof(const Roof& roof, Stream stream) {
  const int64_t most = std::max(roof.read, roof.written), chunk = int64_t{kRowThreads} * kRowLoads;
  const int64_t blocks = std::min<int64_t>((most + chunk - 1) / chunk, kMostBlocks);
  return blocks ? launch(roof_kernel, Grid{blocks, kRowThreads}, stream, roof) : 0;
}

}  // namespace mbperf::cuda
