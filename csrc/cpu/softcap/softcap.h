// The soft cap of logits, y = cap tanh(x / cap), and its way back, dx = dy (1 - (y / cap)^2), along lines of
// elements. Plain data, no torch, no STL: the files that include it, one an instruction set, emit no weak
// symbols.
#pragma once

#include <cstdint>

#include "half.h"

namespace mbperf {

// A line of elements that lie `stride` apart.
template <class Pointer>
struct Line {
  Pointer first;
  int64_t stride;
};

// The kernels of one dtype of x and dx; y and dy are in the type that logits are accumulated in, dy and the
// result of `cap` without gaps.
template <class Acc>
struct SoftcapDtype {
  void (*cap)(Line<const void*> x, Acc* y, int64_t n, Acc cap);
  // 0 where dy is 0, whatever y is there; `streaming`: past the caches wherever dx has no gaps.
  void (*differentiate)(const Acc* dy, Line<const Acc*> y, Line<void*> dx, int64_t n, Acc cap,
                        bool streaming);
};

struct SoftcapKernels {
  SoftcapDtype<float> float32, bfloat16, float16;
  SoftcapDtype<double> float64;
};

extern const SoftcapKernels kSoftcapBaseline;
extern const SoftcapKernels kSoftcapAvx2;
extern const SoftcapKernels kSoftcapAvx512;
extern const SoftcapKernels kSoftcapNeon;

}  // namespace mbperf
