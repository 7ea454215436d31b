// The row kernels of one instruction set, from what its file in cpu/simd defines: VFloat, VDouble and kParts.
// Included inside an anonymous namespace, after that file.
#include "cpu/cross_entropy/terms-inl.h"
#include "cpu/simd/ordered_halves-inl.h"

#include "cpu/cross_entropy/blocks-inl.h"

#include "cpu/cross_entropy/rows-inl.h"

#include "cpu/simd/tile-inl.h"

#include "cpu/cross_entropy/positions-inl.h"

#include "cpu/cross_entropy/predictions-inl.h"

#include "cpu/cross_entropy/tiles-inl.h"

#include "cpu/cross_entropy/groups-inl.h"

#include "cpu/cross_entropy/table-inl.h"
