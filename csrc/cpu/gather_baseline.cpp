// Converting kernels of gather for any processor.
#include "cpu/gather_rows.h"

namespace mbperf {
namespace {

#include "cpu/gather_rows-inl.h"

}  // namespace

const ConvertKernels kConvertBaseline = kKernels;

}  // namespace mbperf
