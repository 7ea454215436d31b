// KL divergence with the classes of a row along the vector: one horizontal reduction a sum and row.
// A row of at most kPairBlock classes keeps its exponentials in the first-level cache. A longer one is worked
// block by block, each with its own maxima, and its gradient computes them again from a row that is still in
// cache; half precision, where that is most of the time, keeps them in the second-level cache. Included
// inside an anonymous namespace, after pairs-inl.h and blocks-inl.h.

//   d = sum exp((z_c - m_z) / T) ((z_c - m_z) - (x_c - m_x)),  loss = d / (T s_z) + log(s_x / s_z)
//   grad_c = (q_c - p_c) scale / T
template <class V, class S>
struct KlDivRows {
  using Acc = typename V::Scalar;
  using Problem = KlDivProblem<Acc>;
  using Sums = PairSums<Acc>;
  using OneRow = Blocks<V, S, Target::kHard>;
  static constexpr int W = V::kWidth;
  static constexpr int kUnroll = 2;  // of either side: four chains of operations
  static constexpr int kStored = 4;  // vectors of gradients
  static constexpr bool kHalf = sizeof(S) == 2;
  static constexpr Acc kInfinity = __builtin_inff();

  // Classes of one block of one row.
  struct Block {
    const S *x, *z;
    int64_t n;
  };

  static Block block_at(const Problem& problem, int64_t row, int64_t block) {
    const int64_t first = block * kPairBlock, left = problem.classes - first;
    return {static_cast<const S*>(problem.student) + row * problem.student_stride + first,
            static_cast<const S*>(problem.teacher) + row * problem.teacher_stride + first,
            left < kPairBlock ? left : kPairBlock};
  }

  // Elements from a block to the one that is read from memory next: in the same row, or in the next row.
  struct Ahead {
    int64_t x, z;
  };
  static Ahead ahead_of(const Problem& problem, int64_t block) {
    const int64_t first = block * kPairBlock;
    if (first + kPairBlock < problem.classes) return {kPairBlock, kPairBlock};
    return {problem.student_stride - first, problem.teacher_stride - first};
  }

  static Sums maxima(const Block& block) {
    return {OneRow::block_max(block.x, block.n), 0, OneRow::block_max(block.z, block.n), 0, 0};
  }

  // The sums of a block whose maxima are known; exponentials into e_x and e_z if kKeep.
  // Prefetches the logits `ahead`: without, memory would idle during the arithmetic.
  template <bool kKeep>
  static Sums sums(const Problem& problem, const Block& block, Ahead ahead, Sums maxima, Acc* e_x, Acc* e_z) {
    const V m_x = V::set1(OneRow::finite(maxima.m_x)), m_z = V::set1(OneRow::finite(maxima.m_z)),
            inverse_temperature = V::set1(problem.inverse_temperature);
    auto step = [&](auto& totals, auto& e, int64_t i, int64_t left) __attribute__((always_inline)) {
      constexpr int U = sizeof(e) / sizeof(V) / 2;
      for (int u = 0; u < U; ++u) {
        const int64_t k = i + u * W;
        if (!kHalf || u % 2 == 0) {
          __builtin_prefetch(block.x + k + ahead.x);
          __builtin_prefetch(block.z + k + ahead.z);
        }
        e[u] = load_part<V>(block.x + k, left, -kInfinity) - m_x;
        e[U + u] = load_part<V>(block.z + k, left, -kInfinity) - m_z;
      }
      totals.template add<S>(e, inverse_temperature);
      for (int u = 0; u < U && kKeep; ++u) {
        store_part(e_x + i + u * W, e[u], left);
        store_part(e_z + i + u * W, e[U + u], left);
      }
    };
    PairVectors<V, kUnroll> several;
    PairVectors<V, 1> one;
    V both[2 * kUnroll], pair[2];
    int64_t i = 0;
    for (; i + kUnroll * W <= block.n; i += kUnroll * W) step(several, both, i, W);
    for (; i < block.n; i += W) step(one, pair, i, block.n - i);
    auto total = [](const V* v, V last) { return V::reduce_add((v[0] + v[1]) + last); };
    return {maxima.m_x, total(several.s_x, one.s_x[0]), maxima.m_z, total(several.s_z, one.s_z[0]),
            total(several.d, one.d[0])};
  }

  // exp((m - row_m) / T), for a maximum that is at most the row's.
  static Acc shift_of(const Problem& problem, Acc m, Acc row_m) {
    return OneRow::exp_of((m - row_m) * problem.inverse_temperature);
  }

  // Merges the sums of one more block into `row`. A block without exponentials has finite differences alone.
  static void absorb(const Problem& problem, PairSums<double>* row, const Sums& block) {
    const auto larger = [](double a, double b) { return a > b ? a : b; };
    const Acc m_x = Acc(larger(row->m_x, block.m_x)), m_z = Acc(larger(row->m_z, block.m_z));
    const auto finite = [](double m) { return double(OneRow::finite(Acc(m))); };
    const auto rebase = [&](auto& sums) {
      const double shift = (finite(sums.m_z) - finite(m_z)) - (finite(sums.m_x) - finite(m_x));
      const double factor_x = shift_of(problem, Acc(sums.m_x), OneRow::finite(m_x)),
                   factor_z = shift_of(problem, Acc(sums.m_z), OneRow::finite(m_z));
      const double s_x = sums.s_x * factor_x, s_z = sums.s_z * factor_z;
      return PairSums<double>{m_x, s_x, m_z, s_z, factor_z == 0 ? 0 : factor_z * sums.d + s_z * shift};
    };
    const PairSums<double> before = rebase(*row), more = rebase(block);
    *row = {m_x, before.s_x + more.s_x, m_z, before.s_z + more.s_z, before.d + more.d};
  }

  static Sums merged(const Problem& problem, const Sums* blocks, int64_t count) {
    PairSums<double> row = blocks[0].template as<double>();
    for (int64_t b = 1; b < count; ++b) absorb(problem, &row, blocks[b]);
    return row.as<Acc>();
  }

  // Writes n gradients to g, past the caches where the problem asks for that. values(v, i, left) sets the
  // vectors of v to those from class i on, `left` of them real.
  template <class Values>
  MBPERF_INLINE static void write(const Problem& problem, S* g, int64_t n, const Values& values) {
    V several[kStored], one[1];
    int64_t i = 0;
    if (problem.streaming_stores) {
      constexpr int64_t kRun = kHalf ? 2 * W : W;  // elements that fill a vector as it is stored
      const int64_t misaligned = reinterpret_cast<uintptr_t>(g) % (kRun * sizeof(S));
      if (misaligned) i = kRun - misaligned / int64_t(sizeof(S));
      if (i > n) i = n;
      for (int64_t h = 0; h < i; h += W) {
        values(one, h, i - h);
        store_part(g + h, one[0], i - h);
      }
      for (; i + kStored * W <= n; i += kStored * W) {
        values(several, i, W);
        for (int u = 0; u < kStored; u += kHalf ? 2 : 1)
          kHalf ? V::stream_two(g + i + u * W, several[u], several[u + 1])
                : V::stream(g + i + u * W, several[u]);
      }
    }
    for (; i + kStored * W <= n; i += kStored * W) {
      values(several, i, W);
      for (int u = 0; u < kStored; u += kHalf ? 2 : 1)
        kHalf ? V::store_two(g + i + u * W, several[u], several[u + 1]) : V::store(g + i + u * W, several[u]);
    }
    for (; i < n; i += W) {
      values(one, i, n - i);
      store_part(g + i, one[0], n - i);
    }
  }

  static S* gradient_at(const Problem& problem, int64_t row, int64_t block) {
    return static_cast<S*>(problem.grad) + row * problem.classes + block * kPairBlock;
  }

  // From kept exponentials.
  static void write_kept(const Problem& problem, S* g, int64_t n, const Acc* e_x, const Acc* e_z,
                         PairFactors<Acc> factors) {
    const PairFactors<V> both{V::set1(factors.x), V::set1(factors.z)};
    write(problem, g, n, [&](auto& v, int64_t i, int64_t left) __attribute__((always_inline)) {
      constexpr int U = sizeof(v) / sizeof(V);
      for (int u = 0; u < U; ++u)
        v[u] =
            gradient_of(load_part<V>(e_x + i + u * W, left, 0), load_part<V>(e_z + i + u * W, left, 0), both);
    });
  }

  // From the logits again, relative to m_x and m_z.
  static void write_again(const Problem& problem, S* g, const Block& block, Acc m_x, Acc m_z,
                          PairFactors<Acc> factors) {
    const PairFactors<V> both{V::set1(factors.x), V::set1(factors.z)};
    const V centre_x = V::set1(m_x), centre_z = V::set1(m_z),
            inverse_temperature = V::set1(problem.inverse_temperature);
    write(problem, g, block.n, [&](auto& v, int64_t i, int64_t left) __attribute__((always_inline)) {
      constexpr int U = sizeof(v) / sizeof(V);
      V e[2 * U];
      for (int u = 0; u < U; ++u) {
        e[u] = (load_part<V>(block.x + i + u * W, left, m_x) - centre_x) * inverse_temperature;
        e[U + u] = (load_part<V>(block.z + i + u * W, left, m_z) - centre_z) * inverse_temperature;
      }
      exponentials_of<S>(e);
      for (int u = 0; u < U; ++u) v[u] = gradient_of(e[u], e[U + u], both);
    });
  }

  // The factors of exponentials relative to a block's maxima instead of the row's.
  static PairFactors<Acc> shifted(const Problem& problem, PairFactors<Acc> factors, const Sums& block,
                                  const Sums& row) {
    return {factors.x * shift_of(problem, block.m_x, row.m_x),
            factors.z * shift_of(problem, block.m_z, row.m_z)};
  }

  static Sums block_sums(const Problem& problem, int64_t row, int64_t index) {
    const Block block = block_at(problem, row, index);
    return sums<false>(problem, block, ahead_of(problem, index), maxima(block), nullptr, nullptr);
  }

  // Half precision takes exponentials relative to the block's own maxima, as long_row_kept does: which of
  // the two runs depends on the number of threads, the result must not.
  static void block_gradient(const Problem& problem, int64_t row, int64_t index, const Sums& merged) {
    const Block block = block_at(problem, row, index);
    const PairFactors<Acc> factors = factors_of(problem, row, merged);
    S* const g = gradient_at(problem, row, index);
    if constexpr (kHalf) {
      const Sums m = maxima(block);
      write_again(problem, g, block, OneRow::finite(m.m_x), OneRow::finite(m.m_z),
                  shifted(problem, factors, m, merged));
    } else {
      write_again(problem, g, block, merged.m_x, merged.m_z, factors);
    }
  }

  static Sums long_row(const Problem& problem, int64_t row) {
    const int64_t count = pair_block_count(problem.classes);
    PairSums<double> all = block_sums(problem, row, 0).template as<double>();
    for (int64_t b = 1; b < count; ++b) absorb(problem, &all, block_sums(problem, row, b));
    const Sums sums = all.as<Acc>();
    for (int64_t b = 0; b < count && problem.grad; ++b) block_gradient(problem, row, b, sums);
    return sums;
  }

  static Sums long_row_kept(const Problem& problem, int64_t row) {
    alignas(64) Acc e_x[kMostKeptBlocks * kPairBlock], e_z[kMostKeptBlocks * kPairBlock];
    Sums blocks[kMostKeptBlocks];
    const int64_t count = pair_block_count(problem.classes);
    int64_t b = 0;
    do {
      const Block block = block_at(problem, row, b);
      blocks[b] = sums<true>(problem, block, ahead_of(problem, b), maxima(block), e_x + b * kPairBlock,
                             e_z + b * kPairBlock);
    } while (++b < count);
    const Sums all = merged(problem, blocks, count);
    const PairFactors<Acc> factors = factors_of(problem, row, all);
    for (b = 0; b < count; ++b)
      write_kept(problem, gradient_at(problem, row, b), block_at(problem, row, b).n, e_x + b * kPairBlock,
                 e_z + b * kPairBlock, shifted(problem, factors, blocks[b], all));
    return all;
  }

  static int64_t rows_per_step(const Problem& problem) {
    const int64_t rows = kPairBlock / pitch_of<W>(problem.classes);
    return rows < 1 ? 1 : rows > kBatch ? kBatch : rows;
  }

  // n rows of one block each, sums into the batch from `at` on. Each step runs over all rows before the next:
  // within a row it would wait for the reduction of the step before.
  static void short_rows(const Problem& problem, int64_t row, int64_t n, PairBatch<Acc>* batch, int64_t at) {
    alignas(64) Acc e_x[kPairBlock], e_z[kPairBlock];
    Sums of[kBatch];
    const int64_t pitch = pitch_of<W>(problem.classes), step = rows_per_step(problem);
    const Ahead ahead{step * problem.student_stride, step * problem.teacher_stride};
    const auto read = problem.grad ? sums<true> : sums<false>;
    for (int64_t i = 0; i < n; ++i) of[i] = maxima(block_at(problem, row + i, 0));
    for (int64_t i = 0; i < n; ++i) {
      of[i] = read(problem, block_at(problem, row + i, 0), ahead, of[i], e_x + i * pitch, e_z + i * pitch);
      batch->set(at + i, of[i]);
    }
    for (int64_t i = 0; i < n && problem.grad; ++i)
      write_kept(problem, gradient_at(problem, row + i, 0), problem.classes, e_x + i * pitch, e_z + i * pitch,
                 factors_of(problem, row + i, of[i]));
  }

  static double run(const Problem& problem, int64_t begin, int64_t end) {
    PairBatch<Acc> batch;
    typename V::Wide total{};
    const bool is_short = problem.classes <= kPairBlock;
    const bool keeps = kHalf && problem.grad && pair_block_count(problem.classes) <= kMostKeptBlocks;
    const int64_t step = rows_per_step(problem);
    for (int64_t r = begin; r < end; r += kBatch) {
      const int64_t n = end - r < kBatch ? end - r : kBatch;
      for (int64_t i = 0; i < n && is_short; i += step)
        short_rows(problem, r + i, n - i < step ? n - i : step, &batch, i);
      for (int64_t i = 0; i < n && !is_short; ++i)
        batch.set(i, keeps ? long_row_kept(problem, r + i) : long_row(problem, r + i));
      finish_pairs<V>(problem, r, n, batch, &total);
    }
    V::fence();
    return sum_of_lanes<V>(total);
  }

  // One row from its blocks.
  static double merge_blocks(const Problem& problem, int64_t row, const Sums* blocks, Sums* result) {
    *result = merged(problem, blocks, pair_block_count(problem.classes));
    PairBatch<Acc> batch;
    batch.set(0, *result);
    typename V::Wide total{};
    finish_pairs<V>(problem, row, 1, batch, &total);
    return sum_of_lanes<V>(total);
  }
};
