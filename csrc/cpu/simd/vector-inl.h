// Vec<T, W>: W floats or doubles in one register, in GCC's vector language, so that one body serves every
// instruction set; avx2-inl.h, avx512-inl.h and neon-inl.h specialise what their instructions do better.
// Included inside an anonymous namespace, after kFusedMultiplyAdd (g++ does not define __FMA__ by a pragma):
// each file keeps its own copy, compiled for its own target.

// GCC judges these bodies too large to inline, and a call a vector would reload every constant.
#define MBPERF_INLINE __attribute__((always_inline)) inline

// How part of a vector is read and written: element by element, under a mask, or under one that costs
// nothing.
enum class Parts { kByElement, kByMask, kFree };

template <class T>
struct Traits;

// exp: Cody-Waite reduction, then a polynomial: minimax of degree 6 (float, error 2e-9), Taylor of
// degree 13 (double).
template <>
struct Traits<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kSqrt2 = 1.41421356237309505f;
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2 = 0.693147180559945309f;
  static constexpr float kLn2High = 0.693359375f;  // 12 bits: n * kLn2High is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kExpLowest = -104.0f;  // exp rounds to 0 below
  static constexpr float kExpNormal = -87.33f;  // exp is subnormal below
  static constexpr int kExpTerms = 7;
  static constexpr float kExp[] = {1.384364441037178e-3f,
                                   8.374163880944252e-3f,
                                   4.166800156235695e-2f,
                                   1.6666431725025177e-1f,
                                   4.999999403953552e-1f,
                                   1.0f,
                                   1.0f};
  // 2^f for 0 <= f <= 1, exactly 1 for 0: minimax of degree 5 (error 8e-8).
  static constexpr int kExp2Terms = 6;
  static constexpr float kExp2[] = {1.8671302e-3f, 9.0170300e-3f, 5.5799913e-2f,
                                    2.4016444e-1f, 6.9315130e-1f, 1.0f};
  // (tanh(x) / x - 1) / x^2 in powers of x^2 for |x| <= 0.625: Chebyshev's nodes, relative error 2e-8.
  static constexpr int kTanhTerms = 5;
  static constexpr float kTanh[] = {-6.096714166e-3f, 2.0997179e-2f, -5.385090958e-2f, 1.333276974e-1f,
                                    -3.333332894e-1f};
  static constexpr int kAtanhTerms = 6;  // (3 - 2 sqrt(2))^(2 * 6) / 13 < 2^-24
};

template <>
struct Traits<double> {
  using Int = int64_t;
  using Unsigned = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kSqrt2 = 1.41421356237309504880;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2 = 0.693147180559945309;
  static constexpr double kLn2High = 6.93145751953125e-1;  // 20 bits
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kExpLowest = -746.0;
  static constexpr double kExpNormal = -708.39;
  static constexpr int kExpTerms = 14;
  static constexpr double kExp[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  // As for float, relative error 4e-17.
  static constexpr int kTanhTerms = 11;
  static constexpr double kTanh[] = {
      -1.7244874494844330172e-5, 7.9599557352648080002e-5, -2.30776162695198579e-4,
      5.8743728600943818973e-4,  -1.455309297534642025e-3, 3.5920589774734553151e-3,
      -8.8632298309257087457e-3, 2.1869488260559114645e-2, -5.3968253961395570821e-2,
      1.3333333333326657736e-1,  -3.3333333333333322565e-1};
  static constexpr int kAtanhTerms = 11;  // (3 - 2 sqrt(2))^(2 * 11) / 23 < 2^-53
};

template <int... J>
struct Lanes {};
#if defined(__clang__)
template <class, int... J>
struct LanesOf {
  using Type = Lanes<J...>;
};
template <int N>
using FirstLanes = typename __make_integer_seq<LanesOf, int, N>::Type;
#else
template <int N>
using FirstLanes = Lanes<__integer_pack(N)...>;
#endif

template <class T, int W>
struct Vec {
  using Scalar = T;
  using Bits = Traits<T>;
  typedef T Raw __attribute__((vector_size(W * sizeof(T))));
  typedef typename Bits::Int Index __attribute__((vector_size(W * sizeof(T))));
  typedef typename Bits::Unsigned Unsigned __attribute__((vector_size(W * sizeof(T))));
  typedef double Wide __attribute__((vector_size(W * sizeof(double))));
  typedef uint16_t Halves __attribute__((vector_size(W * 2)));
  static constexpr int kWidth = W;

  Raw raw;

  MBPERF_INLINE static Vec set1(T x) { return {x - Raw{}}; }  // x + 0 would add, for -0
  MBPERF_INLINE static Vec max(Vec a, Vec b) {
    return {a.raw > b.raw ? a.raw : b.raw};
  }  // b where either is NaN
  MBPERF_INLINE static Vec fma(Vec a, Vec b, Vec c) { return {a.raw * b.raw + c.raw}; }
  // v where mask is not 0, else `otherwise`, whatever v is there
  MBPERF_INLINE static Vec where(Vec mask, Vec v, Vec otherwise) {
    return {mask.raw != 0 ? v.raw : otherwise.raw};
  }
  // v where a equals b, else `otherwise`
  MBPERF_INLINE static Vec where_equal(Vec a, Vec b, Vec v, Vec otherwise) {
    return {a.raw == b.raw ? v.raw : otherwise.raw};
  }
  // One bit a lane, the first lowest: whether a equals b there.
  MBPERF_INLINE static unsigned lanes_equal(Vec a, Vec b) {
    const Index equal = a.raw == b.raw;
    uint64_t words[sizeof(equal) / 8], any = 0;
    __builtin_memcpy(words, &equal, sizeof(equal));
    for (const uint64_t word : words) any |= word;
    unsigned bits = 0;
    if (any)
      for (int i = 0; i < W; ++i) bits |= unsigned(equal[i] & 1) << i;
    return bits;
  }
  // Subtracting this instead of a maximum of -inf leaves exp(-inf) = 0 rather than NaN.
  MBPERF_INLINE static Vec finite_or_zero(Vec max) {
    return {max.raw == -__builtin_inff() ? Raw{} : max.raw};
  }
  friend Vec operator+(Vec a, Vec b) { return {a.raw + b.raw}; }
  friend Vec operator-(Vec a, Vec b) { return {a.raw - b.raw}; }
  friend Vec operator*(Vec a, Vec b) { return {a.raw * b.raw}; }
  friend Vec operator/(Vec a, Vec b) { return {a.raw / b.raw}; }

  MBPERF_INLINE static T reduce_add(Vec v) {
    if constexpr (W == 1) {
      return v.raw[0];
    } else {
      Vec<T, W / 2> half[2];
      __builtin_memcpy(half, &v, sizeof(v));
      return Vec<T, W / 2>::reduce_add(half[0] + half[1]);
    }
  }
  MBPERF_INLINE static T reduce_max(Vec v) {
    if constexpr (W == 1) {
      return v.raw[0];
    } else {
      Vec<T, W / 2> half[2];
      __builtin_memcpy(half, &v, sizeof(v));
      return Vec<T, W / 2>::reduce_max(Vec<T, W / 2>::max(half[0], half[1]));
    }
  }

  MBPERF_INLINE static Vec load(const T* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  MBPERF_INLINE static void store(T* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }

  MBPERF_INLINE static Vec load(const BFloat16* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof(h));
    return bit_cast(__builtin_convertvector(h, Unsigned) << 16);
  }
  MBPERF_INLINE static void store(BFloat16* p, Vec v) {
    const Unsigned bits = bits_of(v);
    const Unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Unsigned result = v.raw == v.raw ? rounded : Unsigned{} + 0x7fc0;
    const Halves h = __builtin_convertvector(result, Halves);
    __builtin_memcpy(p, &h, sizeof(h));
  }

  // Half precision by arithmetic on the float's bits, as in the FP16 library of Maratyszcza.
  MBPERF_INLINE static Vec load(const Float16* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof(h));
    const Unsigned w = __builtin_convertvector(h, Unsigned) << 16;
    const Unsigned sign = w & 0x80000000u;
    const Unsigned two_w = w + w;
    const Raw normal = bit_cast((two_w >> 4) + (0xe0u << 23)).raw * 0x1p-112f;
    const Raw subnormal = bit_cast((two_w >> 17) | (126u << 23)).raw - 0.5f;
    const Unsigned magnitude = two_w < (1u << 27) ? bits_of({subnormal}) : bits_of({normal});
    return bit_cast(sign | magnitude);
  }
  MBPERF_INLINE static void store(Float16* p, Vec v) {
    const Unsigned w = bits_of(v);
    const Unsigned two_w = w + w;
    const Unsigned absolute = w & 0x7fffffffu;
    Unsigned bias = two_w & 0xff000000u;
    bias = bias < 0x71000000u ? Unsigned{} + 0x71000000u : bias;
    const Raw scaled = (bit_cast(absolute).raw * 0x1p112f) * 0x1p-110f;
    const Unsigned bits = bits_of({bit_cast((bias >> 1) + 0x07800000u).raw + scaled});
    const Unsigned magnitude = ((bits >> 13) & 0x7c00u) + (bits & 0xfffu);
    const Unsigned nonsign = two_w > 0xff000000u ? Unsigned{} + 0x7e00u : magnitude;
    const Halves h = __builtin_convertvector(((w >> 16) & 0x8000u) | nonsign, Halves);
    __builtin_memcpy(p, &h, sizeof(h));
  }

  // Two vectors that follow each other in memory: in half precision as many bytes as one of float.
  template <class S>
  MBPERF_INLINE static void store_two(S* p, Vec first, Vec second) {
    store(p, first);
    store(p + W, second);
  }

  // The first n <= W elements; the rest of the vector is `fill`, the rest of the memory untouched.
  template <class S>
  MBPERF_INLINE static Vec load_n(const S* p, int64_t n, T fill) {
    S whole[W] = {};
    for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
    Vec v = load(whole);
    for (int64_t i = n > 0 ? n : 0; i < W; ++i) v.raw[i] = fill;
    return v;
  }
  template <class S>
  MBPERF_INLINE static void store_n(S* p, Vec v, int64_t n) {
    S whole[W];
    store(whole, v);
    for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
  }
  MBPERF_INLINE static Vec first_lanes(Vec v, int64_t n) {
    return n >= W ? v : Vec{count_from(0).raw < T(n) ? v.raw : Raw{}};
  }
  MBPERF_INLINE static Vec with_lane(Vec v, int64_t lane, T x) {
    T lanes[W];
    store(lanes, v);
    lanes[lane] = x;
    return load(lanes);
  }
  // first, first + 1, first + 2, ...
  MBPERF_INLINE static Vec count_from(T first) { return count_from(first, FirstLanes<W>{}); }
  template <int... J>
  MBPERF_INLINE static Vec count_from(T first, Lanes<J...>) {
    return {Raw{T(J)...} + first};
  }
  // Past the caches; p is aligned to the vector as stored. Without such an instruction: a plain store.
  template <class S>
  MBPERF_INLINE static void stream(S* p, Vec v) {
    store(p, v);
  }
  template <class S>
  MBPERF_INLINE static void stream_two(S* p, Vec first, Vec second) {
    store_two(p, first, second);
  }
  MBPERF_INLINE static void fence() {}  // orders what stream() wrote before what other threads read

  MBPERF_INLINE static Unsigned bits_of(Vec v) {
    Unsigned bits;
    __builtin_memcpy(&bits, &v, sizeof(v));
    return bits;
  }
  MBPERF_INLINE static Vec bit_cast(Unsigned bits) {
    Vec v;
    __builtin_memcpy(&v, &bits, sizeof(v));
    return v;
  }

  MBPERF_INLINE static Vec abs(Vec x) { return bit_cast(bits_of(x) & ~sign_bits()); }
  MBPERF_INLINE static Vec with_sign_of(Vec sign, Vec magnitude) {
    return bit_cast(bits_of(magnitude) | (bits_of(sign) & sign_bits()));
  }
  MBPERF_INLINE static Unsigned sign_bits() {
    return Unsigned{} + (typename Bits::Unsigned{1} << (8 * sizeof(T) - 1));
  }

  // p * 2^n with n = shifted - kRound; 0 where x, the argument of exp, would give a subnormal number.
  MBPERF_INLINE static Vec scale_by_power_of_2(Vec p, Vec /*n*/, Vec shifted, Vec x) {
    const Vec scaled = bit_cast(bits_of(p) + (bits_of(shifted) << Bits::kMantissaBits));
    return {x.raw < Bits::kExpNormal ? Raw{} : scaled.raw};
  }

  // x = mantissa * 2^exponent with mantissa in [sqrt(1/2), sqrt(2)), for normal x > 0.
  MBPERF_INLINE static void split(Vec x, Vec* mantissa, Vec* exponent) {
    const Unsigned bits = bits_of(x);
    const Unsigned one = bits_of(set1(1));
    const Unsigned fraction_mask = Unsigned{} + ((typename Bits::Unsigned{1} << Bits::kMantissaBits) - 1);
    const Raw m = bit_cast((bits & fraction_mask) | one).raw;
    // An integer below 2^kMantissaBits in the low bits of 2^kMantissaBits is that integer once subtracted.
    const Raw two_to_bits = Raw{} + T(typename Bits::Unsigned{1} << Bits::kMantissaBits);
    const Raw biased = bit_cast((bits >> Bits::kMantissaBits) | bits_of({two_to_bits})).raw - two_to_bits;
    const Raw e = biased - T(Bits::kBias);
    mantissa->raw = m > Bits::kSqrt2 ? m * T(0.5) : m;
    exponent->raw = m > Bits::kSqrt2 ? e + T(1) : e;
  }

  // exp(x) for x <= 0 or NaN. -inf gives exactly 0. Of U vectors step by step: one after the other, the
  // waiting steps of a chain of a dozen would fill the processor's window.
  template <int U>
  MBPERF_INLINE static void exp(Vec (&x)[U]) {
    Vec shifted[U], n[U], r[U], p[U];
    for (int u = 0; u < U; ++u)
      x[u] = max(set1(Bits::kExpLowest), x[u]);  // in this order a NaN in x survives
    for (int u = 0; u < U; ++u) shifted[u] = fma(x[u], set1(Bits::kLog2E), set1(Bits::kRound));
    for (int u = 0; u < U; ++u) n[u] = shifted[u] - set1(Bits::kRound);
    if constexpr (kFusedMultiplyAdd) {
      // One rounding: off by n 2e-9 at most, where exp(x) is about 2^-n.
      for (int u = 0; u < U; ++u) r[u] = fma(n[u], set1(-Bits::kLn2), x[u]);
    } else {
      for (int u = 0; u < U; ++u) r[u] = fma(n[u], set1(-Bits::kLn2High), x[u]);
      for (int u = 0; u < U; ++u) r[u] = fma(n[u], set1(-Bits::kLn2Low), r[u]);
    }
    polynomial<Bits::kExpTerms>(Bits::kExp, r, p);
    for (int u = 0; u < U; ++u) x[u] = scale_by_power_of_2(p[u], n[u], shifted[u], x[u]);
  }
  MBPERF_INLINE static Vec exp(Vec x) {
    Vec one[1] = {x};
    exp(one);
    return one[0];
  }

  // tanh(x) of U vectors, NaN included: (1 - e) / (1 + e) with e = exp(-2 |x|), and a polynomial where 1 - e
  // would cancel. Error below 2 units in the last place.
  template <int U>
  MBPERF_INLINE static void tanh(Vec (&x)[U]) {
    Vec e[U], square[U], p[U];
    for (int u = 0; u < U; ++u) e[u] = abs(x[u]) * set1(-2);
    for (int u = 0; u < U; ++u) square[u] = x[u] * x[u];
    exp(e);
    polynomial<Bits::kTanhTerms>(Bits::kTanh, square, p);
    for (int u = 0; u < U; ++u) {
      const Vec large = with_sign_of(x[u], (set1(1) - e[u]) / (set1(1) + e[u]));
      const Vec small = fma(x[u] * square[u], p[u], x[u]);
      x[u].raw = abs(x[u]).raw < T(0.625) ? small.raw : large.raw;
    }
  }

  // exp(x) likewise, as accurate as the softmax of half-precision logits needs it: x log2(e) is rounded once,
  // an error of |x| 2^-24.
  template <int U>
  MBPERF_INLINE static void exp_of_halves(Vec (&x)[U]) {
    Vec n[U], f[U], p[U];
    for (int u = 0; u < U; ++u) f[u] = x[u] * set1(Bits::kLog2E);
    for (int u = 0; u < U; ++u) separate(f[u], &n[u], &f[u]);
    polynomial<Bits::kExp2Terms>(Bits::kExp2, f, p);
    for (int u = 0; u < U; ++u) x[u] = times_power_of_2(p[u], n[u]);
  }

  // t = n + f with n an integer and 0 <= f <= 1; where 2^t would be subnormal, any 2^n that is less will do.
  MBPERF_INLINE static void separate(Vec t, Vec* n, Vec* f) {
    t = max(set1(-Bits::kBias), t);  // in this order a NaN in t survives
    *n = (t - set1(T(0.5)) + set1(Bits::kRound)) - set1(Bits::kRound);
    *f = t - *n;
  }
  // p 2^n, and 0 for n = -kBias. A NaN that was half precision has no low bits that would disturb its
  // exponent.
  MBPERF_INLINE static Vec times_power_of_2(Vec p, Vec n) {
    const Vec scaled = bit_cast(bits_of(p) + (bits_of(n + set1(Bits::kRound)) << Bits::kMantissaBits));
    return {n.raw <= -Bits::kBias ? Raw{} : scaled.raw};
  }

  // Horner's scheme from the highest term on.
  template <int kTerms, int U>
  MBPERF_INLINE static void polynomial(const T (&terms)[kTerms], const Vec (&x)[U], Vec (&p)[U]) {
    for (int u = 0; u < U; ++u) p[u] = set1(terms[0]);
#pragma GCC unroll 16
    for (int i = 1; i < kTerms; ++i)
      for (int u = 0; u < U; ++u) p[u] = fma(p[u], x[u], set1(terms[i]));
  }

  // log(x) for x = 0, x >= 1 or NaN, as 2 atanh((m - 1) / (m + 1)); relative error < 2 ulp.
  MBPERF_INLINE static Vec log(Vec x) {
    Vec m, exponent;
    split(x, &m, &exponent);
    const Vec t = (m - set1(1)) / (m + set1(1));
    const Vec t2 = t * t;
    Vec p = set1(T(1) / (2 * Bits::kAtanhTerms - 1));
#pragma GCC unroll 16
    for (int i = Bits::kAtanhTerms - 1; i > 0; --i) p = fma(p, t2, set1(T(1) / (2 * i - 1)));
    const Vec low = fma(exponent, set1(Bits::kLn2Low), (t + t) * p);
    const Raw result = fma(exponent, set1(Bits::kLn2High), low).raw;
    const Raw finite_or_nan = x.raw > 0 ? result : x.raw + x.raw;
    return {x.raw == 0 ? Raw{} - T(__builtin_inf()) : finite_or_nan};
  }
};

// W elements at p, or the `left` < W that remain, followed by `fill`.
template <class V, class S>
MBPERF_INLINE V load_part(const S* p, int64_t left, typename V::Scalar fill) {
  return left >= V::kWidth ? V::load(p) : V::load_n(p, left, fill);
}

template <class V, class S>
MBPERF_INLINE void store_part(S* p, V v, int64_t left) {
  left >= V::kWidth ? V::store(p, v) : V::store_n(p, v, left);
}

// The lanes J of a and b, where those of b come after those of a.
template <class V, int... J>
MBPERF_INLINE V shuffled(V a, V b, Lanes<J...>) {
#if defined(__clang__)
  return {__builtin_shufflevector(a.raw, b.raw, J...)};
#else
  return {__builtin_shuffle(a.raw, b.raw, typename V::Index{J...})};
#endif
}

// Exchanges the off-diagonal D x D blocks of each 2D x 2D block held in rows a (upper) and b (lower).
template <int D, class V, int... J>
MBPERF_INLINE void exchange_blocks(V& a, V& b, Lanes<J...>) {
  const V upper = shuffled(a, b, Lanes<((J & D) ? V::kWidth + J - D : J)...>{});
  b = shuffled(a, b, Lanes<((J & D) ? V::kWidth + J : J + D)...>{});
  a = upper;
}

// Transposes the W x W matrix whose rows are m[0..W).
template <class V, int D = 1>
MBPERF_INLINE void transpose(V* m) {
#pragma GCC unroll 16
  for (int i = 0; i < V::kWidth; ++i)
    if (!(i & D)) exchange_blocks<D>(m[i], m[i + D], FirstLanes<V::kWidth>{});
  if constexpr (2 * D < V::kWidth) transpose<V, 2 * D>(m);
}
