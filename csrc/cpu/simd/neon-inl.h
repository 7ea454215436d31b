// Vectors of 16 bytes with the instructions that every AArch64 processor has: fused multiply-add and
// conversion from and to float16; bfloat16 is shifted. Included inside an anonymous namespace, after
// arm_neon.h.

constexpr bool kFusedMultiplyAdd = true;
#include "cpu/simd/vector-inl.h"

template <class S>
constexpr Parts kParts = Parts::kByElement;

using VFloat = Vec<float, 4>;
using VDouble = Vec<double, 2>;

// A NaN on either side is the result.
template <>
inline VFloat VFloat::max(VFloat a, VFloat b) {
  return {vmaxq_f32(a.raw, b.raw)};
}
template <>
inline VDouble VDouble::max(VDouble a, VDouble b) {
  return {vmaxq_f64(a.raw, b.raw)};
}
// Left to the compiler, which of two products a sum is fused with would differ from loop to loop, and so its
// bits.
template <>
inline VFloat VFloat::fma(VFloat a, VFloat b, VFloat c) {
  return {vfmaq_f32(c.raw, a.raw, b.raw)};
}
template <>
inline VDouble VDouble::fma(VDouble a, VDouble b, VDouble c) {
  return {vfmaq_f64(c.raw, a.raw, b.raw)};
}
template <>
inline float VFloat::reduce_add(VFloat v) {
  return vaddvq_f32(v.raw);
}
template <>
inline float VFloat::reduce_max(VFloat v) {
  return vmaxvq_f32(v.raw);
}

template <>
inline void VFloat::separate(VFloat t, VFloat* n, VFloat* f) {
  t = max(set1(-Bits::kBias), t);
  n->raw = vrndmq_f32(t.raw);
  *f = t - *n;
}

// There are no masks: an element past the first n is neither read nor written, lane by lane.
template <>
template <>
inline VFloat VFloat::load_n(const float* p, int64_t n, float fill) {
  float32x4_t v = vdupq_n_f32(fill);
  if (n > 0) v = vld1q_lane_f32(p, v, 0);
  if (n > 1) v = vld1q_lane_f32(p + 1, v, 1);
  if (n > 2) v = vld1q_lane_f32(p + 2, v, 2);
  if (n > 3) v = vld1q_lane_f32(p + 3, v, 3);
  return {v};
}
template <>
template <>
inline void VFloat::store_n(float* p, VFloat v, int64_t n) {
  if (n > 0) vst1q_lane_f32(p, v.raw, 0);
  if (n > 1) vst1q_lane_f32(p + 1, v.raw, 1);
  if (n > 2) vst1q_lane_f32(p + 2, v.raw, 2);
  if (n > 3) vst1q_lane_f32(p + 3, v.raw, 3);
}
template <>
template <>
inline VDouble VDouble::load_n(const double* p, int64_t n, double fill) {
  float64x2_t v = vdupq_n_f64(fill);
  if (n > 0) v = vld1q_lane_f64(p, v, 0);
  if (n > 1) v = vld1q_lane_f64(p + 1, v, 1);
  return {v};
}
template <>
template <>
inline void VDouble::store_n(double* p, VDouble v, int64_t n) {
  if (n > 0) vst1q_lane_f64(p, v.raw, 0);
  if (n > 1) vst1q_lane_f64(p + 1, v.raw, 1);
}

inline uint16x4_t load_halves(const void* p, int64_t n) {
  const uint16_t* halves = static_cast<const uint16_t*>(p);
  uint16x4_t h = vdup_n_u16(0);
  if (n > 0) h = vld1_lane_u16(halves, h, 0);
  if (n > 1) h = vld1_lane_u16(halves + 1, h, 1);
  if (n > 2) h = vld1_lane_u16(halves + 2, h, 2);
  if (n > 3) h = vld1_lane_u16(halves + 3, h, 3);
  return h;
}
inline void store_halves(void* p, uint16x4_t h, int64_t n) {
  uint16_t* halves = static_cast<uint16_t*>(p);
  if (n > 0) vst1_lane_u16(halves, h, 0);
  if (n > 1) vst1_lane_u16(halves + 1, h, 1);
  if (n > 2) vst1_lane_u16(halves + 2, h, 2);
  if (n > 3) vst1_lane_u16(halves + 3, h, 3);
}
// v in the first n lanes, `fill` in the others.
inline VFloat filled(float32x4_t v, int64_t n, float fill) {
  const int32x4_t lanes = {0, 1, 2, 3};
  return {vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(int(n))), v, vdupq_n_f32(fill))};
}

inline float32x4_t widened(BFloat16, uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
inline float32x4_t widened(Float16, uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }

// What makes the upper half of a float's bits its bfloat16, to nearest, ties to even, when added. Not for a
// NaN, whose payload it may overflow.
inline uint32x4_t half_place(uint32x4_t bits) {
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(odd, vdupq_n_u32(0x7fff));
}
inline uint32x4_t one_nan(VFloat v) {
  return vbslq_u32(vceqq_f32(v.raw, v.raw), vreinterpretq_u32_f32(v.raw), vdupq_n_u32(0x7fc00000));
}
inline uint16x4_t narrowed(BFloat16, VFloat v) {
  const uint32x4_t bits = one_nan(v);
  return vaddhn_u32(bits, half_place(bits));
}
inline uint16x4_t narrowed(Float16, VFloat v) { return vreinterpret_u16_f16(vcvt_f16_f32(v.raw)); }

template <>
inline VFloat VFloat::load(const BFloat16* p) {
  return {widened(BFloat16{}, vld1_u16(&p->bits))};
}
template <>
inline VFloat VFloat::load(const Float16* p) {
  return {widened(Float16{}, vld1_u16(&p->bits))};
}
template <>
inline void VFloat::store(BFloat16* p, VFloat v) {
  vst1_u16(&p->bits, narrowed(BFloat16{}, v));
}
template <>
inline void VFloat::store(Float16* p, VFloat v) {
  vst1_u16(&p->bits, narrowed(Float16{}, v));
}
template <>
template <>
inline void VFloat::store_two(BFloat16* p, VFloat first, VFloat second) {
  const uint32x4_t bits = one_nan(second);
  vst1q_u16(&p->bits, vaddhn_high_u32(narrowed(BFloat16{}, first), bits, half_place(bits)));
}
template <>
template <>
inline void VFloat::store_two(Float16* p, VFloat first, VFloat second) {
  const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(first.raw), second.raw);
  vst1q_u16(&p->bits, vreinterpretq_u16_f16(halves));
}
template <>
template <>
inline VFloat VFloat::load_n(const BFloat16* p, int64_t n, float fill) {
  return filled(widened(BFloat16{}, load_halves(p, n)), n, fill);
}
template <>
template <>
inline VFloat VFloat::load_n(const Float16* p, int64_t n, float fill) {
  return filled(widened(Float16{}, load_halves(p, n)), n, fill);
}
template <>
template <>
inline void VFloat::store_n(BFloat16* p, VFloat v, int64_t n) {
  store_halves(p, narrowed(BFloat16{}, v), n);
}
template <>
template <>
inline void VFloat::store_n(Float16* p, VFloat v, int64_t n) {
  store_halves(p, narrowed(Float16{}, v), n);
}
