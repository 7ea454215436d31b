// The body of gather's converting kernels: plain loops that the compiler vectorises for the target in force.
// Included inside an anonymous namespace, once per instruction set; MBPERF_F16C says whether that has F16C
// (g++ does not define __F16C__ by a pragma).

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

// Round to nearest, ties to even, as c10::BFloat16 does.
inline void store(BFloat16* out, const float* values) {
  for (int64_t i = 0; i < kConvertBlock; ++i) {
    const uint32_t bits = bits_of(values[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i].bits = uint16_t(values[i] != values[i] ? 0x7fc0u : rounded);
  }
}

#ifdef MBPERF_F16C
inline void store(Float16* out, const float* values) {
  for (int64_t i = 0; i < kConvertBlock; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without branches, as in Marat Dukhan's FP16 library: adding the right power of two rounds to nearest even.
inline void store(Float16* out, const float* values) {
  for (int64_t i = 0; i < kConvertBlock; ++i) {
    const uint32_t bits = bits_of(values[i]);
    const uint32_t twice = bits + bits;
    const float magnitude = __builtin_bit_cast(float, bits & 0x7fffffffu);
    const float scaled = (magnitude * 0x1.0p+112f) * 0x1.0p-110f;
    const uint32_t exponent = twice & 0xff000000u;
    const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
    const uint32_t result = bits_of(__builtin_bit_cast(float, (bias >> 1) + 0x07800000u) + scaled);
    const uint32_t finite = ((result >> 13) & 0x00007c00u) + (result & 0x00000fffu);
    const uint32_t half = twice > 0xff000000u ? 0x7e00u : finite;
    out[i].bits = uint16_t(((bits & 0x80000000u) >> 16) | half);
  }
}
#endif

template <typename In, typename Out, typename Value>
void convert_block(const In* in, Out* out, int64_t i, Value value) {
  float values[kConvertBlock];
  for (int64_t j = 0; j < kConvertBlock; ++j) values[j] = value(in[i + j], i + j);
  store(out + i, values);
}

// Block by block; the last one may begin within the one before, and what is shorter than a block goes through
// a buffer, so that nothing beyond n is read or written.
template <typename In, typename Out, typename Value>
void convert_blocks(const In* in, Out* out, int64_t n, Value value) {
  for (int64_t i = 0; i + kConvertBlock <= n; i += kConvertBlock) convert_block(in, out, i, value);
  if (n % kConvertBlock == 0) return;
  if (n > kConvertBlock) return convert_block(in, out, n - kConvertBlock, value);
  float values[kConvertBlock] = {};
  Out rest[kConvertBlock];
  for (int64_t j = 0; j < n; ++j) values[j] = value(in[j], j);
  store(rest, values);
  for (int64_t j = 0; j < n; ++j) out[j] = rest[j];
}

template <typename In, typename Value>
void convert_blocks(const In* in, float* out, int64_t n, Value value) {
  for (int64_t i = 0; i < n; ++i) out[i] = value(in[i], i);
}

template <typename In, typename Out>
void convert_run(const In* in, Out* out, int64_t n, float mean, float scale) {
  convert_blocks(in, out, n, [=](In element, int64_t) { return (float(element) - mean) * scale; });
}

template <typename In, typename Out>
void convert_interleaved(const In* in, Out* out, int64_t n, const Normalise& how) {
  const int64_t block = kConvertBlock * how.channels;
  const float *mean = how.mean, *scale = how.scale;
  for (int64_t at = 0; at < n; at += block)
    convert_blocks(in + at, out + at, n - at < block ? n - at : block,
                   [=](In element, int64_t i) { return (float(element) - mean[i]) * scale[i]; });
}

template <typename In, typename Out>
void convert_row(const In* in, Out* out, int64_t n, const Normalise& how) {
  if (how.interleaved()) return convert_interleaved(in, out, n, how);
  int64_t channel = 0;
  for (int64_t at = 0; at < n; at += how.run) {
    convert_run(in + at, out + at, how.run, how.mean[channel], how.scale[channel]);
    channel = channel + 1 == how.channels ? 0 : channel + 1;
  }
}

constexpr ConvertKernels kKernels = {convert_row<uint8_t, float>,   convert_row<uint8_t, BFloat16>,
                                     convert_row<uint8_t, Float16>, convert_row<float, float>,
                                     convert_row<float, BFloat16>,  convert_row<float, Float16>};
