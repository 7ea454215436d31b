// Vectors of 16 bytes, for any processor: SSE2 on x86-64, NEON on AArch64. Included inside an anonymous
// namespace.

constexpr bool kFusedMultiplyAdd = false;
#include "cpu/simd/vector-inl.h"

template <class S>
constexpr Parts kParts = Parts::kByElement;

using VFloat = Vec<float, 4>;
using VDouble = Vec<double, 2>;
