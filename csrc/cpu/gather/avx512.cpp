// Converting kernels of gather for AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include <immintrin.h>

#include "cpu/gather/rows.h"

namespace mbperf {
namespace {

#define MBPERF_F16C
#include "cpu/gather/rows-inl.h"

}  // namespace

const ConvertKernels kConvertAvx512 = kKernels;

}  // namespace mbperf
#endif
