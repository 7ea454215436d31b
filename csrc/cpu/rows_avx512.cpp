// Row kernels for AVX-512 (F, BW, DQ and VL: what ATen asks of its AVX512 level).
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

// The intrinsics of GCC 12 pass a deliberately undefined vector as the unused source of a masked operation.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>

#include "cpu/cross_entropy_rows.h"

namespace mbperf {
namespace {

constexpr bool kFusedMultiplyAdd = true;
#include "cpu/vector-inl.h"

using VFloat = Vec<float, 16>;
using VDouble = Vec<double, 8>;

template <>
inline VFloat VFloat::max(VFloat a, VFloat b) {
  return {_mm512_max_ps(a.raw, b.raw)};
}
template <>
inline VDouble VDouble::max(VDouble a, VDouble b) {
  return {_mm512_max_pd(a.raw, b.raw)};
}

template <>
inline VFloat VFloat::scale_by_power_of_2(VFloat p, VFloat n, VFloat, VFloat) {
  return {_mm512_scalef_ps(p.raw, n.raw)};
}
template <>
inline VDouble VDouble::scale_by_power_of_2(VDouble p, VDouble n, VDouble, VDouble) {
  return {_mm512_scalef_pd(p.raw, n.raw)};
}

inline __mmask16 first_16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
inline __mmask8 first_8(int64_t n) { return n >= 8 ? 0xff : n <= 0 ? 0 : (1u << n) - 1; }

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

inline __m256i to_bfloat16(VFloat v) {
  BFloat16 h[16];
  VFloat::store(h, v);
  __m256i bits;
  __builtin_memcpy(&bits, h, sizeof(bits));
  return bits;
}
inline __m256i to_float16(VFloat v) { return _mm512_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT); }

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

#include "cpu/cross_entropy_rows-inl.h"
#include "cpu/tile-inl.h"

#include "cpu/cross_entropy_tiles-inl.h"

#include "cpu/cross_entropy_groups-inl.h"

#include "cpu/cross_entropy_table-inl.h"

}  // namespace

const RowKernels kRowsAvx512 = table("avx512");

}  // namespace mbperf
