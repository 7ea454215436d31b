// Cross entropy with positions along the vector: lane p holds one class of position p, so that no reduction
// is horizontal. For few classes (rows are transposed in registers on the way in and out) and for logits
// whose neighbouring positions are adjacent in memory (segmentation maps, transposed logits).
// A tile is up to 16 vectors of positions by kTileClasses classes; more classes come in several tiles with
// the online maximum of Milakov and Gimelshein, and the gradient recomputes the exponentials.
// Included inside an anonymous namespace, after positions-inl.h.

template <class V, class S, Target kTarget>
struct Tiles : Positions<V, S, kTarget> {
  using Base = Positions<V, S, kTarget>;
  using Base::begin, Base::aim, Base::finish, Base::recall, Base::set_slopes;
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

  // q of class c in vector v, from the tile of soft targets.
  MBPERF_INLINE static V share(const Problem<Acc>& problem, const Tile& soft, int64_t first, int64_t c,
                               int v) {
    V q = V::set1(problem.prob_coeff);
    if constexpr (kTarget == Target::kSoft)
      q = V::fma(V::load(&soft.at[c][v * W]), V::set1(problem.target_coeff), q);
    return problem.weight ? q * V::set1(problem.weight[first + c]) : q;
  }

  // Calls body(U, v) for groups of U vectors from v on.
  template <class Body>
  MBPERF_INLINE static void for_vectors(Span span, const Body& body) {
    int v = 0;
    for (; v + kGroup <= span.vectors; v += kGroup) body(Count<kGroup>{}, v);
    for (; v < span.vectors; ++v) body(Count<1>{}, v);
  }

  // Logits that are read from memory next: brought into the cache while this tile is worked. One stream a
  // class is more than the hardware follows by itself.
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

  // Takes in classes [first, first + n); leaves their exponentials in the tile.
  template <int U>
  static void absorb(const Problem<Acc>& problem, int v0, int64_t first, int64_t n, Ahead ahead, Tile* tile,
                     const Tile& soft, Lane* lane) {
    auto& softmax = lane->softmax;
    V max[U], centre[U], sum[U], linear[U], mass[U], target[U], at_target[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) max[u] = V::load(&softmax.max[(v0 + u) * W]);
    for (int64_t c = 0; c < n; ++c)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) max[u] = V::max(max[u], V::load(&tile->at[c][(v0 + u) * W]));
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int i = (v0 + u) * W;
      centre[u] = V::finite_or_zero(max[u]);
      sum[u] = V::load(&softmax.sum[i]);
      if constexpr (kTarget != Target::kHard)
        linear[u] = V::load(&softmax.linear[i]), mass[u] = V::load(&softmax.mass[i]);
      if constexpr (kTarget != Target::kSoft)
        target[u] = V::load(&lane->target[i]), at_target[u] = V::load(&lane->at_target[i]);
      if (first > 0) {
        const V shift = V::load(&softmax.max[i]) - centre[u];
        sum[u] = sum[u] * V::exp(shift);
        if constexpr (kTarget != Target::kHard) linear[u] = linear[u] + V::product_or_zero(mass[u], shift);
      }
    }
    V class_ = V::set1(0);
    for (int64_t c = 0; c < n; ++c) {
      V e[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        ahead.fetch(c, v0 + u);
        const V x = V::load(&tile->at[c][(v0 + u) * W]);
        if constexpr (kTarget != Target::kSoft)
          at_target[u] = V::where_equal(target[u], class_, x, at_target[u]);
        e[u] = x - centre[u];
        if constexpr (kTarget != Target::kHard) {
          const V q = share(problem, soft, first, c, v0 + u);
          linear[u] = V::fma(q, e[u], linear[u]);
          mass[u] = mass[u] + q;
        }
      }
      exponentials_of<S>(e);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        sum[u] = sum[u] + e[u];
        V::store(&tile->at[c][(v0 + u) * W], e[u]);
      }
      class_ = class_ + V::set1(1);
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const int i = (v0 + u) * W;
      V::store(&softmax.max[i], max[u]);
      V::store(&softmax.sum[i], sum[u]);
      if constexpr (kTarget != Target::kHard)
        V::store(&softmax.linear[i], linear[u]), V::store(&softmax.mass[i], mass[u]);
      if constexpr (kTarget != Target::kSoft) V::store(&lane->at_target[i], at_target[u]);
    }
  }

  // Exponentials in the tile become the gradient of classes [first, first + n).
  template <int U>
  static void differentiate(const Problem<Acc>& problem, int v0, int64_t first, int64_t n, Tile* tile,
                            const Tile& soft, const Lane& lane) {
    V factor[U], scale[U], live[U], target[U], target_grad[U];
    for (int u = 0; u < U; ++u) {
      const int i = (v0 + u) * W;
      factor[u] = V::load(&lane.factor[i]), scale[u] = V::load(&lane.scale[i]);
      live[u] = V::load(&lane.live[i]), target[u] = V::load(&lane.target[i]);
      target_grad[u] = V::load(&lane.hard[i]) * scale[u];
    }
    V class_ = V::set1(0);
    for (int64_t c = 0; c < n; ++c) {
      for (int u = 0; u < U; ++u) {
        Acc* at = &tile->at[c][(v0 + u) * W];
        V g = V::load(at) * factor[u];
        if constexpr (kTarget != Target::kHard) g = g - share(problem, soft, first, c, v0 + u) * scale[u];
        if constexpr (kTarget != Target::kSoft) g = V::where_equal(target[u], class_, g - target_grad[u], g);
        V::store(at, V::where(live[u], g, V::set1(0)));
      }
      class_ = class_ + V::set1(1);
    }
  }

  // The gradient at class first + c of vector v, from its exponentials.
  MBPERF_INLINE static V gradient_of(const Problem<Acc>& problem, const Tile& tile, const Tile& soft,
                                     const Lane& lane, int64_t first, int64_t c, V class_, int v) {
    const int i = v * W;
    V g = V::load(&tile.at[c][i]) * V::load(&lane.factor[i]);
    if constexpr (kTarget != Target::kHard)
      g = g - share(problem, soft, first, c, v) * V::load(&lane.scale[i]);
    if constexpr (kTarget != Target::kSoft) {
      const V target_grad = V::load(&lane.hard[i]) * V::load(&lane.scale[i]);
      g = V::where_equal(V::load(&lane.target[i]), class_, g - target_grad, g);
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

  static void exponentiate(Span span, int64_t n, Tile* tile, const Lane& lane) {
    for (int v = 0; v < span.vectors; ++v) {
      const V max = V::load(&lane.softmax.max[v * W]);
      for (int64_t c = 0; c < n; ++c)
        V::store(&tile->at[c][v * W], exponential_of<S>(V::load(&tile->at[c][v * W]) - max));
    }
  }

  static int64_t tile_size(const Problem<Acc>& problem, int64_t first) {
    return problem.classes - first < kTileClasses ? problem.classes - first : kTileClasses;
  }

  static void load_soft(const Problem<Acc>& problem, Span span, int64_t first, int64_t n, Tile* soft) {
    if constexpr (kTarget == Target::kSoft)
      load(problem, problem.soft_target, problem.soft_strides, span, first, n, soft);
  }

  static void add_soft_mass(const Problem<Acc>& problem, Span span, int64_t first, int64_t n,
                            const Tile& soft, Lane* lane) {
    for (int v = 0; v < span.vectors; ++v) {
      V mass = V::load(&lane->softmax.mass[v * W]);
      for (int64_t c = 0; c < n; ++c) mass = mass + share(problem, soft, first, c, v);
      V::store(&lane->softmax.mass[v * W], mass);
    }
  }

  static void one_span(const Problem<Acc>& problem, Span span, typename V::Wide* total) {
    Tile tile, soft;
    Lane lane;
    begin(problem, span, &lane);
    if (problem.known_softmax) recall(problem, span, &lane);
    for (int64_t c = 0; c < problem.classes; c += kTileClasses) {
      const int64_t n = tile_size(problem, c);
      if (problem.known_softmax && kTarget != Target::kSoft) break;
      load_soft(problem, span, c, n, &soft);
      if (problem.known_softmax) {
        add_soft_mass(problem, span, c, n, soft, &lane);
      } else {
        load(problem, problem.input, problem.input_strides, span, c, n, &tile);
        aim(problem, span, c, &lane);
        const Ahead ahead(problem, span, c, n);
        for_vectors(span,
                    [&](auto count, int v) { absorb<count>(problem, v, c, n, ahead, &tile, soft, &lane); });
      }
    }
    if (!problem.known_softmax) finish(span, &lane);
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
        exponentiate(span, n, tile, *lane);
        aim(problem, span, c, lane);
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
                       (kTarget != Target::kSoft || along_positions(problem.soft_strides));
    typename V::Wide total{};
    over_spans<W>(problem, begin, end, along ? kLanes : kGroup * W, joins,
                  [&](Span span) { one_span(problem, span, &total); });
    V::fence();
    return sum_of_lanes<V>(total);
  }
};
