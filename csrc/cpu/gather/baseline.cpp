// Converting kernels of gather for any processor.
#include "cpu/gather/rows.h"

namespace mbperf {
namespace {

#include "cpu/simd/baseline-inl.h"

#include "cpu/gather/rows-inl.h"

}  // namespace

const ConvertKernels kConvertBaseline = kKernels;

}  // namespace mbperf
