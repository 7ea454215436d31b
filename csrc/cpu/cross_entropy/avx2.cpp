// Row kernels for AVX2 with FMA and F16C (what ATen asks of its AVX2 level).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "cpu/cross_entropy/path.h"

#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)

namespace mbperf {
namespace {

#include "cpu/simd/avx2-inl.h"

constexpr bool kOfStats = false;
#include "cpu/cross_entropy/kernels-inl.h"

}  // namespace

const RowKernels kRowsAvx2 = table();

}  // namespace mbperf

#pragma clang attribute pop
#endif
