// Vectors of 16 bytes, for any processor, without intrinsics: SSE2 on x86-64. Included inside an anonymous
// namespace.

constexpr bool kFusedMultiplyAdd = false;
#include "cpu/simd/vector-inl.h"

template <class S>
constexpr Parts kParts = Parts::kByElement;

using VFloat = Vec<float, 4>;
using VDouble = Vec<double, 2>;
