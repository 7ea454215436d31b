// What rows and tiles of kl_div share: the loss of a row from its sums, the factors of its gradient, and the
// sums over vectors of both sides' logits (formulas in problem.h).
// Included inside an anonymous namespace, after terms-inl.h.

// Sums of rows, whose losses are taken together.
template <class Acc, int kSize = kBatch>
struct alignas(64) PairBatch {
  Acc s_x[kSize], s_z[kSize], d[kSize];

  void set(int64_t i, const PairSums<Acc>& row) {
    s_x[i] = row.s_x;
    s_z[i] = row.s_z;
    d[i] = row.d;
  }
};

// log(a / b) of positive numbers: that of the larger over the smaller, since V::log takes no number below 1.
// The logarithm of the ratio, as the difference of two would carry the error of both.
template <class V>
MBPERF_INLINE V log_of_ratio(V a, V b) {
  const V zero = V::set1(0), larger = V::max(a, b), smaller = zero - V::max(zero - a, zero - b);
  const V result = V::log(larger / smaller);
  return V::where_equal(larger, a, result, zero - result);
}

// Writes the losses of rows [begin, begin + n); adds them, lane by lane, to total. Rounding may leave the
// loss of nearly equal rows below 0, which no divergence is.
template <class V, int kSize>
inline void finish_pairs(const KlDivProblem<typename V::Scalar>& problem, int64_t begin, int64_t n,
                         const PairBatch<typename V::Scalar, kSize>& batch, typename V::Wide* total) {
  const V zero = V::set1(0), inverse_temperature = V::set1(problem.inverse_temperature);
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const int64_t left = n - i;
    const V s_x = load_part<V>(batch.s_x + i, left, 1), s_z = load_part<V>(batch.s_z + i, left, 1);
    const V d = load_part<V>(batch.d + i, left, 0);
    // 0 / s_x is NaN where all logits of the student are -inf, and d / s_z where the teacher's are.
    V loss = d * inverse_temperature / s_z + log_of_ratio(s_x, s_z) + zero / s_x;
    loss = V::max(zero, loss);  // in this order a NaN survives
    if (problem.loss) store_part(problem.loss + begin + i, loss, left);
    *total += __builtin_convertvector(V::first_lanes(loss, left).raw, typename V::Wide);
  }
}

// grad_c = e_x x - e_z z, with e_x = exp((x_c - m_x) / T) and x = scale / s_x, the teacher's likewise
template <class T>
struct PairFactors {
  T x, z;
};

template <class Acc>
MBPERF_INLINE PairFactors<Acc> factors_of(const KlDivProblem<Acc>& problem, int64_t row,
                                          const PairSums<Acc>& sums) {
  const Acc scale = problem.row_scale ? problem.scale * problem.row_scale[row] : problem.scale;
  return {scale / sums.s_x, scale / sums.s_z};
}

// Each product is rounded (by way of fma, since GCC would fuse the difference with one of them): so the
// gradient of equal logits is exactly 0.
template <class V>
MBPERF_INLINE V gradient_of(V e_x, V e_z, PairFactors<V> factors) {
  const V zero = V::set1(0);
  return V::fma(e_x, factors.x, zero) - V::fma(e_z, factors.z, zero);
}

// The running sums of U vectors.
template <class V, int U>
struct PairVectors {
  V s_x[U], s_z[U], d[U];

  MBPERF_INLINE PairVectors() {
    for (int u = 0; u < U; ++u) s_x[u] = s_z[u] = d[u] = V::set1(0);
  }

  // Adds U vectors of x - m_x, from e[0] on, and of z - m_z, from e[U] on; leaves their exponentials in e.
  template <class S>
  MBPERF_INLINE void add(V (&e)[2 * U], V inverse_temperature) {
    V difference[U];
    for (int u = 0; u < U; ++u) difference[u] = e[U + u] - e[u];
    for (V& v : e) v = v * inverse_temperature;
    exponentials_of<S>(e);
    for (int u = 0; u < U; ++u) {
      s_x[u] = s_x[u] + e[u];
      s_z[u] = s_z[u] + e[U + u];
      d[u] = V::fma(e[U + u], V::where(e[U + u], difference[u], V::set1(0)), d[u]);
    }
  }
};
