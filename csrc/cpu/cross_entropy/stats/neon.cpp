// Row kernels beside statistics, in a file of their own so that GCC inlines the others as without them: for
// AArch64, NEON with fused multiply-add and conversion of halves, which all of them have.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/cross_entropy/path.h"

namespace mbperf {
namespace {

#include "cpu/simd/neon-inl.h"

constexpr bool kOfStats = true;
#include "cpu/cross_entropy/kernels-inl.h"

}  // namespace

const RowKernels kStatsNeon = table();

}  // namespace mbperf
#endif
