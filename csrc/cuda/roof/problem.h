// The arguments of the launch that measures the memory limit. Plain data, no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/stream.h"

namespace mbperf::cuda {

struct Bytes16;  // a vector of 16 bytes, in row_copy.cuh

struct Roof {
  const Bytes16* src;
  Bytes16* dst;
  int64_t read, written;  // vectors of 16 bytes
  uint32_t* never;        // written only if what is only read adds up to one value: no read can be left out
};

// Returns a cudaError_t; 0 is success.
int launch_roof(const Roof& roof, Stream stream);

}  // namespace mbperf::cuda
