// Kernels of the soft cap for any processor: 16-byte vectors (SSE2 on x86-64, NEON on AArch64).
#include "cpu/softcap/softcap.h"

namespace mbperf {
namespace {

#include "cpu/simd/baseline-inl.h"

#include "cpu/softcap/kernels-inl.h"

}  // namespace

const SoftcapKernels kSoftcapBaseline = softcap_table();

}  // namespace mbperf
