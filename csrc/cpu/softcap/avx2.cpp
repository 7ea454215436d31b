// Kernels of the soft cap for AVX2 with FMA and F16C (what ATen asks of its AVX2 level).
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")

#include <immintrin.h>

#include "cpu/softcap/softcap.h"

namespace mbperf {
namespace {

#include "cpu/simd/avx2-inl.h"

#include "cpu/softcap/kernels-inl.h"

}  // namespace

const SoftcapKernels kSoftcapAvx2 = softcap_table();

}  // namespace mbperf
#endif
