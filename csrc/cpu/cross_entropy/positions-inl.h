// Positions side by side in the lanes of vectors: their targets, statistics, losses and slopes, whether the
// classes come one after the other (tiles) or along the vector (groups).
// Included inside an anonymous namespace, after terms-inl.h and tile-inl.h.

// Calls body(span) for spans of at most `widest` positions; none crosses from one outer index to the next, or
// if it may (`joins`), it takes several whole ones.
template <int W, class Acc, class Body>
inline void over_spans(const Problem<Acc>& problem, int64_t begin, int64_t end, int64_t widest, bool joins,
                       const Body& body) {
  for (int64_t p = begin; p < end;) {
    const int64_t inside = p % problem.inner, left = end - p;
    int64_t run = problem.inner - inside < left ? problem.inner - inside : left;
    if (run > widest) run = widest;
    int64_t lanes = run;
    if (joins && run == problem.inner && 2 * run <= widest)
      lanes = (left < widest ? left : widest) / run * run;
    body({p, lanes, run, int((lanes + W - 1) / W)});
    p += lanes;
  }
}

template <class V, class S, Target kTarget>
struct Positions {
  using Acc = typename V::Scalar;
  static constexpr int W = V::kWidth;
  static constexpr int kLanes = Tile<V>::kLanes;
  static constexpr Acc kInfinity = __builtin_inff();

  // Per position, in lanes. A lane that is not live (ignored, or past the last position) counts for nothing.
  struct alignas(64) Lane {
    Batch<Acc, kLanes> softmax;
    Acc live[kLanes], t_y[kLanes], factor[kLanes], scale[kLanes], tilt[kLanes];
    Acc y[kLanes];    // class of the hard target, counted from the first class of the current tile
    Acc x_y[kLanes];  // its logit, once a tile had it
  };

  // Loops without branches: they are vectorised.
  static void begin(const Problem<Acc>& problem, Span span, Lane* lane) {
    for (int64_t i = 0; i < span.vectors * W; ++i) {
      lane->live[i] = i < span.lanes ? Acc(1) : Acc(0);
      lane->t_y[i] = lane->x_y[i] = 0;
      lane->y[i] = -1;
      lane->softmax.m[i] = -kInfinity;
      lane->softmax.s[i] = lane->softmax.tx_sum[i] = lane->softmax.t_sum[i] = 0;
      if constexpr (has_moment(kTarget)) lane->softmax.moment[i] = 0;
    }
    if constexpr (is_given(kTarget)) return;
    const int64_t* y = problem.target + span.position;
    const int64_t ignore_index =
        problem.ignore_index;  // copied: `lane` might lie over the problem, for all GCC knows
    const Acc coeff = problem.target_coeff;
    for (int64_t i = 0; i < span.lanes; ++i) {
      lane->live[i] = y[i] != ignore_index ? Acc(1) : Acc(0);
      lane->t_y[i] = y[i] != ignore_index ? coeff : Acc(0);
    }
    if (problem.weight)
      for (int64_t i = 0; i < span.lanes; ++i)
        if (lane->live[i] != 0) lane->t_y[i] *= problem.weight[y[i]];
  }

  // Sets y for the tile that begins at class `first`. A class outside the tile, also one that is ignored and
  // wraps round, equals none of those inside.
  static void set_classes(const Problem<Acc>& problem, Span span, int64_t first, Lane* lane) {
    if constexpr (is_given(kTarget)) return;
    const int64_t* y = problem.target + span.position;
    for (int64_t i = 0; i < span.lanes; ++i) lane->y[i] = Acc(int64_t(uint64_t(y[i]) - uint64_t(first)));
  }

  // The gradient of a class, without its t, from what is kept of it: its exponential, or with an entropy,
  // whose factor takes a z that is not kept, the product of both.
  MBPERF_INLINE static V of_kept(V kept, V factor) {
    return kTarget == Target::kEntropy ? kept : kept * factor;
  }

  // Adds the hard targets; lanes that are not live get statistics that give a loss of 0.
  static void finish(const Problem<Acc>& problem, Span span, Lane* lane) {
    const V zero = V::set1(0), inverse_temperature = V::set1(problem.inverse_temperature);
    for (int v = 0; v < span.vectors; ++v) {
      const int64_t i = v * W;
      const V live = V::load(&lane->live[i]), t_y = V::load(&lane->t_y[i]);
      const V m = V::load(&lane->softmax.m[i]);
      V tx_sum = V::load(&lane->softmax.tx_sum[i]);
      if constexpr (!is_given(kTarget))
        tx_sum =
            V::fma(t_y, over_temperature<kTarget>(V::load(&lane->x_y[i]) - m, inverse_temperature), tx_sum);
      if constexpr (has_moment(kTarget))
        V::store(&lane->softmax.moment[i], V::where(live, V::load(&lane->softmax.moment[i]), zero));
      V::store(&lane->softmax.tx_sum[i], V::where(live, tx_sum, zero));
      V::store(&lane->softmax.t_sum[i], V::where(live, V::load(&lane->softmax.t_sum[i]) + t_y, zero));
      V::store(&lane->softmax.m[i], V::where(live, m, zero));
      V::store(&lane->softmax.s[i], V::where(live, V::load(&lane->softmax.s[i]), V::set1(1)));
    }
  }

  static void recall(const Problem<Acc>& problem, Span span, Lane* lane) {
    for (int64_t i = 0; i < span.lanes; ++i) {
      lane->softmax.m[i] = problem.row_max[span.position + i];
      lane->softmax.s[i] = problem.row_sum[span.position + i];
      lane->softmax.t_sum[i] = lane->t_y[i];
      if constexpr (kTarget == Target::kSmooth)
        lane->softmax.t_sum[i] += problem.prob_coeff * problem.weight_sum;
      if constexpr (kTarget == Target::kEntropy)
        if (problem.row_moment) lane->softmax.moment[i] = problem.row_moment[span.position + i];
    }
  }

  static void set_slopes(const Problem<Acc>& problem, Span span, Lane* lane) {
    for (int v = 0; v < span.vectors; ++v) {
      const int64_t left = span.lanes - v * W;
      const V row_scale = problem.row_scale ? load_part<V>(problem.row_scale + span.position + v * W, left, 0)
                                            : V::set1(problem.scale);
      const V inverse_temperature = V::set1(problem.inverse_temperature);
      const V scale = over_temperature<kTarget>(row_scale, inverse_temperature);
      const V s = V::load(&lane->softmax.s[v * W]);
      V lse_coeff = V::load(&lane->softmax.t_sum[v * W]);
      if (problem.z_loss != 0) {
        const V lse = V::load(&lane->softmax.m[v * W]) + V::log(s);
        lse_coeff = V::fma(V::set1(2 * problem.z_loss), lse, lse_coeff);
      }
      V factor = lse_coeff * scale / s;
      if constexpr (kTarget == Target::kEntropy) {
        const V upstream = problem.entropy_scale
                               ? load_part<V>(problem.entropy_scale + span.position + v * W, left, 0)
                               : V::set1(0);
        const V tilt = V::set1(0) - upstream * inverse_temperature / s;
        factor = factor - tilt * (V::load(&lane->softmax.moment[v * W]) / s);
        V::store(&lane->tilt[v * W], tilt);
      }
      V::store(&lane->factor[v * W], factor);
      V::store(&lane->scale[v * W], scale);
    }
  }
};
