// Converting kernels of gather for AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "cpu/gather/rows.h"

namespace mbperf {
namespace {

#define MBPERF_F16C
#include "cpu/gather/rows-inl.h"

}  // namespace

const ConvertKernels kConvertAvx2 = kKernels;

}  // namespace mbperf
#endif
