// Cross entropy with positions along the vector: a lane holds one class of one position, so that no reduction
// is horizontal. For few classes (rows are transposed in registers on the way in and out) and for logits
// whose neighbouring positions are adjacent in memory (segmentation maps, transposed logits).
// A tile is up to 16 vectors of positions by kTileClasses classes; more classes come in several tiles with
// the online maximum of Milakov and Gimelshein, and the gradient recomputes the exponentials.
// Included inside an anonymous namespace, after positions-inl.h.

//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
template <class V, class S, Target kTarget>
struct Tiles : Positions<V, S, kTarget> {
  using Base = Positions<V, S, kTarget>;
  using Base::begin, Base::set_classes, Base::finish, Base::recall, Base::set_slopes, Base::of_kept;
  using Base::kLanes, Base::W;
  using typename Base::Acc, typename Base::Lane;
  using Tile = mbperf::Tile<V>;
  static constexpr int kGroup = 4;  // vectors worked at a time, so that their chains of operations overlap

  // Classes [first, first + n) of the span, from memory into the tile.
  static void load(const Problem<Acc>& problem, const void* base, const Strides& strides, Span span,
                   int64_t first, int64_t n, Tile* tile) {
    const S* p = static_cast<const S*>(base) + offset_of(strides, problem, span.position);
    tile->load(p + first * strides.classes, strides, span, n);
  }

  // Not inlined: without vectors that hold a part, it would slow down what surrounds it.
  __attribute__((noinline)) static void store(const Problem<Acc>& problem, Span span, int64_t first,
                                              int64_t n, const Tile& tile) {
    const Strides& strides = problem.grad_strides;
    S* p = static_cast<S*>(problem.grad) + offset_of(strides, problem, span.position);
    tile.store(p + first * strides.classes, strides, span, n);
  }

  // t of class c in vector v, from the tile of soft targets; without the t_y of a hard target.
  MBPERF_INLINE static V t_at(const Problem<Acc>& problem, const Tile& soft, int64_t first, int64_t c,
                              int v) {
    V t = V::set1(problem.prob_coeff);
    if constexpr (is_given(kTarget))
      t = V::fma(V::load(&soft.at[c][v * W]), V::set1(problem.target_coeff), t);
    return problem.weight ? t * V::set1(problem.weight[first + c]) : t;
  }

  // Calls body(U, v) for groups of U vectors from v on.
  template <class Body>
  MBPERF_INLINE static void for_vectors(Span span, const Body& body) {
    int v = 0;
    for (; v + kGroup <= span.vectors; v += kGroup) body(Count<kGroup>{}, v);
    for (; v < span.vectors; ++v) body(Count<1>{}, v);
  }

  // Prefetches the logits that are read from memory after this tile. One stream a class is more than the
  // hardware follows by itself.
  struct Ahead {
    const S* logits;
    int64_t per_class;

    Ahead(const Problem<Acc>& problem, Span span, int64_t first, int64_t n) {
      const Strides& strides = problem.input_strides;
      const bool last = first + n >= problem.classes;
      logits = static_cast<const S*>(problem.input) + offset_of(strides, problem, span.position) +
               (last ? span.lanes * strides.inner : (first + n) * strides.classes);
      per_class = along_positions(strides) && span.run == span.lanes ? strides.classes : span.lanes;
    }
    MBPERF_INLINE void fetch(int64_t c, int v) const { __builtin_prefetch(logits + c * per_class + v * W); }
  };

  // Raises m to the maximum so far and adds to the sums, which are 0 before a tile, those of classes [first,
  // first + n); leaves the exponentials of these in the tile.
  template <int U>
  static void read(const Problem<Acc>& problem, int v0, int64_t first, int64_t n, Ahead ahead, Tile* tile,
                   const Tile& soft, Lane* lane) {
    auto& softmax = lane->softmax;
    V m[U], centre[U], s[U], tx_sum[U], t_sum[U], y[U], x_y[U], moment[U];
    const V inverse_temperature = V::set1(problem.inverse_temperature);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) m[u] = V::load(&softmax.m[(v0 + u) * W]);
    for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) m[u] = V::max(m[u], V::load(&tile->at[c][(v0 + u) * W]));
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int i = (v0 + u) * W;
      centre[u] = V::finite_or_zero(m[u]);
      s[u] = V::load(&softmax.s[i]);
      if constexpr (spreads(kTarget))
        tx_sum[u] = V::load(&softmax.tx_sum[i]), t_sum[u] = V::load(&softmax.t_sum[i]);
      if constexpr (has_moment(kTarget)) moment[u] = V::load(&softmax.moment[i]);
      if constexpr (!is_given(kTarget)) y[u] = V::load(&lane->y[i]), x_y[u] = V::load(&lane->x_y[i]);
    }
    V class_ = V::set1(0);
    for (int64_t c = 0; c < n; ++c) {
      V e[U], z[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        ahead.fetch(c, v0 + u);
        const V x = V::load(&tile->at[c][(v0 + u) * W]);
        if constexpr (!is_given(kTarget)) x_y[u] = V::where_equal(y[u], class_, x, x_y[u]);
        z[u] = e[u] = over_temperature<kTarget>(x - centre[u], inverse_temperature);
        if constexpr (spreads(kTarget)) {
          const V t = t_at(problem, soft, first, c, v0 + u);
          tx_sum[u] = V::fma(t, e[u], tx_sum[u]);
          t_sum[u] = t_sum[u] + t;
        }
      }
      exponentials_of<S>(e);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        s[u] = s[u] + e[u];
        if constexpr (has_moment(kTarget)) moment[u] = V::fma(e[u], finite_exponent(z[u]), moment[u]);
        V::store(&tile->at[c][(v0 + u) * W], e[u]);
      }
      class_ = class_ + V::set1(1);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int i = (v0 + u) * W;
      V::store(&softmax.m[i], m[u]);
      V::store(&softmax.s[i], s[u]);
      if constexpr (spreads(kTarget))
        V::store(&softmax.tx_sum[i], tx_sum[u]), V::store(&softmax.t_sum[i], t_sum[u]);
      if constexpr (has_moment(kTarget)) V::store(&softmax.moment[i], moment[u]);
      if constexpr (!is_given(kTarget)) V::store(&lane->x_y[i], x_y[u]);
    }
  }

  // The statistics of all tiles so far, in double: summed class by class in one float a lane, 40,000 classes
  // put a smoothed loss off by 3e-5.
  using Totals = Batch<double, kLanes>;

  static void begin_totals(Span span, Totals* totals) {
    for (int64_t i = 0; i < span.vectors * W; ++i) {
      totals->m[i] = -Base::kInfinity;
      totals->s[i] = totals->tx_sum[i] = totals->t_sum[i] = totals->moment[i] = 0;
    }
  }

  // Adds the sums of a tile, whose m is the maximum so far, and clears them for the next. The second loop has
  // no branch: it is vectorised.
  __attribute__((noinline)) static void add_tile(const Problem<Acc>& problem, Span span,
                                                 Batch<Acc, kLanes>* tile, Totals* totals) {
    alignas(64) Acc shift[kLanes], ratio[kLanes];
    const int64_t lanes = span.vectors * W;
    const V inverse_temperature = V::set1(problem.inverse_temperature);
    for (int64_t i = 0; i < lanes; ++i) shift[i] = Acc(totals->m[i]);
    for (int v = 0; v < span.vectors; ++v) {
      const int64_t i = v * W;
      const V centre = V::finite_or_zero(V::load(&tile->m[i]));
      const V difference = over_temperature<kTarget>(V::load(&shift[i]) - centre, inverse_temperature);
      V::store(&shift[i], difference);
      V::store(&ratio[i], V::exp(difference));
    }
    for (int64_t i = 0; i < lanes; ++i) {
      totals->m[i] = tile->m[i];
      if constexpr (has_moment(kTarget)) {
        totals->moment[i] =
            rebased_moment(totals->moment[i], totals->s[i], shift[i], ratio[i]) + tile->moment[i];
        tile->moment[i] = 0;
      }
      totals->s[i] = totals->s[i] * ratio[i] + tile->s[i];
      tile->s[i] = 0;
      if constexpr (spreads(kTarget)) {
        const double t_sum = totals->t_sum[i], rebased = t_sum * shift[i];
        // 0 also against an infinite shift: no classes, or classes whose t is 0.
        totals->tx_sum[i] += (t_sum == 0 || shift[i] == 0 ? 0 : rebased) + tile->tx_sum[i];
        totals->t_sum[i] = t_sum + tile->t_sum[i];
        tile->tx_sum[i] = tile->t_sum[i] = 0;
      }
    }
  }

  static void finish_totals(Span span, const Totals& totals, Batch<Acc, kLanes>* softmax) {
    for (int64_t i = 0; i < span.lanes; ++i) softmax->set(i, rounded<Acc>(totals.get(i)));
  }

  // Exponentials in the tile become the gradient of classes [first, first + n).
  template <int U>
  static void differentiate(const Problem<Acc>& problem, int v0, int64_t first, int64_t n, Tile* tile,
                            const Tile& soft, const Lane& lane) {
    V factor[U], scale[U], live[U], y[U], scaled_t_y[U];
    for (int u = 0; u < U; ++u) {
      const int i = (v0 + u) * W;
      factor[u] = V::load(&lane.factor[i]), scale[u] = V::load(&lane.scale[i]);
      live[u] = V::load(&lane.live[i]), y[u] = V::load(&lane.y[i]);
      scaled_t_y[u] = V::load(&lane.t_y[i]) * scale[u];
    }
    V class_ = V::set1(0);
    for (int64_t c = 0; c < n; ++c) {
      for (int u = 0; u < U; ++u) {
        Acc* at = &tile->at[c][(v0 + u) * W];
        V g = of_kept(V::load(at), factor[u]);
        if constexpr (spreads(kTarget)) g = g - t_at(problem, soft, first, c, v0 + u) * scale[u];
        if constexpr (!is_given(kTarget)) g = V::where_equal(y[u], class_, g - scaled_t_y[u], g);
        V::store(at, V::where(live[u], g, V::set1(0)));
      }
      class_ = class_ + V::set1(1);
    }
  }

  // The gradient at class first + c of vector v, from its exponentials.
  MBPERF_INLINE static V gradient_of(const Problem<Acc>& problem, const Tile& tile, const Tile& soft,
                                     const Lane& lane, int64_t first, int64_t c, V class_, int v) {
    const int i = v * W;
    V g = of_kept(V::load(&tile.at[c][i]), V::load(&lane.factor[i]));
    if constexpr (spreads(kTarget)) g = g - t_at(problem, soft, first, c, v) * V::load(&lane.scale[i]);
    if constexpr (!is_given(kTarget)) {
      const V scaled_t_y = V::load(&lane.t_y[i]) * V::load(&lane.scale[i]);
      g = V::where_equal(V::load(&lane.y[i]), class_, g - scaled_t_y, g);
    }
    return V::where(V::load(&lane.live[i]), g, V::set1(0));
  }

  // Classes [first, first + n) straight into memory, where neighbouring positions are adjacent there.
  static void stream_gradient(const Problem<Acc>& problem, Span span, int64_t first, int64_t n,
                              const Tile& tile, const Tile& soft, const Lane& lane) {
    const Strides& strides = problem.grad_strides;
    S* p =
        static_cast<S*>(problem.grad) + offset_of(strides, problem, span.position) + first * strides.classes;
    const int64_t whole = span.lanes / W;
    V class_ = V::set1(0);
    for (int64_t c = 0; c < n; ++c, p += strides.classes, class_ = class_ + V::set1(1)) {
      if (problem.streaming_stores && streams<V>(p))  // asked once a class: 5 % faster than once a vector
        for (int v = 0; v < whole; ++v)
          V::stream(p + v * W, gradient_of(problem, tile, soft, lane, first, c, class_, v));
      else
        for (int v = 0; v < whole; ++v)
          V::store(p + v * W, gradient_of(problem, tile, soft, lane, first, c, class_, v));
      if (whole < span.vectors)
        V::store_n(p + whole * W, gradient_of(problem, tile, soft, lane, first, c, class_, int(whole)),
                   span.lanes - whole * W);
    }
  }

  static void exponentiate(const Problem<Acc>& problem, Span span, int64_t n, Tile* tile, const Lane& lane) {
    const V inverse_temperature = V::set1(problem.inverse_temperature);
    for (int v = 0; v < span.vectors; ++v) {
      const V m = V::load(&lane.softmax.m[v * W]), factor = V::load(&lane.factor[v * W]);
      const V tilt = kTarget == Target::kEntropy ? V::load(&lane.tilt[v * W]) : V::set1(0);
      for (int64_t c = 0; c < n; ++c) {
        const V z = over_temperature<kTarget>(V::load(&tile->at[c][v * W]) - m, inverse_temperature);
        V e = exponential_of<S>(z);
        if constexpr (kTarget == Target::kEntropy) e = e * factor_at<kTarget>(z, factor, tilt);
        V::store(&tile->at[c][v * W], e);
      }
    }
  }

  static int64_t tile_size(const Problem<Acc>& problem, int64_t first) {
    return problem.classes - first < kTileClasses ? problem.classes - first : kTileClasses;
  }

  static void load_soft(const Problem<Acc>& problem, Span span, int64_t first, int64_t n, Tile* soft) {
    if constexpr (is_given(kTarget))
      load(problem, problem.soft_target, problem.soft_strides, span, first, n, soft);
  }

  // Sets the sums of t to those of soft targets, where m and s are known.
  static void sum_soft(const Problem<Acc>& problem, Span span, Tile* soft, Lane* lane) {
    double t_sum[kLanes] = {};
    for (int64_t c = 0; c < problem.classes; c += kTileClasses) {
      const int64_t n = tile_size(problem, c);
      load_soft(problem, span, c, n, soft);
      for (int v = 0; v < span.vectors; ++v) {
        V of_tile = V::set1(0);
        for (int64_t i = 0; i < n; ++i) of_tile = of_tile + t_at(problem, *soft, c, i, v);
        for (int64_t i = 0; i < W; ++i) t_sum[v * W + i] += of_tile.raw[i];
      }
    }
    for (int64_t i = 0; i < span.lanes; ++i) lane->softmax.t_sum[i] = Acc(t_sum[i]);
  }

  // Statistics of the span, without the hard targets; the last tile is left in `tile` and `soft`. Inlined, so
  // that the compiler sees that these do not lie over the problem: else smoothing reloads it for every class.
  MBPERF_INLINE static void read_span(const Problem<Acc>& problem, Span span, Tile* tile, Tile* soft,
                                      Lane* lane) {
    Totals totals;
    const bool several_tiles = problem.classes > kTileClasses;
    if (several_tiles) begin_totals(span, &totals);
    for (int64_t c = 0; c < problem.classes; c += kTileClasses) {
      const int64_t n = tile_size(problem, c);
      load_soft(problem, span, c, n, soft);
      load(problem, problem.input, problem.input_strides, span, c, n, tile);
      set_classes(problem, span, c, lane);
      const Ahead ahead(problem, span, c, n);
      for_vectors(span, [&](auto count, int v) { read<count>(problem, v, c, n, ahead, tile, *soft, lane); });
      if (several_tiles) add_tile(problem, span, &lane->softmax, &totals);
    }
    if (several_tiles) finish_totals(span, totals, &lane->softmax);
  }

  static void one_span(const Problem<Acc>& problem, Span span, typename V::Wide* total) {
    Tile tile, soft;
    Lane lane;
    begin(problem, span, &lane);
    if (problem.known_softmax) {
      recall(problem, span, &lane);
      if constexpr (is_given(kTarget)) sum_soft(problem, span, &soft, &lane);
    } else {
      read_span(problem, span, &tile, &soft, &lane);
      finish(problem, span, &lane);
    }
    if (problem.grad) write_gradient(problem, span, &tile, &soft, &lane);
    if (!problem.known_softmax) finish_losses<V>(problem, span.position, span.lanes, lane.softmax, total);
  }

  static void write_gradient(const Problem<Acc>& problem, Span span, Tile* tile, Tile* soft, Lane* lane) {
    const bool kept = !problem.known_softmax && problem.classes <= kTileClasses;
    set_slopes(problem, span, lane);
    for (int64_t c = 0; c < problem.classes; c += kTileClasses) {
      const int64_t n = tile_size(problem, c);
      if (!kept) {
        load(problem, problem.input, problem.input_strides, span, c, n, tile);
        load_soft(problem, span, c, n, soft);
        exponentiate(problem, span, n, tile, *lane);
        set_classes(problem, span, c, lane);
      }
      if (along_positions(problem.grad_strides) && span.run == span.lanes) {
        stream_gradient(problem, span, c, n, *tile, *soft, *lane);
      } else {
        for_vectors(span,
                    [&](auto count, int v) { differentiate<count>(problem, v, c, n, tile, *soft, *lane); });
        store(problem, span, c, n, *tile);
      }
    }
  }

  static double run(const Problem<Acc>& problem, int64_t begin, int64_t end) {
    const bool along = along_positions(problem.input_strides);
    const bool joins = along && (!problem.grad || along_positions(problem.grad_strides)) &&
                       (!is_given(kTarget) || along_positions(problem.soft_strides));
    typename V::Wide total{};
    over_spans<W>(problem, begin, end, along ? kLanes : kGroup * W, joins,
                  [&](Span span) { one_span(problem, span, &total); });
    V::fence();
    return sum_of_lanes<V>(total);
  }
};
