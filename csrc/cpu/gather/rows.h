// Kernels of gather that convert while they copy, one set per instruction set; no torch inside.
#pragma once

#include <cstdint>

#include "half.h"

namespace mbperf {

// Floats at a time: whole vectors, and too many for the compiler to unroll.
constexpr int64_t kConvertBlock = 64;

// out = (in - mean) * scale over n elements of one row. Elements come in runs: `run` neighbours share a
// channel, channels follow each other and start again (run = H * W for NCHW, 1 for NHWC, n for one channel).
struct Normalise {
  const float* mean;   // (channels,); where channels change with every element, kConvertBlock times over,
  const float* scale;  // so that whole vectors have their own mean and scale
  int64_t channels;
  int64_t run;

  bool interleaved() const { return run == 1 && channels > 1; }
};

template <typename In, typename Out>
using ConvertRow = void (*)(const In* in, Out* out, int64_t n, const Normalise& how);

struct ConvertKernels {
  ConvertRow<uint8_t, float> u8_f32;
  ConvertRow<uint8_t, BFloat16> u8_bf16;
  ConvertRow<uint8_t, Float16> u8_fp16;
  ConvertRow<float, float> f32_f32;
  ConvertRow<float, BFloat16> f32_bf16;
  ConvertRow<float, Float16> f32_fp16;
};

extern const ConvertKernels kConvertBaseline, kConvertAvx2, kConvertAvx512, kConvertNeon;

}  // namespace mbperf
