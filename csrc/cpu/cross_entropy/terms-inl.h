// The terms of a row that all cross entropy kernels share: t_c, the loss from m, s and the sums of t, the
// slope of the gradient (formulas in problem.h). Included inside an anonymous namespace, after vector-inl.h.

// The target distribution t of a row: one class; that class and a constant; any; one class beside an entropy
// at a temperature, which has a gradient; each of the first three beside an entropy that has none.
enum class Target { kHard, kSmooth, kSoft, kEntropy, kHardStats, kSmoothStats, kSoftStats };

// Whether t is given as a tensor of probabilities.
constexpr bool is_given(Target target) { return target == Target::kSoft || target == Target::kSoftStats; }

// Whether classes that are not the target of a row have a t of their own.
constexpr bool spreads(Target target) {
  return is_given(target) || target == Target::kSmooth || target == Target::kSmoothStats;
}

// Whether sum exp(z) z is wanted, for an entropy.
constexpr bool has_moment(Target target) { return target >= Target::kEntropy; }

// z of x - m: with an entropy over the temperature.
template <Target kTarget, class V>
MBPERF_INLINE V over_temperature(V difference, V inverse_temperature) {
  return kTarget == Target::kEntropy ? difference * inverse_temperature : difference;
}
template <Target kTarget, class Acc, class T>
MBPERF_INLINE T over_temperature(const Problem<Acc>& problem, T difference) {
  return kTarget == Target::kEntropy ? difference * problem.inverse_temperature : difference;
}

// z where exp(z) is not 0, else a number: 0 log 0 is 0, not 0 * -inf.
template <class V>
MBPERF_INLINE V finite_exponent(V z) {
  return V::max(V::set1(V::Bits::kExpLowest), z);  // in this order a NaN in z survives
}

// t_c for W classes from `c`, `left` of them real, without the t_y of a hard target. Soft probabilities come
// in as `soft`.
template <class V, Target kTarget>
MBPERF_INLINE V t_of_classes(const Problem<typename V::Scalar>& problem, V soft, int64_t c, int64_t left) {
  V t = V::set1(problem.prob_coeff);
  if constexpr (is_given(kTarget)) t = V::fma(soft, V::set1(problem.target_coeff), t);
  if (problem.weight) t = t * load_part<V>(problem.weight + c, left, 0);
  return t;
}

// Elements from one row of kept exponentials to the next: whole vectors.
template <int W>
MBPERF_INLINE int64_t pitch_of(int64_t classes) {
  return (classes + W - 1) / W * W;
}

template <class Acc>
MBPERF_INLINE int64_t offset_of(const Strides& strides, const Problem<Acc>& problem, int64_t position) {
  if (problem.inner == problem.positions) return position * strides.inner;  // two divisions saved a row
  return position / problem.inner * strides.outer + position % problem.inner * strides.inner;
}

template <class Acc>
MBPERF_INLINE Acc target_coeff(const Problem<Acc>& problem, int64_t y) {
  return problem.weight ? problem.target_coeff * problem.weight[y] : problem.target_coeff;
}

template <class V, class S>
MBPERF_INLINE typename V::Scalar scalar_at(const S* p) {
  if constexpr (sizeof(S) == 2)
    return V::load_n(p, 1, 0).raw[0];
  else
    return *p;
}
template <class V, class S>
MBPERF_INLINE void set_scalar(S* p, typename V::Scalar x) {
  if constexpr (sizeof(S) == 2)
    V::store_n(p, V::set1(x), 1);
  else
    *p = x;
}

// The sum of exp(z) z over classes whose exponentials sum to s, once every z has grown by `shift`; ratio is
// exp(shift).
inline double rebased_moment(double moment, double s, double shift, double ratio) {
  return ratio == 0 ? 0 : ratio * (moment + s * shift);  // shift is infinite where there were no classes
}

// Statistics of positions, whose logarithms are taken together.
constexpr int64_t kBatch = 64;
template <class Acc, int kSize = kBatch>
struct alignas(64) Batch {
  Acc m[kSize], s[kSize], tx_sum[kSize], t_sum[kSize], moment[kSize];

  void set(int64_t i, const Softmax<Acc>& row) {
    m[i] = row.m;
    s[i] = row.s;
    tx_sum[i] = row.tx_sum;
    t_sum[i] = row.t_sum;
    moment[i] = row.moment;
  }
  Softmax<Acc> get(int64_t i) const { return {m[i], s[i], tx_sum[i], t_sum[i], moment[i]}; }
};

template <class Acc>
MBPERF_INLINE Softmax<Acc> rounded(const Softmax<double>& row) {
  return {Acc(row.m), Acc(row.s), Acc(row.tx_sum), Acc(row.t_sum), Acc(row.moment)};
}

// Writes losses and statistics of the positions [begin, begin + n); adds the losses, lane by lane, to total.
template <class V, int kSize>
inline void finish_losses(const Problem<typename V::Scalar>& problem, int64_t begin, int64_t n,
                          const Batch<typename V::Scalar, kSize>& batch, typename V::Wide* total) {
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const int64_t left = n - i, p = begin + i;
    const V m = load_part<V>(batch.m + i, left, 0), s = load_part<V>(batch.s + i, left, 1);
    const V log_s = V::log(s);
    V loss = load_part<V>(batch.t_sum + i, left, 0) * log_s - load_part<V>(batch.tx_sum + i, left, 0);
    if (problem.z_loss != 0) {
      const V lse = m + log_s;
      loss = V::fma(V::set1(problem.z_loss) * lse, lse, loss);
    }
    if (problem.loss) store_part(problem.loss + p, loss, left);
    if (problem.row_max) store_part(problem.row_max + p, m, left);
    if (problem.row_sum) store_part(problem.row_sum + p, s, left);
    if (problem.entropy) {
      const V moment = load_part<V>(batch.moment + i, left, 0);
      store_part(problem.entropy + p, log_s - moment / s, left);
      if (problem.row_moment) store_part(problem.row_moment + p, moment, left);
    }
    *total += __builtin_convertvector(V::first_lanes(loss, left).raw, typename V::Wide);
  }
}

template <class V>
inline double sum_of_lanes(typename V::Wide wide) {
  double lanes[V::kWidth];
  __builtin_memcpy(lanes, &wide, sizeof(lanes));
  for (int width = V::kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// grad_c = e_c factor - t_c scale, with e_c = exp(x_c - m) and factor = (sum t_c + 2 z_loss lse) scale / s
// With an entropy: e_c (factor + tilt z_c) - t_c scale, with e_c = exp(z_c), tilt = -entropy_scale / (T s)
// and factor = sum t_c scale / s - tilt mean, where scale is divided by T.
template <class Acc>
struct Slope {
  Acc factor, scale, tilt;
};

// The factor of exp(z).
template <Target kTarget, class V>
MBPERF_INLINE V factor_at(V z, V factor, V tilt) {
  return kTarget == Target::kEntropy ? V::fma(tilt, finite_exponent(z), factor) : factor;
}

template <class V, Target kTarget, class Acc>
inline Slope<Acc> slope_of(const Problem<Acc>& problem, int64_t position, const Softmax<Acc>& row) {
  const Acc scale =
      over_temperature<kTarget>(problem, problem.row_scale ? problem.row_scale[position] : problem.scale);
  if constexpr (kTarget == Target::kEntropy) {
    const Acc upstream = problem.entropy_scale ? problem.entropy_scale[position] : Acc(0);
    const Acc tilt = -upstream * problem.inverse_temperature / row.s;
    return {row.t_sum * scale / row.s - tilt * (row.moment / row.s), scale, tilt};
  }
  Acc lse_coeff = row.t_sum;
  if (problem.z_loss != 0) lse_coeff += 2 * problem.z_loss * (row.m + V::log(V::set1(row.s)).raw[0]);
  return {lse_coeff * scale / row.s, scale, 0};
}

// exp(x) of U vectors, for x the difference of two logits of type S.
template <class S, class V, int U>
MBPERF_INLINE void exponentials_of(V (&x)[U]) {
  if constexpr (sizeof(S) == 2)
    V::exp_of_halves(x);
  else
    V::exp(x);
}
template <class S, class V>
MBPERF_INLINE V exponential_of(V x) {
  V one[1] = {x};
  exponentials_of<S>(one);
  return one[0];
}
