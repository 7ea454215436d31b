// The memory limit of a GPU: moves given bytes in a given read:write mix and computes nothing. Shared bytes
// are copied; what is left of the larger side is only read (summed) or only written (zeros). No torch inside.
#pragma once

#include "cuda/roof/problem.h"
#include "cuda/row_copy.cuh"

namespace mbperf::cuda {

constexpr uint32_t kUnlikelySum = 0x9e3779b9u;

inline __device__ uint32_t sum_of(const Bytes16& v) { return v.word[0] + v.word[1] + v.word[2] + v.word[3]; }

// Consecutive blocks take consecutive chunks of kRowThreads * kRowLoads vectors.
__global__ void __launch_bounds__(kRowThreads) roof_kernel(Roof r) {
  const int64_t both = r.read < r.written ? r.read : r.written, most = r.read + r.written - both;
  const int64_t chunk = int64_t(kRowThreads) * kRowLoads;
  uint32_t sum = 0;
  for (int64_t base = int64_t(blockIdx.x) * chunk; base < most; base += int64_t(gridDim.x) * chunk) {
    Bytes16 v[kRowLoads];
#pragma unroll
    for (int u = 0; u < kRowLoads; ++u) {
      const int64_t i = base + int64_t(u) * kRowThreads + threadIdx.x;
      v[u] = i < r.read ? r.src[i] : Bytes16{};
    }
#pragma unroll
    for (int u = 0; u < kRowLoads; ++u) {
      const int64_t i = base + int64_t(u) * kRowThreads + threadIdx.x;
      if (i < r.written) r.dst[i] = v[u];
      if (i >= both && i < r.read) sum += sum_of(v[u]);
    }
  }
  if (sum == kUnlikelySum && r.never != nullptr) *r.never = sum;
}

}  // namespace mbperf::cuda
