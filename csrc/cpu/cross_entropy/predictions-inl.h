// The predicted class of each position and its probability, from the maximum m and the sum s that a kernel
// has just left behind: the first class whose logit equals m, looked for while the logits are in the cache.
// Included inside an anonymous namespace, after positions-inl.h.

//   class = min {c: x_c = m},  p = exp(m - m) / s; as in torch.argmax the first NaN of a row goes before all
template <class V, class S>
struct Predictions {
  using Acc = typename V::Scalar;
  static constexpr int W = V::kWidth;
  static constexpr int kUnroll = 4;
  static constexpr int64_t kStep = kUnroll * W;
  static constexpr int64_t kIgnored = -1;
  // Classes along lanes are counted in Acc, exactly up to here.
  static constexpr int64_t kMostCounted = int64_t{1} << 24;

  static const S* logits_of(const Problem<Acc>& problem, int64_t position) {
    return static_cast<const S*>(problem.input) + offset_of(problem.input_strides, problem, position);
  }

  static bool ignored(const Problem<Acc>& problem, int64_t position) {
    return problem.target && problem.target[position] == problem.ignore_index;
  }

  // The first of n elements, `stride` apart, in a lane of matches(vector); -1 if there is none. Lanes past
  // the end hold `fill`.
  template <class Matches>
  MBPERF_INLINE static int64_t first_of(const S* x, int64_t stride, int64_t n, Acc fill,
                                        const Matches& matches) {
    S packed[kStep];
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t left = n - i < kStep ? n - i : kStep;
      const S* step = x + i * stride;
      if (stride != 1) {
        for (int64_t j = 0; j < left; ++j) packed[j] = step[j * stride];
        step = packed;
      }
      uint64_t found = 0;
      for (int u = 0; u < kUnroll && u * W < left; ++u)
        found |= uint64_t(matches(load_part<V>(step + u * W, left - u * W, fill))) << (u * W);
      if (found) return i + __builtin_ctzll(found);
    }
    return -1;
  }

  static int64_t class_of(const Problem<Acc>& problem, int64_t position) {
    const S* x = logits_of(problem, position);
    const int64_t stride = problem.input_strides.classes, n = problem.classes;
    const Acc s = problem.row_sum[position];
    int64_t first = -1;
    if (s != s)  // because of a NaN, or of +inf
      first = first_of(x, stride, n, 0, [](V v) { return ~V::lanes_equal(v, v) & ((1u << W) - 1); });
    const V m = V::set1(problem.row_max[position]);
    if (first < 0)
      first = first_of(x, stride, n, Acc(__builtin_nanf("")), [&](V v) { return V::lanes_equal(v, m); });
    return first < 0 ? 0 : first;  // only where another thread has written to the logits
  }

  // Of U vectors of positions that are beside each other in memory: from the last class to the first, so that
  // the first of equal ones remains.
  template <int U>
  MBPERF_INLINE static void classes_of_lanes(const Problem<Acc>& problem, int64_t position, int64_t left) {
    const S* x = logits_of(problem, position);
    V m[U], found[U];
    for (int u = 0; u < U; ++u) {
      m[u] = load_part<V>(problem.row_max + position + u * W, left - u * W, 0);
      found[u] = V::set1(0);
    }
    for (int64_t c = problem.classes; c-- > 0;) {
      const V class_ = V::set1(Acc(c));
      for (int u = 0; u < U; ++u) {
        const V v = load_part<V>(x + c * problem.input_strides.classes + u * W, left - u * W, 0);
        found[u] = V::where_equal(v, m[u], class_, found[u]);
      }
    }
    alignas(64) Acc classes[U * W];
    for (int u = 0; u < U; ++u) V::store(classes + u * W, found[u]);
    for (int64_t i = 0; i < U * W && i < left; ++i) problem.predicted[position + i] = int64_t(classes[i]);
  }

  static void classes_of_span(const Problem<Acc>& problem, Span span) {
    int64_t i = 0;
    for (; i + kStep <= span.lanes; i += kStep) classes_of_lanes<kUnroll>(problem, span.position + i, kStep);
    for (; i < span.lanes; i += W) classes_of_lanes<1>(problem, span.position + i, span.lanes - i);
    for (int64_t p = span.position; p < span.position + span.lanes; ++p)
      if (problem.row_sum[p] != problem.row_sum[p]) problem.predicted[p] = class_of(problem, p);
  }

  static void run(const Problem<Acc>& problem, int64_t begin, int64_t end) {
    if (along_positions(problem.input_strides) && problem.classes <= kMostCounted)
      over_spans<W>(problem, begin, end, kStep, false, [&](Span span) { classes_of_span(problem, span); });
    else
      for (int64_t p = begin; p < end; ++p)
        if (!ignored(problem, p)) problem.predicted[p] = class_of(problem, p);
    for (int64_t p = begin; p < end; ++p)  // NaN where m is not finite
      problem.probability[p] = (problem.row_max[p] - problem.row_max[p] + 1) / problem.row_sum[p];
    for (int64_t p = begin; problem.target && p < end; ++p)
      if (ignored(problem, p)) problem.predicted[p] = kIgnored, problem.probability[p] = 0;
  }
};
