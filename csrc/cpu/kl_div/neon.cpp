// Kernels of kl_div for AArch64: NEON with fused multiply-add and conversion of halves, which all of them
// have.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/kl_div/problem.h"

namespace mbperf {
namespace {

#include "cpu/simd/neon-inl.h"

#include "cpu/kl_div/kernels-inl.h"

}  // namespace

const KlDivKernels kKlDivNeon = kl_div_table();

}  // namespace mbperf
#endif
