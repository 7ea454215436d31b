// The kernels of the soft cap of one instruction set, from what its file in cpu/simd defines: VFloat and
// VDouble. Included inside an anonymous namespace, after that file.

//   y = cap tanh(x / cap),  dx = dy (1 - (y / cap)^2)
template <class V, class S>
struct Softcap {
  using Acc = typename V::Scalar;
  static constexpr int W = V::kWidth;
  static constexpr int kUnroll = 4;
  static constexpr int64_t kStep = kUnroll * W;
  static constexpr bool kHalf = sizeof(S) == 2;

  // n <= kStep elements from the i-th on, copied to `packed` where they are not adjacent.
  template <class T, class Pointer>
  MBPERF_INLINE static const T* packed_from(Line<Pointer> line, int64_t i, int64_t n, T* packed) {
    const T* p = static_cast<const T*>(line.first) + i * line.stride;
    if (line.stride == 1) return p;
    for (int64_t j = 0; j < n; ++j) packed[j] = p[j * line.stride];
    return packed;
  }

  template <int U>
  MBPERF_INLINE static void cap_vectors(const S* x, Acc* y, int64_t left, Acc cap) {
    V v[U];
    for (int u = 0; u < U; ++u) v[u] = load_part<V>(x + u * W, left - u * W, 0) * V::set1(1 / cap);
    V::tanh(v);
    for (int u = 0; u < U; ++u) store_part(y + u * W, v[u] * V::set1(cap), left - u * W);
  }

  static void cap(Line<const void*> x, Acc* y, int64_t n, Acc cap) {
    S packed[kStep];
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep)
      cap_vectors<kUnroll>(packed_from(x, i, kStep, packed), y + i, kStep, cap);
    for (; i < n; i += W) cap_vectors<1>(packed_from(x, i, n - i < W ? n - i : W, packed), y + i, n - i, cap);
  }

  // A gradient of 0 stays one beside the NaN of a row that is ignored. Divided, not multiplied by 1 / cap:
  // where y is the cap its slope is exactly 0.
  MBPERF_INLINE static V gradient(const Acc* dy, const Acc* y, int64_t left, Acc cap) {
    const V upstream = load_part<V>(dy, left, 0), t = load_part<V>(y, left, 0) / V::set1(cap);
    return V::where(upstream, upstream * ((V::set1(1) - t) * (V::set1(1) + t)), V::set1(0));
  }

  static void differentiate(const Acc* dy, Line<const Acc*> y, Line<void*> dx, int64_t n, Acc cap,
                            bool streaming) {
    Acc packed[kStep];
    S scattered[W];
    S* const g = static_cast<S*>(dx.first);
    const auto part = [&](int64_t i, int64_t m) __attribute__((always_inline)) {
      const V v = gradient(dy + i, packed_from(y, i, m, packed), m, cap);
      store_part(dx.stride == 1 ? g + i : scattered, v, m);
      for (int64_t j = 0; dx.stride != 1 && j < m; ++j) g[(i + j) * dx.stride] = scattered[j];
    };
    const auto step = [&](int64_t i, bool past) __attribute__((always_inline)) {
      const Acc* const from = packed_from(y, i, kStep, packed);
      V v[kUnroll];
      for (int u = 0; u < kUnroll; ++u) v[u] = gradient(dy + i + u * W, from + u * W, W, cap);
      for (int u = 0; u < kUnroll; u += kHalf ? 2 : 1) {
        S* const p = g + i + u * W;
        if constexpr (kHalf)
          past ? V::stream_two(p, v[u], v[u + 1]) : V::store_two(p, v[u], v[u + 1]);
        else
          past ? V::stream(p, v[u]) : V::store(p, v[u]);
      }
    };
    constexpr int64_t kRun = kHalf ? 2 * W : W;  // elements that fill a vector as it is stored
    int64_t i = 0;
    if (streaming && dx.stride == 1) {
      const int64_t misaligned = reinterpret_cast<uintptr_t>(g) % (kRun * sizeof(S)) / sizeof(S);
      const int64_t before = misaligned && kRun - misaligned < n ? kRun - misaligned : misaligned ? n : 0;
      for (; i < before; i += W) part(i, before - i < W ? before - i : W);
      for (i = before; i + kStep <= n; i += kStep) step(i, true);
      V::fence();
    }
    for (; dx.stride == 1 && i + kStep <= n; i += kStep) step(i, false);
    for (; i < n; i += W) part(i, n - i < W ? n - i : W);
  }
};

template <class V, class S>
constexpr SoftcapDtype<typename V::Scalar> softcap_dtype() {
  return {Softcap<V, S>::cap, Softcap<V, S>::differentiate};
}

constexpr SoftcapKernels softcap_table() {
  return {softcap_dtype<VFloat, float>(), softcap_dtype<VFloat, BFloat16>(), softcap_dtype<VFloat, Float16>(),
          softcap_dtype<VDouble, double>()};
}
