// Converting kernels of gather for AArch64.
#if defined(__aarch64__)

#include <arm_neon.h>

#include "cpu/gather/rows.h"

namespace mbperf {
namespace {

#include "cpu/simd/neon-inl.h"

#include "cpu/gather/rows-inl.h"

}  // namespace

const ConvertKernels kConvertNeon = kKernels;

}  // namespace mbperf
#endif
