// Converting kernels of gather for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include <immintrin.h>

#include "cpu/gather/rows.h"

#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)

namespace mbperf {
namespace {

#include "cpu/simd/avx512-inl.h"

#include "cpu/gather/rows-inl.h"

}  // namespace

const ConvertKernels kConvertAvx512 = kKernels;

}  // namespace mbperf

#pragma clang attribute pop
#endif
