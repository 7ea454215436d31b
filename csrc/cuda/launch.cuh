// Starts a kernel, as a grid of blocks or of clusters of blocks.
#pragma once

#include "cuda/chip.cuh"

namespace mbperf::cuda {

struct Grid {
  int64_t blocks;
  unsigned threads_x, threads_y = 1;
  int64_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks a cluster; divides `blocks`
};

constexpr int64_t kMostBlocks = 0x7fffffff;  // along x, of every chip

constexpr unsigned kPortableCluster = 8;  // of every chip that has clusters
constexpr unsigned kLargestCluster = 16;  // of some; a kernel has to ask for it

#ifdef __CUDACC__

inline cudaLaunchConfig_t configuration(const Grid& grid, Stream stream, cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {grid.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(grid.threads_x, grid.threads_y);
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = stream;
  config.attrs = cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return config;
}

template <class... P>
int launch(void (*kernel)(P...), const Grid& grid, Stream stream, const P&... arguments) {
  if (grid.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;  // 32 bits would hold another number
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = configuration(grid, stream, &cluster);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The largest cluster this kernel can be launched in on such blocks: 1 where its code was compiled for a chip
// without. More than the portable size depends on the chip, which is asked only where it matters.
template <class... P>
unsigned largest_cluster(void (*kernel)(P...), Grid grid, const Device& device, bool wants_most) {
  cudaFuncAttributes attributes;
  if (!device.has_clusters || cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess ||
      attributes.ptxVersion < 90)
    return 1;
  if (!wants_most) return kPortableCluster;
  grid.blocks = grid.cluster = kLargestCluster;
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = configuration(grid, nullptr, &cluster);
  int fitting = 0;
  const bool fits =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&fitting, kernel, &config) == cudaSuccess && fitting > 0;
  if (!fits) cudaGetLastError();  // a refusal is an answer, not an error for whoever asks next
  return fits ? kLargestCluster : kPortableCluster;
}

#else

template <class... P>
int launch(void (*kernel)(P...), const Grid& grid, Stream, const P&... arguments) {
  if (grid.blocks > kMostBlocks) return 1;
  return host_shim::run(
      {unsigned(grid.blocks), grid.threads_x, grid.threads_y, size_t(grid.shared_bytes), grid.cluster},
      [&] { kernel(arguments...); });
}

template <class... P>
unsigned largest_cluster(void (*)(P...), const Grid&, const Device& device, bool) {
  return device.has_clusters ? kLargestCluster : 1;
}

#endif

}  // namespace mbperf::cuda
