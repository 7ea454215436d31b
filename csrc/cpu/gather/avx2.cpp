// Converting kernels of gather for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "cpu/gather/rows.h"

#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)

namespace mbperf {
namespace {

#include "cpu/simd/avx2-inl.h"

#include "cpu/gather/rows-inl.h"

}  // namespace

const ConvertKernels kConvertAvx2 = kKernels;

}  // namespace mbperf

#pragma clang attribute pop
#endif
