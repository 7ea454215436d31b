// Row kernels beside statistics, in a file of their own so that GCC inlines the others as without them: for
// AVX2 with FMA and F16C (what ATen asks of its AVX2 level).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "cpu/cross_entropy/path.h"

namespace mbperf {
namespace {

#include "cpu/simd/avx2-inl.h"

constexpr bool kOfStats = true;
#include "cpu/cross_entropy/kernels-inl.h"

}  // namespace

const RowKernels kStatsAvx2 = table();

}  // namespace mbperf
#endif
