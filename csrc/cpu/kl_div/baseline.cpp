// Kernels of kl_div for any processor: 16-byte vectors (SSE2 on x86-64).
#include "cpu/kl_div/problem.h"

namespace mbperf {
namespace {

#include "cpu/simd/baseline-inl.h"

#include "cpu/kl_div/kernels-inl.h"

}  // namespace

const KlDivKernels kKlDivBaseline = kl_div_table();

}  // namespace mbperf
