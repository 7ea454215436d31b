// Kernels of the soft cap for AVX-512 (F, BW, DQ and VL: what ATen asks of its AVX512 level).
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

// The intrinsics of GCC 12 pass a deliberately undefined vector as the unused source of a masked operation.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include "cpu/softcap/softcap.h"

namespace mbperf {
namespace {

#include "cpu/simd/avx512-inl.h"

#include "cpu/softcap/kernels-inl.h"

}  // namespace

const SoftcapKernels kSoftcapAvx512 = softcap_table();

}  // namespace mbperf
#endif
