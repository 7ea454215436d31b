// The body of gather's converting kernels: plain loops that the compiler vectorises for the target in force.
// Included inside an anonymous namespace, once per instruction set, after its file in cpu/simd.

template <typename Half>
void store(Half* out, const float* values) {
  constexpr int W = VFloat::kWidth;
  for (int64_t i = 0; i < kConvertBlock; i += 2 * W)
    VFloat::store_two(out + i, VFloat::load(values + i), VFloat::load(values + i + W));
}

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
