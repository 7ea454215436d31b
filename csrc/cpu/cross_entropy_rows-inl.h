// Cross entropy with the classes of a row along the vector: one horizontal reduction a row.
// A row of at most kBlock classes keeps its exponentials in the first-level cache; a longer one is worked
// block by block, each with its own maximum, and its gradient computes them again: one more read of a row
// that is still in cache, no write. Included inside an anonymous namespace, after vector-inl.h.

// How q, the target distribution of a row, is spread: one class; that class and a constant; any way.
enum class Target { kHard, kSmooth, kSoft };

// q_c for W classes from `c`; `left` of them are real. Soft probabilities come in as `soft`.
template <class V, Target kTarget>
MBPERF_INLINE V spread_share(const Task<typename V::Scalar>& task, V soft, int64_t c, int64_t left) {
  V q = V::set1(task.smooth_share);
  if constexpr (kTarget == Target::kSoft) q = V::fma(soft, V::set1(task.hard_share), q);
  if (task.weight) q = q * load_part<V>(task.weight + c, left, 0);
  return q;
}

template <class Acc>
MBPERF_INLINE int64_t offset_of(const Strides& strides, const Task<Acc>& task, int64_t position) {
  if (task.inner == task.positions) return position * strides.inner;  // two divisions saved a row
  return position / task.inner * strides.outer + position % task.inner * strides.inner;
}

template <class Acc>
MBPERF_INLINE Acc hard_share(const Task<Acc>& task, int64_t y) {
  return task.weight ? task.hard_share * task.weight[y] : task.hard_share;
}

template <class V>
MBPERF_INLINE typename V::Scalar scalar_at(const typename V::Scalar* p) {
  return *p;
}
template <class V, class S>
MBPERF_INLINE typename V::Scalar scalar_at(const S* p) {
  return V::load_n(p, 1, 0).raw[0];
}

// Statistics of positions, whose logarithms are taken together.
constexpr int64_t kBatch = 64;
template <class Acc, int kSize = kBatch>
struct alignas(64) Batch {
  Acc max[kSize], sum[kSize], linear[kSize], mass[kSize];

  void set(int64_t i, const Softmax<Acc>& row) {
    max[i] = row.max;
    sum[i] = row.sum;
    linear[i] = row.linear;
    mass[i] = row.mass;
  }
};

// Writes losses and statistics of the positions [begin, begin + n); returns the losses' sum.
template <class V, int kSize>
inline double finish_losses(const Task<typename V::Scalar>& task, int64_t begin, int64_t n,
                            const Batch<typename V::Scalar, kSize>& batch) {
  double total = 0;
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const int64_t left = n - i, p = begin + i;
    const V max = load_part<V>(batch.max + i, left, 0), sum = load_part<V>(batch.sum + i, left, 1);
    const V log_sum = V::log(sum);
    V loss = load_part<V>(batch.mass + i, left, 0) * log_sum - load_part<V>(batch.linear + i, left, 0);
    if (task.z_loss != 0) {
      const V lse = max + log_sum;
      loss = V::fma(V::set1(task.z_loss) * lse, lse, loss);
    }
    if (task.loss) store_part(task.loss + p, loss, left);
    if (task.row_max) store_part(task.row_max + p, max, left);
    if (task.row_sum) store_part(task.row_sum + p, sum, left);
    total += V::reduce_add(loss);
  }
  return total;
}

// d(result)/d(x_c) = e_c factor - q_c scale, with e_c = exp(x_c - max)
template <class Acc>
struct Slope {
  Acc factor, scale;
};

template <class V, class Acc>
inline Slope<Acc> slope_of(const Task<Acc>& task, int64_t position, const Softmax<Acc>& row) {
  const Acc scale = task.row_scale ? task.row_scale[position] : task.scale;
  Acc rise = row.mass;
  if (task.z_loss != 0) rise += 2 * task.z_loss * (row.max + V::log(V::set1(row.sum)).raw[0]);
  return {rise * scale / row.sum, scale};
}

template <class V, class S, Target kTarget>
struct Rows {
  using Acc = typename V::Scalar;
  static constexpr int W = V::kWidth;
  static constexpr int kUnroll = 4;  // independent accumulators hide the latency of max, add and fma
  static constexpr Acc kInfinity = __builtin_inff();

  // Classes [first, first + n) of one row, copied to `packed` where they are not adjacent.
  static const S* block_of(const Task<Acc>& task, const void* base, const Strides& strides, int64_t position,
                           int64_t first, int64_t n, S* packed) {
    const S* p = static_cast<const S*>(base) + offset_of(strides, task, position) + first * strides.classes;
    if (strides.classes == 1) return p;
    for (int64_t i = 0; i < n; ++i) packed[i] = p[i * strides.classes];
    return packed;
  }

  MBPERF_INLINE static Acc exp_of(Acc x) { return V::exp(V::set1(x)).raw[0]; }

  static Acc logit(const Task<Acc>& task, int64_t position, int64_t c) {
    const S* x = static_cast<const S*>(task.input) + offset_of(task.input_strides, task, position);
    return scalar_at<V>(x + c * task.input_strides.classes);
  }

  MBPERF_INLINE static V soft_part(const S* soft, int64_t i, int64_t left) {
    return kTarget == Target::kSoft ? load_part<V>(soft + i, left, 0) : V::set1(0);
  }

  MBPERF_INLINE static Acc block_max(const S* x, int64_t n) {
    V m[kUnroll];
    for (auto& v : m) v = V::set1(-kInfinity);
    int64_t i = 0;
    for (; i + kUnroll * W <= n; i += kUnroll * W)
      for (int u = 0; u < kUnroll; ++u) m[u] = V::max(m[u], V::load(x + i + u * W));
    for (; i < n; i += W) m[0] = V::max(m[0], load_part<V>(x + i, n - i, -kInfinity));
    return V::reduce_max(V::max(V::max(m[0], m[1]), V::max(m[2], m[3])));
  }

  // Statistics of classes [first, first + n); exponentials into `e` unless it is nullptr. Meanwhile what lies
  // `ahead` elements further on comes into the cache: without, memory would idle while we compute.
  template <bool kKeep>
  static Softmax<Acc> statistics(const Task<Acc>& task, const S* x, const S* soft, int64_t first, int64_t n,
                                 int64_t ahead, Acc* e) {
    const Acc max = block_max(x, n);
    const V centre = V::set1(finite(max));
    V sum[kUnroll], linear[kUnroll], mass[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = linear[u] = mass[u] = V::set1(0);
    auto step = [&](int u, int64_t i) __attribute__((always_inline)) {
      __builtin_prefetch(x + i + ahead);
      const V centred = V::load(x + i) - centre;
      const V exponential = V::exp(centred);
      sum[u] = sum[u] + exponential;
      if (kKeep) V::store(e + i, exponential);
      if constexpr (kTarget != Target::kHard) {
        const V q = spread_share<V, kTarget>(task, soft_part(soft, i, W), first + i, W);
        linear[u] = V::fma(q, centred, linear[u]);
        mass[u] = mass[u] + q;
      }
    };
    int64_t i = 0;
    for (; i + kUnroll * W <= n; i += kUnroll * W)
      for (int u = 0; u < kUnroll; ++u) step(u, i + u * W);
    for (; i + W <= n; i += W) step(0, i);
    if (i < n) {
      const V exponential = V::exp(V::load_n(x + i, n - i, -kInfinity) - centre);
      sum[1] = sum[1] + exponential;
      if (kKeep) V::store_n(e + i, exponential, n - i);
      if constexpr (kTarget != Target::kHard) {
        // Filled with the centre, so that lanes past the end add 0 to `linear` and not 0 * -inf.
        const V centred = V::load_n(x + i, n - i, finite(max)) - centre;
        const V q = spread_share<V, kTarget>(task, soft_part(soft, i, n - i), first + i, n - i);
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

  static Softmax<Acc> with_hard_target(const Task<Acc>& task, int64_t position, Softmax<Acc> row) {
    if constexpr (kTarget != Target::kSoft) {
      const int64_t y = task.target[position];
      const Acc q = hard_share(task, y);
      row.linear += q * (logit(task, position, y) - row.max);
      row.mass += q;
    }
    return row;
  }

  static Softmax<Acc> merged(const Task<Acc>& task, int64_t position, const Softmax<double>& row) {
    return with_hard_target(task, position, {Acc(row.max), Acc(row.sum), Acc(row.linear), Acc(row.mass)});
  }

  static bool ignored(const Task<Acc>& task, int64_t position) {
    return kTarget != Target::kSoft && task.target[position] == task.ignore_index;
  }
  static constexpr Softmax<Acc> kIgnored{0, 1, 0, 0};

  // Gradient of classes [first, first + n) into g, from the exponentials `e` (kKept) or again from x.
  // `at_target` is that of class first + y, rounded once; set in the register, since storing it afterwards
  // would fetch back a line that went past the caches.
  template <bool kKept>
  static void gradient(const Task<Acc>& task, const S* x, const Acc* e, const S* soft, int64_t first,
                       int64_t n, Acc max, Slope<Acc> slope, int64_t y, Acc at_target, S* g) {
    const V factor = V::set1(slope.factor), scale = V::set1(slope.scale), centre = V::set1(max);
    auto value = [&](int64_t i, int64_t left) __attribute__((always_inline)) {
      if (!kKept) __builtin_prefetch(x + i + task.input_strides.inner);
      const V exponential =
          kKept ? load_part<V>(e + i, left, 0) : V::exp(load_part<V>(x + i, left, max) - centre);
      V v = exponential * factor;
      if constexpr (kTarget != Target::kHard)
        v = v - spread_share<V, kTarget>(task, soft_part(soft, i, left), first + i, left) * scale;
      if constexpr (kTarget != Target::kSoft)
        if (uint64_t(y - i) < uint64_t(W)) v = V::with_lane(v, y - i, at_target);
      return v;
    };
    int64_t i = 0;
    constexpr int64_t kBytes = W * sizeof(S);
    if (task.streaming_stores) {
      const int64_t misaligned = reinterpret_cast<uintptr_t>(g) % kBytes;
      if (misaligned) i = (kBytes - misaligned) / int64_t(sizeof(S));
      if (i > n) i = n;
      for (int64_t h = 0; h < i; h += W) V::store_n(g + h, value(h, i - h), i - h);
      for (; i + W <= n; i += W) V::stream(g + i, value(i, W));
    }
    for (; i + kUnroll * W <= n; i += kUnroll * W)
      for (int u = 0; u < kUnroll; ++u) V::store(g + i + u * W, value(i + u * W, W));
    for (; i + W <= n; i += W) V::store(g + i, value(i, W));
    if (i < n) V::store_n(g + i, value(i, n - i), n - i);
  }

  // The gradient at the hard target's class: the whole value again, so that it is rounded once.
  static Acc target_gradient(const Task<Acc>& task, int64_t position, int64_t y, Acc max, Slope<Acc> slope) {
    const Acc v = exp_of(logit(task, position, y) - max) * slope.factor - hard_share(task, y) * slope.scale;
    if constexpr (kTarget == Target::kHard) return v;
    return v - spread_share<V, kTarget>(task, V::set1(0), y, 1).raw[0] * slope.scale;
  }

  static int64_t block_size(const Task<Acc>& task, int64_t block) {
    const int64_t left = task.classes - block * kBlock;
    return left < kBlock ? left : kBlock;
  }

  // One block of one row: its gradient, from `kept` exponentials or computed again.
  template <bool kKept>
  static void write_block(const Task<Acc>& task, int64_t position, int64_t block, const S* x, const Acc* kept,
                          Acc max, Slope<Acc> slope) {
    S packed[2][kBlock];
    const int64_t first = block * kBlock, n = block_size(task, block);
    const S* soft = nullptr;
    if constexpr (kTarget == Target::kSoft)
      soft = block_of(task, task.soft_target, task.soft_strides, position, first, n, packed[0]);
    const int64_t stride = task.grad_strides.classes;
    S* g = static_cast<S*>(task.grad) + offset_of(task.grad_strides, task, position) + first * stride;
    const int64_t y = kTarget == Target::kSoft ? -1 : task.target[position] - first;
    const Acc at_target = y >= 0 && y < n ? target_gradient(task, position, first + y, max, slope) : Acc(0);
    gradient<kKept>(task, x, kept, soft, first, n, max, slope, y, at_target, stride == 1 ? g : packed[1]);
    if (stride != 1)
      for (int64_t i = 0; i < n; ++i) g[i * stride] = packed[1][i];
  }

  // How far from a block lies the one that is read from memory next: the rest of the row, or the next row.
  static int64_t ahead_of(const Task<Acc>& task, int64_t block) {
    return (block + 1) * kBlock < task.classes ? kBlock : task.input_strides.inner - block * kBlock;
  }

  template <bool kKeep>
  static Softmax<Acc> read_block(const Task<Acc>& task, int64_t position, int64_t block, const S* x,
                                 Acc* kept) {
    S packed[kTarget == Target::kSoft ? kBlock : 1];
    const int64_t first = block * kBlock, n = block_size(task, block);
    const S* soft = nullptr;
    if constexpr (kTarget == Target::kSoft)
      soft = block_of(task, task.soft_target, task.soft_strides, position, first, n, packed);
    return statistics<kKeep>(task, x, soft, first, n, ahead_of(task, block), kept);
  }

  static const S* logits_of(const Task<Acc>& task, int64_t position, int64_t block, S* packed) {
    return block_of(task, task.input, task.input_strides, position, block * kBlock, block_size(task, block),
                    packed);
  }

  static Softmax<Acc> block_statistics(const Task<Acc>& task, int64_t position, int64_t block) {
    if (ignored(task, position)) return kIgnored;
    S packed[kBlock];
    return read_block<false>(task, position, block, logits_of(task, position, block, packed), nullptr);
  }

  static void block_gradient(const Task<Acc>& task, int64_t position, int64_t block,
                             const Softmax<Acc>& row) {
    if (ignored(task, position)) return zero_block(task, position, block);
    const Slope<Acc> slope = slope_of<V>(task, position, row);
    S packed[kBlock];
    const S* x = logits_of(task, position, block, packed);
    write_block<false>(task, position, block, x, nullptr, row.max, slope);
  }

  static void zero_block(const Task<Acc>& task, int64_t position, int64_t block) {
    const int64_t stride = task.grad_strides.classes, first = block * kBlock;
    S* g = static_cast<S*>(task.grad) + offset_of(task.grad_strides, task, position) + first * stride;
    for (int64_t i = 0; i < block_size(task, block); ++i) g[i * stride] = S{};
  }

  static Softmax<Acc> known_softmax(const Task<Acc>& task, int64_t position) {
    Acc mass = task.smooth_share * task.weight_sum;
    if constexpr (kTarget == Target::kSoft) {
      S packed[kBlock];
      V total = V::set1(0);
      for (int64_t b = 0; b < block_count(task.classes); ++b) {
        const int64_t n = block_size(task, b);
        const S* soft = block_of(task, task.soft_target, task.soft_strides, position, b * kBlock, n, packed);
        for (int64_t i = 0; i < n; i += W)
          total = total + V::first_lanes(spread_share<V, kTarget>(task, soft_part(soft, i, n - i),
                                                                  b * kBlock + i, n - i),
                                         n - i);
      }
      mass = V::reduce_add(total);
    } else {
      mass += hard_share(task, task.target[position]);
    }
    return {task.row_max[position], task.row_sum[position], 0, mass};
  }

  static Softmax<Acc> short_row(const Task<Acc>& task, int64_t position) {
    S packed[kBlock];
    Acc kept[kBlock];
    const S* x = logits_of(task, position, 0, packed);
    if (!task.grad) return with_hard_target(task, position, read_block<false>(task, position, 0, x, nullptr));
    const Softmax<Acc> row = with_hard_target(task, position, read_block<true>(task, position, 0, x, kept));
    const Slope<Acc> slope = slope_of<V>(task, position, row);
    write_block<true>(task, position, 0, x, kept, row.max, slope);
    return row;
  }

  static Softmax<Acc> long_row(const Task<Acc>& task, int64_t position) {
    const Softmax<Acc> first = block_statistics(task, position, 0);
    Softmax<double> row{first.max, first.sum, first.linear, first.mass};
    for (int64_t b = 1; b < block_count(task.classes); ++b) absorb(&row, block_statistics(task, position, b));
    return merged(task, position, row);
  }

  static Softmax<Acc> one_row(const Task<Acc>& task, int64_t position) {
    const bool skip = ignored(task, position);
    if (!skip && !task.known_softmax && task.classes <= kBlock) return short_row(task, position);
    const Softmax<Acc> row = skip                 ? kIgnored
                             : task.known_softmax ? known_softmax(task, position)
                                                  : long_row(task, position);
    if (task.grad)
      for (int64_t b = 0; b < block_count(task.classes); ++b) block_gradient(task, position, b, row);
    return row;
  }

  static double run(const Task<Acc>& task, int64_t begin, int64_t end) {
    Batch<Acc> batch;
    double total = 0;
    for (int64_t p = begin; p < end; p += kBatch) {
      const int64_t n = end - p < kBatch ? end - p : kBatch;
      for (int64_t i = 0; i < n; ++i) batch.set(i, one_row(task, p + i));
      if (!task.known_softmax) total += finish_losses<V>(task, p, n, batch);
    }
    V::fence();
    return total;
  }

  // One row spread over threads.
  static Softmax<Acc> merge_blocks(const Task<Acc>& task, int64_t position, const Softmax<Acc>* blocks) {
    if (ignored(task, position)) return kIgnored;
    if (task.known_softmax) return known_softmax(task, position);
    Softmax<double> row{blocks[0].max, blocks[0].sum, blocks[0].linear, blocks[0].mass};
    for (int64_t b = 1; b < block_count(task.classes); ++b) absorb(&row, blocks[b]);
    return merged(task, position, row);
  }
};
