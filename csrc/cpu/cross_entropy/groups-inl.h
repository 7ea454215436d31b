// Cross entropy for rows of up to a few hundred adjacent classes: classes along the vector, but W rows share
// one reduction.
// A tree of exchanges takes 2 (W - 1) shuffles for W rows; W horizontal reductions would each
// wait for their own log2(W) steps, and transposing rows in and out takes 2 log2(W) shuffles a vector.
// A span of rows goes through one step after the other, as within a row each step waits for the one before.
// Included inside an anonymous namespace, after positions-inl.h.

//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
template <class V, class S, Target kTarget>
struct Groups : Positions<V, S, kTarget> {
  using Base = Positions<V, S, kTarget>;
  using typename Base::Acc;
  using typename Base::Lane;
  static constexpr int W = V::kWidth;
  static constexpr int kQuad = W < 4 ? W : 4;  // rows, or vectors, that are worked together
  static constexpr int kPair = 2;              // vectors of a long row that are worked together
  static constexpr int kRows = Base::kLanes;   // of a span at most
  static constexpr Acc kInfinity = Base::kInfinity;

  static int64_t rows_of_span(int64_t classes) {
    const int64_t most = kSpanElements / pitch_of<W>(classes) / W * W,
                  preferred = kPreferredSpanElements / pitch_of<W>(classes) / W * W;
    const int64_t rows = preferred >= 2 * W ? preferred : most < 2 * W ? most : 2 * W;
    return rows < kRows ? rows : kRows;
  }

  // Calls body(n) for n <= N, which it can use as a constant.
  template <int N, class Body>
  MBPERF_INLINE static auto with_count(int64_t n, const Body& body) {
    if constexpr (N > 1)
      if (n < N) return with_count<N - 1>(n, body);
    return body(Count<N>{});
  }

  // Rows that lie `stride` apart.
  struct Matrix {
    const S* first;
    int64_t stride;
    const S* row(int64_t r) const { return first + r * stride; }
    Matrix from(int64_t r) const { return {row(r), stride}; }
  };

  // load_part and store_part, without their branch where part of a vector is as good as a whole one.
  template <class T>
  MBPERF_INLINE static V load_first(const T* p, int64_t left, Acc fill) {
    return kParts<T> == Parts::kFree ? V::load_n(p, left, fill) : load_part<V>(p, left, fill);
  }
  MBPERF_INLINE static void store_first(S* p, V v, int64_t left) {
    kParts<S> == Parts::kFree ? V::store_n(p, v, left) : store_part(p, v, left);
  }

  // Calls body(i, left) for the vectors of a row: K of them, or as many as it takes for K = 0.
  template <int K, class Body>
  MBPERF_INLINE static void for_vectors(int64_t classes, const Body& body) {
    if constexpr (K == 0) {
      int64_t i = 0;
      for (; i + W <= classes; i += W) body(i, int64_t{W});
      if (i < classes) body(i, classes - i);
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) body(int64_t{k} * W, k + 1 < K ? int64_t{W} : classes - k * W);
    }
  }

  // Reduces kEnd / D vectors; the i-th holds rows i D to i D + D - 1 in every D lanes.
  template <int D, int kEnd, class Op>
  MBPERF_INLINE static V reduce(V* m, const Op& op) {
    if constexpr (D == kEnd) {
      return m[0];
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kEnd / D; i += 2) {
        exchange_blocks<D>(m[i], m[i + 1], FirstLanes<W>{});
        m[i / 2] = op(m[i], m[i + 1]);
      }
      return reduce<2 * D, kEnd>(m, op);
    }
  }

  // The reduction of each row over its first `classes` elements; `rows` is a multiple of W.
  template <int K, class T, class Op>
  MBPERF_INLINE static void reduce_rows(const T* row, int64_t stride, int64_t classes, Acc fill, int64_t rows,
                                        const Op& op, Acc* results) {
    V quads[kRows / kQuad];
    int64_t k = 0;
    do {
      V m[kQuad];
#pragma GCC unroll 4
      for (int r = 0; r < kQuad; ++r) {
        if constexpr (K == 0) m[r] = V::set1(fill);
        for_vectors<K>(classes, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
          const V x = load_first(row + r * stride + i, left, fill);
          m[r] = K > 0 && i == 0 ? x : op(m[r], x);
        });
      }
      quads[k] = reduce<1, kQuad>(m, op);
      row += kQuad * stride;
    } while (++k < rows / kQuad);
    int64_t r = 0;
    do V::store(results + r, reduce<kQuad, W>(quads + r / kQuad, op));
    while ((r += W) < rows);
  }
  template <int K>
  static void maxima(Matrix x, int64_t classes, int64_t rows, Acc* results) {
    auto larger = [](V a, V b) __attribute__((always_inline)) { return V::max(a, b); };
    reduce_rows<K>(x.first, x.stride, classes, -kInfinity, rows, larger, results);
  }
  // Over whole vectors.
  template <int K>
  static void sums(const Acc* row, int64_t pitch, int64_t rows, Acc* results) {
    auto add = [](V a, V b) __attribute__((always_inline)) { return a + b; };
    reduce_rows<K>(row, pitch, pitch, 0, rows, add, results);
  }

  // t of the vector of classes from i on, with soft targets at `soft`; without the t_y of a hard target.
  MBPERF_INLINE static V t_at(const Problem<Acc>& problem, const S* soft, int64_t i, int64_t left) {
    V t = V::set1(0);
    if constexpr (is_given(kTarget)) t = load_part<V>(soft, left, 0);
    return V::first_lanes(t_of_classes<V, kTarget>(problem, t, i, left), left);
  }

  // Sums over each row, lane by lane, of t_c (x_c - m) and of t_c, or of exp(z_c) z_c, where there are any.
  struct RowSums {
    static constexpr int64_t kTargets = spreads(kTarget) ? kRows * W : 1,
                             kEntropies = has_moment(kTarget) ? kRows * W : 1;
    alignas(64) Acc tx_sum[kTargets], t_sum[kTargets], moment[kEntropies];
  };

  // Vectors from class i on of R rows from row r on, U of each; the last one has `left` classes.
  template <int R, int U>
  MBPERF_INLINE static void take(const Problem<Acc>& problem, Matrix x, Matrix soft, int64_t r, int64_t i,
                                 int64_t left, int64_t ahead, const Acc* centres, const Lane& lane,
                                 int64_t first, int64_t pitch, Acc* kept, RowSums* row_sums) {
    V e[R * U], z[R * U];
    const V inverse_temperature = V::set1(problem.inverse_temperature);
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const S* p = x.row(r + k) + i + u * W;
        const int64_t real = u + 1 < U ? int64_t{W} : left;
        const V centre = V::set1(centres[r + k]);
        __builtin_prefetch(p + ahead);
        z[k * U + u] = e[k * U + u] =
            over_temperature<kTarget>(load_first(p, real, -kInfinity) - centre, inverse_temperature);
        if constexpr (spreads(kTarget)) {
          // Filled with the centre, so that lanes past the end add 0 to tx_sum and not 0 * -inf.
          const V centred = load_first(p, real, centres[r + k]) - centre;
          const V t = t_at(problem, soft.row(r + k) + i + u * W, i + u * W, real);
          Acc *tx_sum = row_sums->tx_sum + (r + k) * W, *t_sum = row_sums->t_sum + (r + k) * W;
          const bool begins = i == 0 && u == 0;
          V::store(tx_sum, begins ? t * centred : V::fma(t, centred, V::load(tx_sum)));
          V::store(t_sum, begins ? t : V::load(t_sum) + t);
        }
      }
    exponentials_of<S>(e);
    if constexpr (has_moment(kTarget)) {
#pragma GCC unroll 4
      for (int k = 0; k < R; ++k)
        kTarget == Target::kEntropy&& problem.known_softmax
            ? apply_factor<U>(e + k * U, z + k * U, lane, first + r + k)
            : add_moment<U>(e + k * U, z + k * U, i == 0, row_sums->moment + (r + k) * W);
    }
#pragma GCC unroll 4
    for (int k = 0; k < R; ++k)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) V::store(kept + (r + k) * pitch + i + u * W, e[k * U + u]);
  }

  // The exponentials of one row become what its gradient is made of (of_kept).
  template <int U>
  MBPERF_INLINE static void apply_factor(V* e, const V* z, const Lane& lane, int64_t r) {
    const V factor = V::set1(lane.factor[r]), tilt = V::set1(lane.tilt[r]);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) e[u] = e[u] * factor_at<kTarget>(z[u], factor, tilt);
  }
  template <int U>
  MBPERF_INLINE static void add_moment(const V* e, const V* z, bool begins, Acc* moment) {
    V sum = begins ? V::set1(0) : V::load(moment);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum = V::fma(e[u], finite_exponent(z[u]), sum);
    V::store(moment, sum);
  }

  // Statistics of a multiple of W rows, into their lanes from `first` on; their exponentials into kept.
  template <int K>
  static void read(const Problem<Acc>& problem, Matrix x, Matrix soft, int64_t first, int64_t rows, Acc* kept,
                   Lane* lane) {
    constexpr int U = K == 0 ? kPair : K, R = K > 0 && K < kQuad ? kQuad / K : 1;
    const int64_t classes = problem.classes, pitch = pitch_of<W>(classes);
    const int64_t ahead = rows_of_span(classes) * problem.input_strides.inner;
    const bool known = problem.known_softmax;
    auto& softmax = lane->softmax;
    if (!known) maxima<K>(x, classes, rows, softmax.m + first);
    alignas(64) Acc centres[kRows];
    for (int64_t r = 0; r < rows; r += W)
      V::store(centres + r, V::finite_or_zero(V::load(softmax.m + first + r)));
    RowSums row_sums;
    int64_t r = 0;
    do {
      auto takes = [&](auto count, auto vectors, int64_t i, int64_t left) __attribute__((always_inline)) {
        take<count, vectors>(problem, x, soft, r, i, left, ahead, centres, *lane, first, pitch, kept,
                             &row_sums);
      };
      if constexpr (K > 0) {
        takes(Count<R>{}, Count<U>{}, 0, classes - (K - 1) * W);
      } else {
        int64_t i = 0;
        for (; i + U * W < classes; i += U * W) takes(Count<1>{}, Count<U>{}, i, W);
        with_count<U>((classes - i + W - 1) / W, [&](auto vectors) __attribute__((always_inline)) {
          takes(Count<1>{}, vectors, i, classes - i - (vectors - 1) * W);
        });
      }
    } while ((r += R) < rows);
    if (!known) sums<K>(kept, pitch, rows, softmax.s + first);
    if constexpr (spreads(kTarget)) {
      if (!known) sums<1>(row_sums.tx_sum, W, rows, softmax.tx_sum + first);
      if (is_given(kTarget) || !known) sums<1>(row_sums.t_sum, W, rows, softmax.t_sum + first);
    }
    if constexpr (has_moment(kTarget))
      if (!known) sums<1>(row_sums.moment, W, rows, softmax.moment + first);
  }

  // The last n < W rows of a span, packed, with zeros below them.
  struct Padded {
    alignas(64) S rows[kSpanElements];
    int64_t classes;

    Padded(Matrix from, int64_t n, int64_t classes) : classes(classes) {
      for (int64_t i = n * classes; i < W * classes; ++i) rows[i] = S{};
      for (int64_t r = 0; r < n; ++r) __builtin_memcpy(rows + r * classes, from.row(r), classes * sizeof(S));
    }
    operator Matrix() const { return {rows, classes}; }
  };

  template <int K>
  static void read_span(const Problem<Acc>& problem, Span span, Matrix x, Matrix soft, Acc* kept,
                        Lane* lane) {
    const int64_t whole = span.lanes / W * W, n = span.lanes - whole;
    if (whole) read<K>(problem, x, soft, 0, whole, kept, lane);
    if (n == 0) return;
    const Padded rest(x.from(whole), n, problem.classes);
    Acc* const kept_rest = kept + whole * pitch_of<W>(problem.classes);
    if constexpr (is_given(kTarget))
      read<K>(problem, rest, Padded(soft.from(whole), n, problem.classes), whole, W, kept_rest, lane);
    else
      read<K>(problem, rest, soft, whole, W, kept_rest, lane);
  }

  // Reads the logits at the targets. Without a branch: which of them are ignored may follow no pattern.
  static void set_targets(const Problem<Acc>& problem, Span span, Matrix x, Lane* lane) {
    if constexpr (is_given(kTarget)) return;
    const int64_t* y = problem.target + span.position;
    const int64_t ignore_index = problem.ignore_index;
    for (int64_t r = 0; r < span.lanes; ++r)
      lane->x_y[r] = scalar_at<V>(x.row(r) + (y[r] != ignore_index ? y[r] : 0));
  }

  // From the exponentials of row r; all of its gradient, or all that is not stored afterwards.
  template <int K, bool kAll>
  MBPERF_INLINE static void write_row(const Problem<Acc>& problem, int64_t r, int64_t classes, const S* soft,
                                      const Acc* kept, const Lane& lane, S* g) {
    const V factor = V::set1(lane.factor[r]), scale = V::set1(lane.scale[r]);
    const V y = V::set1(lane.y[r]), scaled_t_y = V::set1(lane.t_y[r]) * scale;
    const bool live = lane.live[r] != 0;
    for_vectors<K>(classes, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      V v = Base::of_kept(V::load(kept + i), factor);
      if constexpr (!kAll) return store_first(g + i, v, left);
      if constexpr (spreads(kTarget)) v = v - t_at(problem, soft + i, i, left) * scale;
      if constexpr (!is_given(kTarget))
        v = V::where_equal(V::count_from(Acc(int32_t(i))), y, v - scaled_t_y, v);
      put(g + i, live ? v : V::set1(0), left, problem.streaming_stores);
    });
  }

  // The gradients at the hard targets, the whole values so that they are rounded once; zeros where a target
  // is ignored.
  static void write_targets(const Problem<Acc>& problem, Span span, const Lane& lane, S* g) {
    alignas(64) Acc values[kRows];
    const V inverse_temperature = V::set1(problem.inverse_temperature);
    for (int64_t i = 0; i < span.vectors * W; i += W) {
      const V centre = V::finite_or_zero(V::load(lane.softmax.m + i));
      const V z = over_temperature<kTarget>(V::load(lane.x_y + i) - centre, inverse_temperature);
      const V scaled_t_y = V::load(lane.t_y + i) * V::load(lane.scale + i);
      const V tilt = kTarget == Target::kEntropy ? V::load(lane.tilt + i) : V::set1(0);
      V::store(values + i,
               exponential_of<S>(z) * factor_at<kTarget>(z, V::load(lane.factor + i), tilt) - scaled_t_y);
    }
    const int64_t* y = problem.target + span.position;
    const int64_t ignore_index = problem.ignore_index, classes = problem.classes,
                  stride = problem.grad_strides.inner;
    for (int64_t r = 0; r < span.lanes; ++r, g += stride) {
      if (y[r] != ignore_index)
        set_scalar<V>(g + y[r], values[r]);
      else
        for (int64_t c = 0; c < classes; ++c) g[c] = S{};
    }
  }

  template <int K>
  static void write(const Problem<Acc>& problem, Span span, Matrix soft, const Acc* kept, Lane* lane, S* g) {
    // Stored afterwards, a target costs fewer steps, but would fetch back a line that went past the caches.
    const bool afterwards = !spreads(kTarget) && !problem.streaming_stores;
    const int64_t classes = problem.classes, pitch = pitch_of<W>(classes),
                  stride = problem.grad_strides.inner;
    if (afterwards) {
#pragma GCC unroll 4
      for (int64_t r = 0; r < span.lanes; ++r)
        write_row<K, false>(problem, r, classes, nullptr, kept + r * pitch, *lane, g + r * stride);
      return write_targets(problem, span, *lane, g);
    }
    Base::set_classes(problem, span, 0, lane);
    for (int64_t r = 0; r < span.lanes; ++r)
      write_row<K, true>(problem, r, classes, soft.row(r), kept + r * pitch, *lane, g + r * stride);
  }

  template <int K>
  static void one_span(const Problem<Acc>& problem, Span span, typename V::Wide* total) {
    alignas(64) Acc kept[kSpanElements];
    Lane lane;
    const auto at = [&](const void* base, const Strides& strides) -> Matrix {
      return {static_cast<const S*>(base) + offset_of(strides, problem, span.position), strides.inner};
    };
    const Matrix x = at(problem.input, problem.input_strides);
    const Matrix soft = is_given(kTarget) ? at(problem.soft_target, problem.soft_strides) : Matrix{};
    Base::begin(problem, span, &lane);
    if (problem.known_softmax) Base::recall(problem, span, &lane);
    if (problem.known_softmax && kTarget == Target::kEntropy) Base::set_slopes(problem, span, &lane);
    read_span<K>(problem, span, x, soft, kept, &lane);
    set_targets(problem, span, x, &lane);
    if (!problem.known_softmax) Base::finish(problem, span, &lane);
    if (problem.grad) {
      if (kTarget != Target::kEntropy) Base::set_slopes(problem, span, &lane);
      S* const g = static_cast<S*>(problem.grad) + offset_of(problem.grad_strides, problem, span.position);
      write<K>(problem, span, soft, kept, &lane, g);
    }
    if (!problem.known_softmax) finish_losses<V>(problem, span.position, span.lanes, lane.softmax, total);
  }

  template <int K>
  static double run_of(const Problem<Acc>& problem, int64_t begin, int64_t end) {
    typename V::Wide total{};
    over_spans<W>(problem, begin, end, rows_of_span(problem.classes), false,
                  [&](Span span) { one_span<K>(problem, span, &total); });
    V::fence();
    return sum_of_lanes<V>(total);
  }

  static double run(const Problem<Acc>& problem, int64_t begin, int64_t end) {
    const int64_t vectors = pitch_of<W>(problem.classes) / W;
    if (vectors > kQuad) return run_of<0>(problem, begin, end);
    return with_count<kQuad>(vectors, [&](auto count) { return run_of<count>(problem, begin, end); });
  }
};
