// Row kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on AArch64).
#include "cpu/cross_entropy_rows.h"

namespace mbperf {
namespace {

constexpr bool kFusedMultiplyAdd = false;
#include "cpu/vector-inl.h"

template <class S>
constexpr Parts kParts = Parts::kByElement;

using VFloat = Vec<float, 4>;
using VDouble = Vec<double, 2>;

#include "cpu/cross_entropy_terms-inl.h"
#include "cpu/ordered_halves-inl.h"

#include "cpu/cross_entropy_blocks-inl.h"

#include "cpu/cross_entropy_rows-inl.h"

#include "cpu/tile-inl.h"

#include "cpu/cross_entropy_positions-inl.h"

#include "cpu/cross_entropy_tiles-inl.h"

#include "cpu/cross_entropy_groups-inl.h"

#include "cpu/cross_entropy_table-inl.h"

}  // namespace

const RowKernels kRowsBaseline = table("baseline");

}  // namespace mbperf
