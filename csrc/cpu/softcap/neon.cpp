// Kernels of the soft cap for AArch64: NEON with fused multiply-add and conversion of halves, which all of
// them have.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/softcap/softcap.h"

namespace mbperf {
namespace {

#include "cpu/simd/neon-inl.h"

#include "cpu/softcap/kernels-inl.h"

}  // namespace

const SoftcapKernels kSoftcapNeon = softcap_table();

}  // namespace mbperf
#endif
