// Kernels of kl_div for AVX2 with FMA and F16C (what ATen asks of its AVX2 level).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "cpu/kl_div/problem.h"

#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)

namespace mbperf {
namespace {

#include "cpu/simd/avx2-inl.h"

#include "cpu/kl_div/kernels-inl.h"

}  // namespace

const KlDivKernels kKlDivAvx2 = kl_div_table();

}  // namespace mbperf

#pragma clang attribute pop
#endif
