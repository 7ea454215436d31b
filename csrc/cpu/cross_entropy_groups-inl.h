// Cross entropy for rows of up to a few hundred adjacent classes: classes along the vector, but W rows share
// one reduction. A tree of exchanges takes 2 (W - 1) shuffles for W rows; W horizontal reductions would each
// wait for their own log2(W) steps: at 100 classes the row takes twice as long.
// Included inside an anonymous namespace, after cross_entropy_tiles-inl.h.

template <class V, class S, Target kTarget>
struct Groups : Tiles<V, S, kTarget> {
  using Base = Tiles<V, S, kTarget>;
  using typename Base::Acc;
  using typename Base::Lane;
  static constexpr int W = V::kWidth;
  // Of a span at most: what is done once a span costs little a row.
  static constexpr int kRows = Base::kLanes < 64 ? Base::kLanes : 64;
  static constexpr int64_t kKept = 4096;  // exponentials: 16 KiB of the first-level cache

  static int64_t kept_stride(int64_t classes) { return (classes + W - 1) / W * W; }

  // Fewer classes suit a transposed tile; a longer row hides what its own reductions cost.
  static bool suits(const Task<Acc>& task) {
    return task.input_strides.classes == 1 && (!task.grad || task.grad_strides.classes == 1) &&
           (kTarget != Target::kSoft || task.soft_strides.classes == 1) && task.classes > kTileClasses &&
           kept_stride(task.classes) * W <= kKept;
  }

  // Calls body(i, left) for the vectors of a row.
  template <class Body>
  MBPERF_INLINE static void for_vectors(int64_t classes, const Body& body) {
    int64_t i = 0;
    for (; i + W <= classes; i += W) body(i, W);
    if (i < classes) body(i, classes - i);
  }

  // Lane r of the result is the reduction of m[r].
  template <int D = 1, class Op>
  MBPERF_INLINE static V reduce(V* m, const Op& op) {
    if constexpr (D == W) {
      return m[0];
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < W; i += 2 * D) {
        exchange_blocks<D>(m[i], m[i + D], Lanes<__integer_pack(W)...>{});
        m[i] = op(m[i], m[i + D]);
      }
      return reduce<2 * D>(m, op);
    }
  }
  MBPERF_INLINE static V reduce_max(V* m) {
    return reduce(m, [](V a, V b) __attribute__((always_inline)) { return V::max(a, b); });
  }
  MBPERF_INLINE static V reduce_add(V* m) {
    return reduce(m, [](V a, V b) __attribute__((always_inline)) { return a + b; });
  }

  MBPERF_INLINE static V share(const Task<Acc>& task, const S* soft, int64_t i, int64_t left) {
    V q = V::set1(0);
    if constexpr (kTarget == Target::kSoft) q = load_part<V>(soft + i, left, 0);
    return V::first_lanes(spread_share<V, kTarget>(task, q, i, left), left);
  }

  // Row r of up to W rows that lie `stride` apart; past the last one the first again.
  template <class T>
  MBPERF_INLINE static T* row_of(T* rows, int64_t stride, int64_t r, int64_t n) {
    return rows + (r < n ? r : 0) * stride;
  }

  static V maxima(const S* rows, int64_t stride, int64_t n, int64_t classes) {
    V max[W];
#pragma GCC unroll 1
    for (int64_t r = 0; r < W; ++r) {
      const S* x = row_of(rows, stride, r, n);
      V m = V::set1(-Base::kInfinity);
      for_vectors(classes, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
        m = V::max(m, load_part<V>(x + i, left, -Base::kInfinity));
      });
      max[r] = m;
    }
    return reduce_max(max);
  }

  // Statistics of n <= W rows, into their lanes from `first` on; their exponentials into kept.
  static void read(const Task<Acc>& task, const S* rows, const S* soft_rows, int64_t n, int64_t first,
                   Acc* kept, Lane* lane) {
    const int64_t classes = task.classes, stride = task.input_strides.inner, ahead = kRows * stride;
    alignas(64) Acc centres[W];
    V sum[W], linear[W], mass[W];
    const V max = maxima(rows, stride, n, classes);
    V::store(centres, V::finite_or_zero(max));
#pragma GCC unroll 1
    for (int64_t r = 0; r < W; ++r, kept += kept_stride(classes)) {
      const S* x = row_of(rows, stride, r, n);
      const S* soft = row_of(soft_rows, task.soft_strides.inner, r, n);
      const V centre = V::set1(centres[r]);
      V s = V::set1(0), l = s, q_sum = s;
      for_vectors(classes, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
        __builtin_prefetch(x + i + ahead);
        const V exponential = exponential_of<S>(load_part<V>(x + i, left, -Base::kInfinity) - centre);
        s = s + exponential;
        V::store(kept + i, exponential);
        if constexpr (kTarget != Target::kHard) {
          const V q = share(task, soft, i, left);
          l = V::fma(q, load_part<V>(x + i, left, centres[r]) - centre, l);
          q_sum = q_sum + q;
        }
      });
      sum[r] = s, linear[r] = l, mass[r] = q_sum;
    }
    V::store(&lane->softmax.max[first], max);
    V::store(&lane->softmax.sum[first], reduce_add(sum));
    if constexpr (kTarget != Target::kHard) {
      V::store(&lane->softmax.linear[first], reduce_add(linear));
      V::store(&lane->softmax.mass[first], reduce_add(mass));
    }
  }

  // The same where maximum and sum are known: exponentials again, and what soft targets sum to.
  static void reread(const Task<Acc>& task, const S* rows, const S* soft_rows, int64_t n, int64_t first,
                     Acc* kept, Lane* lane) {
    V mass[W];
#pragma GCC unroll 1
    for (int64_t r = 0; r < W; ++r, kept += kept_stride(task.classes)) {
      const S* x = row_of(rows, task.input_strides.inner, r, n);
      const S* soft = row_of(soft_rows, task.soft_strides.inner, r, n);
      const V max = V::set1(lane->softmax.max[first + r]);
      V q_sum = V::set1(0);
      for_vectors(task.classes, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
        V::store(kept + i, exponential_of<S>(load_part<V>(x + i, left, -Base::kInfinity) - max));
        if constexpr (kTarget == Target::kSoft) q_sum = q_sum + share(task, soft, i, left);
      });
      mass[r] = q_sum;
    }
    if constexpr (kTarget == Target::kSoft) V::store(&lane->softmax.mass[first], reduce_add(mass));
  }

  static void set_targets(const Task<Acc>& task, Span span, const S* x, Lane* lane) {
    if constexpr (kTarget == Target::kSoft) return;
    for (int64_t r = 0; r < span.lanes; ++r, x += task.input_strides.inner)
      if (lane->live[r] != 0) lane->at_target[r] = scalar_at<V>(x + task.target[span.position + r]);
  }

  static void write(const Task<Acc>& task, Span span, const S* soft, const Acc* kept, const Lane& lane,
                    S* g) {
    const int64_t classes = task.classes;
    const bool streaming = task.streaming_stores;
#pragma GCC unroll 1
    for (int64_t r = 0; r < span.lanes; ++r) {
      const V factor = V::set1(lane.factor[r]), scale = V::set1(lane.scale[r]);
      const V target = V::set1(lane.target[r]), fall = V::set1(lane.hard[r]) * scale;
      const bool live = lane.live[r] != 0;
      for_vectors(classes, [&](int64_t i, int64_t left) __attribute__((always_inline)) {
        V v = V::load(kept + i) * factor;
        if constexpr (kTarget != Target::kHard) v = v - share(task, soft, i, left) * scale;
        if constexpr (kTarget != Target::kSoft)
          v = V::where_equal(V::count_from(Acc(int32_t(i))), target, v - fall, v);
        put(g + i, live ? v : V::set1(0), left, streaming);
      });
      kept += kept_stride(classes), g += task.grad_strides.inner, soft += task.soft_strides.inner;
    }
  }

  static double one_span(const Task<Acc>& task, Span span) {
    alignas(64) Acc kept[kKept];
    Lane lane;
    const S* x = static_cast<const S*>(task.input) + offset_of(task.input_strides, task, span.position);
    const S* soft = static_cast<const S*>(task.soft_target);
    if constexpr (kTarget == Target::kSoft) soft += offset_of(task.soft_strides, task, span.position);
    Base::begin(task, span, &lane);
    if (task.known_softmax) Base::recall(task, span, &lane);
    for (int64_t first = 0; first < span.lanes; first += W)
      (task.known_softmax ? reread : read)(task, x + first * task.input_strides.inner,
                                           soft + first * task.soft_strides.inner, span.lanes - first, first,
                                           kept + first * kept_stride(task.classes), &lane);
    if (!task.known_softmax) {
      set_targets(task, span, x, &lane);
      Base::finish(span, &lane);
    }
    if (task.grad) {
      Base::set_slopes(task, span, &lane);
      Base::aim(task, span, 0, task.classes, &lane);
      write(task, span, soft, kept, lane,
            static_cast<S*>(task.grad) + offset_of(task.grad_strides, task, span.position));
    }
    return task.known_softmax ? 0 : finish_losses<V>(task, span.position, span.lanes, lane.softmax);
  }

  static double run(const Task<Acc>& task, int64_t begin, int64_t end) {
    const int64_t rows = kKept / kept_stride(task.classes) / W * W;
    const double total = over_spans<W>(task, begin, end, rows < kRows ? rows : kRows,
                                       [&](Span span) { return one_span(task, span); });
    V::fence();
    return total;
  }
};
