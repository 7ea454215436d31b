// Vectors of 64 bytes: AVX-512 F, BW, DQ and VL. Included inside an anonymous namespace, after immintrin.h
// and under a target pragma that allows them.

constexpr bool kFusedMultiplyAdd = true;
#include "cpu/simd/vector-inl.h"

template <class S>
constexpr Parts kParts = Parts::kFree;

using VFloat = Vec<float, 16>;
using VDouble = Vec<double, 8>;

template <>
inline VFloat VFloat::max(VFloat a, VFloat b) {
  return {_mm512_max_ps(a.raw, b.raw)};
}
// Left to GCC, which of two products a sum is fused with would differ from loop to loop, and so its bits.
template <>
inline VFloat VFloat::fma(VFloat a, VFloat b, VFloat c) {
  return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)};
}
template <>
inline VDouble VDouble::max(VDouble a, VDouble b) {
  return {_mm512_max_pd(a.raw, b.raw)};
}

template <>
inline unsigned VFloat::lanes_equal(VFloat a, VFloat b) {
  return _mm512_cmp_ps_mask(a.raw, b.raw, _CMP_EQ_OQ);
}
template <>
inline unsigned VDouble::lanes_equal(VDouble a, VDouble b) {
  return _mm512_cmp_pd_mask(a.raw, b.raw, _CMP_EQ_OQ);
}

// 0 where exp(x) would be subnormal, under a mask: to scale as far as that raises underflow, for which Intel
// takes an assist of some 250 cycles. A row that ends in part of a vector, whose other lanes are -inf, had
// one every time: 50,000x10 took 4 times as long as with AVX2 there and 32 classes did not. bfloat16 scales
// by 2^-inf, which is exact, and was free of it. On Zen 4 the mask costs forward 0 to 4 %, with backward
// nothing.
template <>
inline VFloat VFloat::scale_by_power_of_2(VFloat p, VFloat n, VFloat, VFloat x) {
  const __mmask16 normal_or_nan = _mm512_cmp_ps_mask(x.raw, set1(Bits::kExpNormal).raw, _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal_or_nan, p.raw, n.raw)};
}
template <>
inline VDouble VDouble::scale_by_power_of_2(VDouble p, VDouble n, VDouble, VDouble x) {
  const __mmask8 normal_or_nan = _mm512_cmp_pd_mask(x.raw, set1(Bits::kExpNormal).raw, _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_pd(normal_or_nan, p.raw, n.raw)};
}

// x = (n + j / 16) ln 2 + r with |r| <= ln 2 / 32: 2^(j / 16) from a register, where a cubic suffices for
// exp(r) (minimax, error 2e-9). Six multiplications and additions in place of eight.
alignas(64) constexpr float kPowersOf2[16] = {
    1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
inline VFloat power_of_2(VFloat sixteenths) {
  const __m512i low_4_bits = _mm512_castps_si512(sixteenths.raw);
  return {_mm512_permutexvar_ps(low_4_bits, _mm512_load_ps(kPowersOf2))};
}
template <>
template <int U>
inline void VFloat::exp(VFloat (&x)[U]) {
  constexpr float kRoundTo16th = Bits::kRound / 16;
  VFloat t[U], n[U], r[U], p[U];
  // The result for an x below kExpNormal, also for -inf, is replaced at the end.
  for (int u = 0; u < U; ++u) t[u] = fma(x[u], set1(Bits::kLog2E), set1(kRoundTo16th));
  for (int u = 0; u < U; ++u) n[u] = t[u] - set1(kRoundTo16th);
  for (int u = 0; u < U; ++u) r[u] = fma(n[u], set1(-Bits::kLn2), x[u]);
  for (int u = 0; u < U; ++u) t[u] = power_of_2(t[u]);
  for (int u = 0; u < U; ++u) p[u] = fma(r[u], set1(0.16667046f), set1(0.50001619f));
  for (int u = 0; u < U; ++u) p[u] = fma(p[u], r[u], set1(1.0f));
  for (int u = 0; u < U; ++u) r[u] = r[u] * t[u];
  for (int u = 0; u < U; ++u) p[u] = fma(p[u], r[u], t[u]);
  for (int u = 0; u < U; ++u) x[u] = scale_by_power_of_2(p[u], n[u], t[u], x[u]);
}

// The scaling below takes the integer from t by itself. Of an infinite t the fraction is 0.
template <>
inline void VFloat::separate(VFloat t, VFloat* n, VFloat* f) {
  *n = t;
  f->raw = _mm512_reduce_ps(t.raw, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
template <>
inline VFloat VFloat::times_power_of_2(VFloat p, VFloat n) {
  return {_mm512_scalef_ps(p.raw, n.raw)};
}

inline __mmask16 first_16(int64_t n) { return (1u << n) - 1; }
inline __mmask8 first_8(int64_t n) { return (1u << n) - 1; }

template <>
template <>
inline VFloat VFloat::load_n(const float* p, int64_t n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_16(n), p)};
}
template <>
template <>
inline VDouble VDouble::load_n(const double* p, int64_t n, double fill) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), first_8(n), p)};
}
template <>
template <>
inline VFloat VFloat::load_n(const BFloat16* p, int64_t n, float fill) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_16(n), p));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_16(n),
                             _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)))};
}
template <>
template <>
inline VFloat VFloat::load_n(const Float16* p, int64_t n, float fill) {
  const __m512 v = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_16(n), p));
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_16(n), v)};
}

// To nearest, ties to even, in the upper half of each float. Not for a NaN: adding may overflow its payload.
inline __m512i rounded_to_bfloat16(VFloat v) {
  const __m512i bits = _mm512_castps_si512(v.raw);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
  return _mm512_add_epi32(bits, half);
}
inline VFloat one_nan(VFloat v) {
  return {_mm512_mask_mov_ps(v.raw, _mm512_cmp_ps_mask(v.raw, v.raw, _CMP_UNORD_Q),
                             _mm512_set1_ps(__builtin_nanf("")))};
}
inline __m256i to_bfloat16(VFloat v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bfloat16(one_nan(v)), 16));
}
inline __m512i to_bfloat16(VFloat first, VFloat second) {
  if (__builtin_expect(_mm512_cmp_ps_mask(first.raw, second.raw, _CMP_UNORD_Q) != 0, 0)) {
    first = one_nan(first);
    second = one_nan(second);
  }
  const __m512i upper_halves =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
                       19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(rounded_to_bfloat16(first), upper_halves, rounded_to_bfloat16(second));
}
inline __m256i to_float16(VFloat v) { return _mm512_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT); }

inline __m512i to_float16(VFloat first, VFloat second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(to_float16(first)), to_float16(second), 1);
}

template <>
inline VFloat VFloat::load(const BFloat16* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
template <>
inline void VFloat::store(BFloat16* p, VFloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v));
}
template <>
template <>
inline void VFloat::store_two(BFloat16* p, VFloat first, VFloat second) {
  _mm512_storeu_si512(p, to_bfloat16(first, second));
}
template <>
template <>
inline void VFloat::store_two(Float16* p, VFloat first, VFloat second) {
  _mm512_storeu_si512(p, to_float16(first, second));
}
template <>
template <>
inline void VFloat::stream_two(BFloat16* p, VFloat first, VFloat second) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_bfloat16(first, second));
}
template <>
template <>
inline void VFloat::stream_two(Float16* p, VFloat first, VFloat second) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), to_float16(first, second));
}
template <>
inline VFloat VFloat::load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
template <>
inline void VFloat::store(Float16* p, VFloat v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_float16(v));
}

template <>
template <>
inline void VFloat::store_n(float* p, VFloat v, int64_t n) {
  _mm512_mask_storeu_ps(p, first_16(n), v.raw);
}
template <>
template <>
inline void VDouble::store_n(double* p, VDouble v, int64_t n) {
  _mm512_mask_storeu_pd(p, first_8(n), v.raw);
}
template <>
template <>
inline void VFloat::store_n(BFloat16* p, VFloat v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_16(n), to_bfloat16(v));
}
template <>
template <>
inline void VFloat::store_n(Float16* p, VFloat v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_16(n), to_float16(v));
}

template <>
template <>
inline void VFloat::stream(float* p, VFloat v) {
  _mm512_stream_ps(p, v.raw);
}
template <>
template <>
inline void VDouble::stream(double* p, VDouble v) {
  _mm512_stream_pd(p, v.raw);
}
template <>
template <>
inline void VFloat::stream(BFloat16* p, VFloat v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v));
}
template <>
template <>
inline void VFloat::stream(Float16* p, VFloat v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_float16(v));
}
template <>
inline void VFloat::fence() {
  _mm_sfence();
}
template <>
inline void VDouble::fence() {
  _mm_sfence();
}
