// Vectors of 32 bytes: AVX2 with FMA and F16C. Included inside an anonymous namespace, after immintrin.h and
// under a target pragma that allows them.

constexpr bool kFusedMultiplyAdd = true;
#include "cpu/simd/vector-inl.h"

template <class S>
constexpr Parts kParts = sizeof(S) > 2 ? Parts::kByMask : Parts::kByElement;

using VFloat = Vec<float, 8>;
using VDouble = Vec<double, 4>;

template <>
inline VFloat VFloat::max(VFloat a, VFloat b) {
  return {_mm256_max_ps(a.raw, b.raw)};
}
// Left to GCC, which of two products a sum is fused with would differ from loop to loop, and so its bits.
template <>
inline VFloat VFloat::fma(VFloat a, VFloat b, VFloat c) {
  return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)};
}
template <>
inline VDouble VDouble::max(VDouble a, VDouble b) {
  return {_mm256_max_pd(a.raw, b.raw)};
}

template <>
inline unsigned VFloat::lanes_equal(VFloat a, VFloat b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a.raw, b.raw, _CMP_EQ_OQ)));
}
template <>
inline unsigned VDouble::lanes_equal(VDouble a, VDouble b) {
  return unsigned(_mm256_movemask_pd(_mm256_cmp_pd(a.raw, b.raw, _CMP_EQ_OQ)));
}

template <>
inline void VFloat::separate(VFloat t, VFloat* n, VFloat* f) {
  t = max(set1(-Bits::kBias), t);  // in this order a NaN in t survives
  n->raw = _mm256_floor_ps(t.raw);
  *f = t - *n;
}

// Lane i is selected where i < n.
inline __m256i first_8(int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lanes);
}
inline __m256i first_4(int64_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

template <>
template <>
inline VFloat VFloat::load_n(const float* p, int64_t n, float fill) {
  const __m256 mask = _mm256_castsi256_ps(first_8(n));
  return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, first_8(n)), mask)};
}
template <>
template <>
inline VDouble VDouble::load_n(const double* p, int64_t n, double fill) {
  const __m256d mask = _mm256_castsi256_pd(first_4(n));
  return {_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, first_4(n)), mask)};
}
template <>
template <>
inline void VFloat::store_n(float* p, VFloat v, int64_t n) {
  _mm256_maskstore_ps(p, first_8(n), v.raw);
}
template <>
template <>
inline void VDouble::store_n(double* p, VDouble v, int64_t n) {
  _mm256_maskstore_pd(p, first_4(n), v.raw);
}

// To nearest, ties to even, in the lower half of each float; a NaN stays one.
inline __m256i rounded_to_bfloat16(VFloat v) {
  const __m256i bits = _mm256_castps_si256(v.raw);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.raw, v.raw, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
}
inline __m128i to_bfloat16(VFloat v) {
  const __m256i h = rounded_to_bfloat16(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
}
inline __m256i to_bfloat16(VFloat first, VFloat second) {
  const __m256i h = _mm256_packus_epi32(rounded_to_bfloat16(first), rounded_to_bfloat16(second));
  return _mm256_permute4x64_epi64(h, 0xd8);  // packed within 128 bits: quarters 0 2 1 3
}
inline __m128i to_float16(VFloat v) { return _mm256_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT); }

template <>
inline void VFloat::store(BFloat16* p, VFloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bfloat16(v));
}
inline __m256i to_float16(VFloat first, VFloat second) {
  return _mm256_set_m128i(to_float16(second), to_float16(first));
}

template <>
template <>
inline void VFloat::store_two(BFloat16* p, VFloat first, VFloat second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(first, second));
}
template <>
template <>
inline void VFloat::store_two(Float16* p, VFloat first, VFloat second) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16(first, second));
}
template <>
template <>
inline void VFloat::stream_two(BFloat16* p, VFloat first, VFloat second) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(first, second));
}
template <>
template <>
inline void VFloat::stream_two(Float16* p, VFloat first, VFloat second) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_float16(first, second));
}
template <>
inline VFloat VFloat::load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <>
inline void VFloat::store(Float16* p, VFloat v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_float16(v));
}

template <>
template <>
inline void VFloat::stream(float* p, VFloat v) {
  _mm256_stream_ps(p, v.raw);
}
template <>
template <>
inline void VDouble::stream(double* p, VDouble v) {
  _mm256_stream_pd(p, v.raw);
}
template <>
template <>
inline void VFloat::stream(BFloat16* p, VFloat v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bfloat16(v));
}
template <>
template <>
inline void VFloat::stream(Float16* p, VFloat v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_float16(v));
}
template <>
inline void VFloat::fence() {
  _mm_sfence();
}
template <>
inline void VDouble::fence() {
  _mm_sfence();
}
