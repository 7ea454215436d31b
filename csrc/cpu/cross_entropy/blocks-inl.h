// One block of at most kBlock classes of a row of cross entropy: its statistics and its gradient, with the
// classes along the vector. Included inside an anonymous namespace, after terms-inl.h and
// ordered_halves-inl.h.

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
    return kTarget == Target::kSoft ? load_part<V>(soft + i, left, 0) : V::set1(0);
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

  // Statistics of classes [first, first + n), the largest of which is `max`; exponentials into `e` unless it
  // is nullptr. Meanwhile what lies `ahead` elements further on comes into the cache: without, memory would
  // idle while we compute.
  template <bool kKeep>
  static Softmax<Acc> statistics(const Problem<Acc>& problem, const S* x, const S* soft, int64_t first,
                                 int64_t n, int64_t ahead, Acc max, Acc* e) {
    const V centre = V::set1(finite(max));
    V sum[kUnroll], linear[kUnroll], mass[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = linear[u] = mass[u] = V::set1(0);
    auto steps = [&](auto& e_of, int64_t i) __attribute__((always_inline)) {
      constexpr int U = sizeof(e_of) / sizeof(V);
      for (int u = 0; u < U; ++u) {
        if (!kHalf || u % 2 == 0) __builtin_prefetch(x + i + u * W + ahead);
        e_of[u] = V::load(x + i + u * W) - centre;
        if constexpr (kTarget != Target::kHard) {
          const V q = spread_share<V, kTarget>(problem, soft_part(soft, i + u * W, W), first + i + u * W, W);
          linear[u] = V::fma(q, e_of[u], linear[u]);
          mass[u] = mass[u] + q;
        }
      }
      exponentials_of<S>(e_of);
      for (int u = 0; u < U; ++u) {
        sum[u] = sum[u] + e_of[u];
        if (kKeep) V::store(e + i + u * W, e_of[u]);
      }
    };
    V several[kUnroll], one[1];
    int64_t i = 0;
    for (; i + kUnroll * W <= n; i += kUnroll * W) steps(several, i);
    for (; i + W <= n; i += W) steps(one, i);
    if (i < n) {
      one[0] = V::load_n(x + i, n - i, -kInfinity) - centre;
      exponentials_of<S>(one);
      sum[1] = sum[1] + one[0];
      if (kKeep) V::store_n(e + i, one[0], n - i);
      if constexpr (kTarget != Target::kHard) {
        // Filled with the centre, so that lanes past the end add 0 to `linear` and not 0 * -inf.
        const V centred = V::load_n(x + i, n - i, finite(max)) - centre;
        const V q = spread_share<V, kTarget>(problem, soft_part(soft, i, n - i), first + i, n - i);
        linear[1] = V::fma(q, centred, linear[1]);
        mass[1] = mass[1] + V::first_lanes(q, n - i);
      }
    }
    auto total = [](const V* v) { return V::reduce_add((v[0] + v[1]) + (v[2] + v[3])); };
    if constexpr (kTarget == Target::kHard) return {max, total(sum), 0, 0};
    return {max, total(sum), total(linear), total(mass)};
  }

  // Subtracting this instead of a maximum of -inf leaves exp(-inf) = 0 rather than NaN.
  static Acc finite(Acc max) { return max == -kInfinity ? Acc(0) : max; }

  // Merges the statistics of further classes of a row into `row`.
  static void absorb(Softmax<double>* row, const Softmax<Acc>& block) {
    const double max = block.max > row->max ? double(block.max) : row->max;
    const double centre = finite(Acc(max));
    const double shift = row->max - centre, block_shift = block.max - centre;
    row->sum = row->sum * exp_of(Acc(shift)) + block.sum * double(exp_of(Acc(block_shift)));
    if constexpr (kTarget != Target::kHard) {
      if (shift != 0) row->linear += row->mass * shift;
      row->linear += block_shift == 0 ? double(block.linear) : block.linear + block.mass * block_shift;
      row->mass += block.mass;
    }
    row->max = max;
  }

  static Softmax<Acc> with_hard_target(const Problem<Acc>& problem, int64_t position, Softmax<Acc> row) {
    if constexpr (kTarget != Target::kSoft) {
      const int64_t y = problem.target[position];
      const Acc q = target_coeff(problem, y);
      row.linear += q * (logit(problem, position, y) - row.max);
      row.mass += q;
    }
    return row;
  }

  static Softmax<Acc> merged(const Problem<Acc>& problem, int64_t position, const Softmax<double>& row) {
    return with_hard_target(problem, position, {Acc(row.max), Acc(row.sum), Acc(row.linear), Acc(row.mass)});
  }

  static bool ignored(const Problem<Acc>& problem, int64_t position) {
    return kTarget != Target::kSoft && problem.target[position] == problem.ignore_index;
  }
  static constexpr Softmax<Acc> kIgnored{0, 1, 0, 0};

  // Gradient of classes [first, first + n) into g, from the exponentials `e` (kKept) or again from x.
  // `at_target` is that of class first + y, rounded once. Stored afterwards, it costs no branch that cannot
  // be predicted; only where lines go past the caches it is set in the register, as it would fetch one back.
  template <bool kKept>
  static void gradient(const Problem<Acc>& problem, const S* x, const Acc* e, const S* soft, int64_t first,
                       int64_t n, Acc max, Slope<Acc> slope, int64_t y, Acc at_target, S* g) {
    const V factor = V::set1(slope.factor), fall = V::set1(-slope.scale), centre = V::set1(max);
    // All but the target's, of the vectors from class i on, of which `left` classes are real.
    auto values = [&](auto& v, int64_t i, int64_t left) __attribute__((always_inline)) {
      constexpr int U = sizeof(v) / sizeof(V);
      for (int u = 0; u < U; ++u)
        v[u] = kKept ? load_part<V>(e + i + u * W, left, 0) : load_part<V>(x + i + u * W, left, max) - centre;
      if constexpr (!kKept) exponentials_of<S>(v);
      for (int u = 0; u < U; ++u) {
        v[u] = v[u] * factor;
        if constexpr (kTarget != Target::kHard)
          v[u] = V::fma(
              spread_share<V, kTarget>(problem, soft_part(soft, i + u * W, left), first + i + u * W, left),
              fall, v[u]);
      }
    };
    auto set_target = [&](auto& v, int64_t i) __attribute__((always_inline)) {
      constexpr int U = sizeof(v) / sizeof(V);
      if (uint64_t(y - i) >= uint64_t(U * W)) return;
      for (int u = 0; u < U; ++u)
        if (uint64_t(y - i - u * W) < uint64_t(W)) v[u] = V::with_lane(v[u], y - i - u * W, at_target);
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
    if (y >= stored && y < n) V::store_n(g + y, V::set1(at_target), 1);
  }

  // The gradient at the hard target's class, from its exponential: the whole value, so that it is rounded
  // once.
  static Acc target_gradient(const Problem<Acc>& problem, int64_t y, Acc exponential, Slope<Acc> slope) {
    const Acc v = exponential * slope.factor - target_coeff(problem, y) * slope.scale;
    if constexpr (kTarget == Target::kHard) return v;
    return v - spread_share<V, kTarget>(problem, V::set1(0), y, 1).raw[0] * slope.scale;
  }

  static int64_t block_size(const Problem<Acc>& problem, int64_t block) {
    const int64_t left = problem.classes - block * kBlock;
    return left < kBlock ? left : kBlock;
  }

  // One block of one row: its gradient, from `kept` exponentials or computed again.
  template <bool kKept>
  static void write_block(const Problem<Acc>& problem, int64_t position, int64_t block, const S* x,
                          const Acc* kept, Acc max, Slope<Acc> slope) {
    S packed[2][kBlock];
    const int64_t first = block * kBlock, n = block_size(problem, block);
    const S* soft = nullptr;
    if constexpr (kTarget == Target::kSoft)
      soft = block_of(problem, problem.soft_target, problem.soft_strides, position, first, n, packed[0]);
    const int64_t stride = problem.grad_strides.classes;
    S* g =
        static_cast<S*>(problem.grad) + offset_of(problem.grad_strides, problem, position) + first * stride;
    const int64_t y = kTarget == Target::kSoft ? -1 : problem.target[position] - first;
    Acc at_target = 0;
    if (y >= 0 && y < n) {
      const Acc e =
          kKept ? kept[y] : exponential_of<S>(V::set1(logit(problem, position, first + y) - max)).raw[0];
      at_target = target_gradient(problem, first + y, e, slope);
    }
    gradient<kKept>(problem, x, kept, soft, first, n, max, slope, y, at_target, stride == 1 ? g : packed[1]);
    if (stride != 1)
      for (int64_t i = 0; i < n; ++i) g[i * stride] = packed[1][i];
  }

  // How far from a block lies the one that is read from memory next: the rest of the row, or the next row.
  static int64_t ahead_of(const Problem<Acc>& problem, int64_t block) {
    return (block + 1) * kBlock < problem.classes ? kBlock : problem.input_strides.inner - block * kBlock;
  }

  template <bool kKeep>
  static Softmax<Acc> read_block(const Problem<Acc>& problem, int64_t position, int64_t block, const S* x,
                                 int64_t ahead, Acc max, Acc* kept) {
    S packed[kTarget == Target::kSoft ? kBlock : 1];
    const int64_t first = block * kBlock, n = block_size(problem, block);
    const S* soft = nullptr;
    if constexpr (kTarget == Target::kSoft)
      soft = block_of(problem, problem.soft_target, problem.soft_strides, position, first, n, packed);
    return statistics<kKeep>(problem, x, soft, first, n, ahead, max, kept);
  }

  static const S* logits_of(const Problem<Acc>& problem, int64_t position, int64_t block, S* packed) {
    return block_of(problem, problem.input, problem.input_strides, position, block * kBlock,
                    block_size(problem, block), packed);
  }

  static Softmax<Acc> block_statistics(const Problem<Acc>& problem, int64_t position, int64_t block) {
    if (ignored(problem, position)) return kIgnored;
    S packed[kBlock];
    const S* x = logits_of(problem, position, block, packed);
    const Acc max = block_max(x, block_size(problem, block));
    return read_block<false>(problem, position, block, x, ahead_of(problem, block), max, nullptr);
  }

  // The slope where exponentials are relative to `max` instead of the row's maximum.
  static Slope<Acc> shifted(Slope<Acc> slope, Acc max, Acc row_max) {
    return {slope.factor * exp_of(max - row_max), slope.scale};
  }

  // In half precision relative to the block's own maximum, as where exponentials are kept: whether they are
  // depends on the number of threads, the result must not.
  static void block_gradient(const Problem<Acc>& problem, int64_t position, int64_t block,
                             const Softmax<Acc>& row) {
    if (ignored(problem, position)) return zero_block(problem, position, block);
    const Slope<Acc> slope = slope_of<V>(problem, position, row);
    S packed[kBlock];
    const S* x = logits_of(problem, position, block, packed);
    const Acc max = kHalf ? block_max(x, block_size(problem, block)) : row.max;
    write_block<false>(problem, position, block, x, nullptr, kHalf ? finite(max) : max,
                       kHalf ? shifted(slope, max, row.max) : slope);
  }

  static void zero_block(const Problem<Acc>& problem, int64_t position, int64_t block) {
    const int64_t stride = problem.grad_strides.classes, first = block * kBlock;
    S* g =
        static_cast<S*>(problem.grad) + offset_of(problem.grad_strides, problem, position) + first * stride;
    for (int64_t i = 0; i < block_size(problem, block); ++i) g[i * stride] = S{};
  }
};
