// Row kernels beside statistics, in a file of their own so that GCC inlines the others as without them: for
// any processor: 16-byte vectors (SSE2 on x86-64, NEON on AArch64).
#include "cpu/cross_entropy/path.h"

namespace mbperf {
namespace {

#include "cpu/simd/baseline-inl.h"

constexpr bool kOfStats = true;
#include "cpu/cross_entropy/kernels-inl.h"

}  // namespace

const RowKernels kStatsBaseline = table();

}  // namespace mbperf
