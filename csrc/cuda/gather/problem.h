// The arguments of the launches of gather. Plain data, no torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "half.h"

namespace mbperf::cuda {

struct PickedRows {
  const char* input;
  int64_t rows, row_stride_bytes;
  const int64_t* index;
  int64_t picked;
  char* out;
};

// As a kernel parameter: one copy to the device less, and every stream and captured graph has its own.
// Elements come in runs: `run` neighbours share a channel, channels follow each other and start again.
constexpr int kMostChannels = 256;
struct ChannelScale {
  float mean[kMostChannels];
  float scale[kMostChannels];
  uint32_t channels;
  uint32_t run;
};

// Both return a cudaError_t; 0 is success.
int launch_pick(const PickedRows& p, int64_t row_bytes, Stream stream);
// Rows of `row` elements, less than 2^31. Instantiated from uint8_t and float to float, BFloat16 and Float16,
// in kernels.cu.
template <typename In, typename Out>
int launch_convert(const PickedRows& p, int64_t row, const ChannelScale& how, Stream stream);

}  // namespace mbperf::cuda
