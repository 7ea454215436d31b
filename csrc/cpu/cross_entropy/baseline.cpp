// Row kernels for any processor: 16-byte vectors (SSE2 on x86-64).
#include "cpu/cross_entropy/path.h"

namespace mbperf {
namespace {

#include "cpu/simd/baseline-inl.h"

constexpr bool kOfStats = false;
#include "cpu/cross_entropy/kernels-inl.h"

}  // namespace

const RowKernels kRowsBaseline = table();

}  // namespace mbperf
