// One block of at most kBlock classes of a row of cross entropy, with the classes along the vector.
// Included inside an anonymous namespace, after terms-inl.h and ordered_halves-inl.h.

//   m = max x_c,  s = sum exp(x_c - m),  tx_sum = sum t_c (x_c - m),  t_sum = sum t_c    over the block
//   grad_c = exp(x_c - m) factor - t_c scale    (Slope)
template <class V, class S, Target kTarget>
struct Blocks {
  using Acc = typename V::Scalar;
  static constexpr int W = V::kWidth;
  static constexpr int kUnroll = 4;  // independent accumulators hide the latency of max, add and fma
  static constexpr bool kHalf = sizeof(S) == 2;
  static constexpr Acc kInfinity = __builtin_inff();

  // Classes [first, first + n) of one row, copied to `packed` where they are not adjacent.
  static const S* block_of(const Problem<Acc>& problem, const void* base, const Strides& strides,
                           int64_t position, int64_t first, int64_t n, S* packed) {
    const S* p =
        static_cast<const S*>(base) + offset_of(strides, problem, position) + first * strides.classes;
    if (strides.classes == 1) return p;
    for (int64_t i = 0; i < n; ++i) packed[i] = p[i * strides.classes];
    return packed;
  }

  MBPERF_INLINE static Acc exp_of(Acc x) { return V::exp(V::set1(x)).raw[0]; }

  static Acc logit(const Problem<Acc>& problem, int64_t position, int64_t c) {
    const S* x = static_cast<const S*>(problem.input) + offset_of(problem.input_strides, problem, position);
    return scalar_at<V>(x + c * problem.input_strides.classes);
  }

  MBPERF_INLINE static V soft_part(const S* soft, int64_t i, int64_t left) {
    return is_given(kTarget) ? load_part<V>(soft + i, left, 0) : V::set1(0);
  }

  MBPERF_INLINE static Acc block_max(const S* x, int64_t n) {
    if constexpr (kHalf)
      if (n >= 2 * W) return largest_half<V>(x, n);
    V m[kUnroll];
    for (auto& v : m) v = V::set1(-kInfinity);
    int64_t i = 0;
    for (; i + kUnroll * W <= n; i += kUnroll * W)
      for (int u = 0; u < kUnroll; ++u) m[u] = V::max(m[u], V::load(x + i + u * W));
    for (; i < n; i += W) m[0] = V::max(m[0], load_part<V>(x + i, n - i, -kInfinity));
    return V::reduce_max(V::max(V::max(m[0], m[1]), V::max(m[2], m[3])));
  }

  // Statistics of classes [first, first + n), the largest of which is m; exponentials into `e` if kKeep.
  // Prefetches the logits `ahead` elements later: without, memory would idle during the arithmetic.
  template <bool kKeep>
  static Softmax<Acc> statistics(const Problem<Acc>& problem, const S* x, const S* soft, int64_t first,
                                 int64_t n, int64_t ahead, Acc m, Acc* e) {
    const V centre = V::set1(finite(m)), inverse_temperature = V::set1(problem.inverse_temperature);
    V s[kUnroll], tx_sum[kUnroll], t_sum[kUnroll], moment[kUnroll];
    for (int u = 0; u < kUnroll; ++u) s[u] = tx_sum[u] = t_sum[u] = moment[u] = V::set1(0);
    auto steps = [&](auto& e_of, int64_t i) __attribute__((always_inline)) {
      constexpr int U = sizeof(e_of) / sizeof(V);
      V z[U];
      for (int u = 0; u < U; ++u) {
        if (!kHalf || u % 2 == 0) __builtin_prefetch(x + i + u * W + ahead);
        z[u] = e_of[u] = over_temperature<kTarget>(V::load(x + i + u * W) - centre, inverse_temperature);
        if constexpr (spreads(kTarget)) {
          const V t = t_of_classes<V, kTarget>(problem, soft_part(soft, i + u * W, W), first + i + u * W, W);
          tx_sum[u] = V::fma(t, e_of[u], tx_sum[u]);
          t_sum[u] = t_sum[u] + t;
        }
      }
      exponentials_of<S>(e_of);
      for (int u = 0; u < U; ++u) {
        s[u] = s[u] + e_of[u];
        if constexpr (has_moment(kTarget)) moment[u] = V::fma(e_of[u], finite_exponent(z[u]), moment[u]);
        if (kKeep) V::store(e + i + u * W, e_of[u]);
      }
    };
    V several[kUnroll], one[1];
    int64_t i = 0;
    for (; i + kUnroll * W <= n; i += kUnroll * W) steps(several, i);
    for (; i + W <= n; i += W) steps(one, i);
    if (i < n) {
      const V z =
          over_temperature<kTarget>(V::load_n(x + i, n - i, -kInfinity) - centre, inverse_temperature);
      one[0] = z;
      exponentials_of<S>(one);
      s[1] = s[1] + one[0];
      if constexpr (has_moment(kTarget)) moment[1] = V::fma(one[0], finite_exponent(z), moment[1]);
      if (kKeep) V::store_n(e + i, one[0], n - i);
      if constexpr (spreads(kTarget)) {
        // Filled with the centre, so that lanes past the end add 0 to tx_sum and not 0 * -inf.
        const V centred = V::load_n(x + i, n - i, finite(m)) - centre;
        const V t = t_of_classes<V, kTarget>(problem, soft_part(soft, i, n - i), first + i, n - i);
        tx_sum[1] = V::fma(t, centred, tx_sum[1]);
        t_sum[1] = t_sum[1] + V::first_lanes(t, n - i);
      }
    }
    auto total = [](const V* v) { return V::reduce_add((v[0] + v[1]) + (v[2] + v[3])); };
    const Acc moment_sum = has_moment(kTarget) ? total(moment) : 0;
    if constexpr (spreads(kTarget)) return {m, total(s), total(tx_sum), total(t_sum), moment_sum};
    return {m, total(s), 0, 0, moment_sum};
  }

  // Subtracting this instead of a maximum of -inf leaves exp(-inf) = 0 rather than NaN.
  static Acc finite(Acc m) { return m == -kInfinity ? Acc(0) : m; }

  // Merges the statistics of one more block of a row into `row`.
  static void absorb(const Problem<Acc>& problem, Softmax<double>* row, const Softmax<Acc>& block) {
    const double m = block.m > row->m ? double(block.m) : row->m;
    const double centre = finite(Acc(m));
    const double shift = over_temperature<kTarget>(problem, row->m - centre),
                 block_shift = over_temperature<kTarget>(problem, block.m - centre);
    const double ratio = exp_of(Acc(shift)), block_ratio = exp_of(Acc(block_shift));
    if constexpr (has_moment(kTarget))
      row->moment = rebased_moment(row->moment, row->s, shift, ratio) +
                    rebased_moment(double(block.moment), double(block.s), block_shift, block_ratio);
    row->s = row->s * ratio + block.s * block_ratio;
    if constexpr (spreads(kTarget)) {
      if (shift != 0) row->tx_sum += row->t_sum * shift;
      row->tx_sum += block_shift == 0 ? double(block.tx_sum) : block.tx_sum + block.t_sum * block_shift;
      row->t_sum += block.t_sum;
    }
    row->m = m;
  }

  static Softmax<Acc> with_hard_target(const Problem<Acc>& problem, int64_t position, Softmax<Acc> row) {
    if constexpr (!is_given(kTarget)) {
      const int64_t y = problem.target[position];
      const Acc t = target_coeff(problem, y);
      row.tx_sum += t * over_temperature<kTarget>(problem, logit(problem, position, y) - row.m);
      row.t_sum += t;
    }
    return row;
  }

  static Softmax<Acc> merged(const Problem<Acc>& problem, int64_t position, const Softmax<double>& row) {
    return with_hard_target(problem, position, rounded<Acc>(row));
  }

  static bool ignored(const Problem<Acc>& problem, int64_t position) {
    return !is_given(kTarget) && problem.target[position] == problem.ignore_index;
  }
  static constexpr Softmax<Acc> kIgnored{0, 1, 0, 0, 0};

  // Gradient of classes [first, first + n) into g, from the exponentials `e` (kKept) or again from x.
  // g_y is the gradient of class first + y, rounded once. It is stored last, which costs no branch that
  // cannot be predicted; where lines go past the caches it is set in the register, since a store would fetch
  // one back.
  template <bool kKept>
  static void gradient(const Problem<Acc>& problem, const S* x, const Acc* e, const S* soft, int64_t first,
                       int64_t n, Acc m, Slope<Acc> slope, int64_t y, Acc g_y, S* g) {
    const V factor = V::set1(slope.factor), minus_scale = V::set1(-slope.scale), centre = V::set1(m);
    const V tilt = V::set1(slope.tilt), inverse_temperature = V::set1(problem.inverse_temperature);
    // The gradients of the vectors from class i on, `left` classes of them real, without the t_y of the
    // target.
    auto values = [&](auto& v, int64_t i, int64_t left) __attribute__((always_inline)) {
      constexpr int U = sizeof(v) / sizeof(V);
      V z[U];
      for (int u = 0; u < U; ++u)
        z[u] = v[u] = kKept ? load_part<V>(e + i + u * W, left, 0)
                            : over_temperature<kTarget>(load_part<V>(x + i + u * W, left, m) - centre,
                                                        inverse_temperature);
      if constexpr (!kKept) exponentials_of<S>(v);
      for (int u = 0; u < U; ++u) {
        v[u] = v[u] * factor_at<kTarget>(z[u], factor, tilt);
        if constexpr (spreads(kTarget))
          v[u] = V::fma(
              t_of_classes<V, kTarget>(problem, soft_part(soft, i + u * W, left), first + i + u * W, left),
              minus_scale, v[u]);
      }
    };
    auto set_target = [&](auto& v, int64_t i) __attribute__((always_inline)) {
      constexpr int U = sizeof(v) / sizeof(V);
      if (uint64_t(y - i) >= uint64_t(U * W)) return;
      for (int u = 0; u < U; ++u)
        if (uint64_t(y - i - u * W) < uint64_t(W)) v[u] = V::with_lane(v[u], y - i - u * W, g_y);
    };
    auto fetch = [&](int64_t i) __attribute__((always_inline)) {
      constexpr int64_t kLine = 64 / sizeof(S);
      for (int64_t j = 0; !kKept && j < kUnroll * W; j += kLine)
        __builtin_prefetch(x + i + j + problem.input_strides.inner);
    };
    V several[kUnroll], one[1];
    int64_t i = 0;
    if (problem.streaming_stores) {
      constexpr int64_t kRun = kHalf ? 2 * W : W;  // elements that fill a vector as it is stored
      const int64_t misaligned = reinterpret_cast<uintptr_t>(g) % (kRun * sizeof(S));
      if (misaligned) i = kRun - misaligned / int64_t(sizeof(S));
      if (i > n) i = n;
      for (int64_t h = 0; h < i; h += W) {
        values(one, h, i - h);
        set_target(one, h);
        store_part(g + h, one[0], i - h);
      }
      for (; i + kUnroll * W <= n; i += kUnroll * W) {
        fetch(i);
        values(several, i, W);
        set_target(several, i);
        for (int u = 0; u < kUnroll; u += kHalf ? 2 : 1)
          kHalf ? V::stream_two(g + i + u * W, several[u], several[u + 1])
                : V::stream(g + i + u * W, several[u]);
      }
    }
    const int64_t stored = i;
    for (; i + kUnroll * W <= n; i += kUnroll * W) {
      fetch(i);
      values(several, i, W);
      for (int u = 0; u < kUnroll; u += kHalf ? 2 : 1)
        kHalf ? V::store_two(g + i + u * W, several[u], several[u + 1]) : V::store(g + i + u * W, several[u]);
    }
    for (; i < n; i += W) {
      values(one, i, n - i);
      store_part(g + i, one[0], n - i);
    }
    if (y >= stored && y < n) V::store_n(g + y, V::set1(g_y), 1);
  }

  // g_y, the gradient at the hard target's class, from its z and exponential: the whole value, rounded once.
  static Acc target_gradient(const Problem<Acc>& problem, int64_t y, Acc z, Acc exponential,
                             Slope<Acc> slope) {
    const Acc factor = factor_at<kTarget>(V::set1(z), V::set1(slope.factor), V::set1(slope.tilt)).raw[0];
    const Acc v = exponential * factor - target_coeff(problem, y) * slope.scale;
    if constexpr (!spreads(kTarget)) return v;
    return v - t_of_classes<V, kTarget>(problem, V::set1(0), y, 1).raw[0] * slope.scale;
  }

  static int64_t block_size(const Problem<Acc>& problem, int64_t block) {
    const int64_t left = problem.classes - block * kBlock;
    return left < kBlock ? left : kBlock;
  }

  // One block of one row: its gradient, from `kept` exponentials or computed again.
  template <bool kKept>
  static void write_block(const Problem<Acc>& problem, int64_t position, int64_t block, const S* x,
                          const Acc* kept, Acc m, Slope<Acc> slope) {
    S packed[2][kBlock];
    const int64_t first = block * kBlock, n = block_size(problem, block);
    const S* soft = nullptr;
    if constexpr (is_given(kTarget))
      soft = block_of(problem, problem.soft_target, problem.soft_strides, position, first, n, packed[0]);
    const int64_t stride = problem.grad_strides.classes;
    S* g =
        static_cast<S*>(problem.grad) + offset_of(problem.grad_strides, problem, position) + first * stride;
    const int64_t y = is_given(kTarget) ? -1 : problem.target[position] - first;
    Acc g_y = 0;
    if (y >= 0 && y < n) {
      const Acc z = kKept ? 0 : over_temperature<kTarget>(problem, logit(problem, position, first + y) - m);
      const Acc e = kKept ? kept[y] : exponential_of<S>(V::set1(z)).raw[0];
      g_y = target_gradient(problem, first + y, z, e, slope);
    }
    gradient<kKept>(problem, x, kept, soft, first, n, m, slope, y, g_y, stride == 1 ? g : packed[1]);
    if (stride != 1)
      for (int64_t i = 0; i < n; ++i) g[i * stride] = packed[1][i];
  }

  // The distance from a block to the one that is read from memory next: in the same row, or in the next row.
  static int64_t ahead_of(const Problem<Acc>& problem, int64_t block) {
    return (block + 1) * kBlock < problem.classes ? kBlock : problem.input_strides.inner - block * kBlock;
  }

  template <bool kKeep>
  static Softmax<Acc> read_block(const Problem<Acc>& problem, int64_t position, int64_t block, const S* x,
                                 int64_t ahead, Acc m, Acc* kept) {
    S packed[is_given(kTarget) ? kBlock : 1];
    const int64_t first = block * kBlock, n = block_size(problem, block);
    const S* soft = nullptr;
    if constexpr (is_given(kTarget))
      soft = block_of(problem, problem.soft_target, problem.soft_strides, position, first, n, packed);
    return statistics<kKeep>(problem, x, soft, first, n, ahead, m, kept);
  }

  static const S* logits_of(const Problem<Acc>& problem, int64_t position, int64_t block, S* packed) {
    return block_of(problem, problem.input, problem.input_strides, position, block * kBlock,
                    block_size(problem, block), packed);
  }

  static Softmax<Acc> block_statistics(const Problem<Acc>& problem, int64_t position, int64_t block) {
    if (ignored(problem, position)) return kIgnored;
    S packed[kBlock];
    const S* x = logits_of(problem, position, block, packed);
    const Acc m = block_max(x, block_size(problem, block));
    return read_block<false>(problem, position, block, x, ahead_of(problem, block), m, nullptr);
  }

  // The slope for exponentials relative to m instead of the row's maximum row_m.
  static Slope<Acc> shifted(Slope<Acc> slope, Acc m, Acc row_m) {
    return {slope.factor * exp_of(m - row_m), slope.scale, 0};
  }

  // Half precision takes exponentials relative to the block's own maximum, as long_row_kept does: which of
  // the two runs depends on the number of threads, the result must not. With an entropy none are kept.
  static constexpr bool kRelativeToBlock = kHalf && kTarget != Target::kEntropy;
  static void block_gradient(const Problem<Acc>& problem, int64_t position, int64_t block,
                             const Softmax<Acc>& row) {
    if (ignored(problem, position)) return zero_block(problem, position, block);
    const Slope<Acc> slope = slope_of<V, kTarget>(problem, position, row);
    S packed[kBlock];
    const S* x = logits_of(problem, position, block, packed);
    const Acc m = kRelativeToBlock ? block_max(x, block_size(problem, block)) : row.m;
    write_block<false>(problem, position, block, x, nullptr, kRelativeToBlock ? finite(m) : m,
                       kRelativeToBlock ? shifted(slope, m, row.m) : slope);
  }

  static void zero_block(const Problem<Acc>& problem, int64_t position, int64_t block) {
    const int64_t stride = problem.grad_strides.classes, first = block * kBlock;
    S* g =
        static_cast<S*>(problem.grad) + offset_of(problem.grad_strides, problem, position) + first * stride;
    for (int64_t i = 0; i < block_size(problem, block); ++i) g[i * stride] = S{};
  }
};
