// The largest of many numbers in half precision, found among their bits: twice as many to a vector as
// widened. Included inside an anonymous namespace, after vector-inl.h.

// Numbers in half precision as integers, two vectors' worth in one: with the magnitude of negative ones
// complemented they are in the order of integers.
template <class V>
struct OrderedHalves {
  static constexpr int64_t kWidth = 2 * V::kWidth;
  typedef int16_t Raw __attribute__((vector_size(sizeof(V))));

  Raw raw;

  MBPERF_INLINE static OrderedHalves ordered(Raw bits) { return {bits ^ ((bits >> 15) & 0x7fff)}; }
  MBPERF_INLINE static OrderedHalves load(const void* p) {
    Raw bits;
    __builtin_memcpy(&bits, p, sizeof(bits));
    return ordered(bits);
  }
  MBPERF_INLINE static OrderedHalves max(OrderedHalves a, OrderedHalves b) {
    return {a.raw > b.raw ? a.raw : b.raw};
  }
  template <class S>
  MBPERF_INLINE static typename V::Scalar reduce_max(OrderedHalves v) {
    S halves[kWidth];
    v = ordered(v.raw);
    __builtin_memcpy(halves, &v, sizeof(halves));
    return V::reduce_max(V::max(V::load(halves), V::load(halves + V::kWidth)));
  }
};

// The largest of n >= 2 W numbers. A NaN may be the largest.
template <class V, class S>
MBPERF_INLINE typename V::Scalar largest_half(const S* x, int64_t n) {
  using Halves = OrderedHalves<V>;
  constexpr int64_t kStep = Halves::kWidth;
  Halves m[4];
  for (auto& v : m) v = Halves::load(x);
  int64_t i = 0;
  for (; i + 4 * kStep <= n; i += 4 * kStep)
    for (int u = 0; u < 4; ++u) m[u] = Halves::max(m[u], Halves::load(x + i + u * kStep));
  for (; i + kStep <= n; i += kStep) m[0] = Halves::max(m[0], Halves::load(x + i));
  m[1] = Halves::max(m[1], Halves::load(x + n - kStep));  // the tail, and some that were compared before
  return Halves::template reduce_max<S>(Halves::max(Halves::max(m[0], m[1]), Halves::max(m[2], m[3])));
}
