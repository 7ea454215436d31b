// Cross entropy with the classes of a row along the vector: one horizontal reduction a row.
// A row of at most kBlock classes keeps its exponentials in the first-level cache; a longer one is worked
// block by block, each with its own maximum. Its gradient computes them again, one more read of a row that is
// still in cache; in half precision, where that is most of the time, it fetches them from the second level.
// Included inside an anonymous namespace, after blocks-inl.h.

template <class V, class S, Target kTarget>
struct Rows : Blocks<V, S, kTarget> {
  using Base = Blocks<V, S, kTarget>;
  using Base::absorb, Base::ahead_of, Base::block_gradient, Base::block_max, Base::block_of, Base::block_size;
  using Base::block_statistics, Base::ignored, Base::logits_of, Base::merged, Base::soft_part;
  using Base::W, Base::kHalf, Base::kIgnored;
  using Base::with_hard_target, Base::zero_block;
  using typename Base::Acc;

  static Softmax<Acc> known_softmax(const Problem<Acc>& problem, int64_t position) {
    Acc mass = problem.prob_coeff * problem.weight_sum;
    if constexpr (kTarget == Target::kSoft) {
      S packed[kBlock];
      V total = V::set1(0);
      for (int64_t b = 0; b < block_count(problem.classes); ++b) {
        const int64_t n = block_size(problem, b);
        const S* soft =
            block_of(problem, problem.soft_target, problem.soft_strides, position, b * kBlock, n, packed);
        for (int64_t i = 0; i < n; i += W)
          total = total + V::first_lanes(spread_share<V, kTarget>(problem, soft_part(soft, i, n - i),
                                                                  b * kBlock + i, n - i),
                                         n - i);
      }
      mass = V::reduce_add(total);
    } else {
      mass += target_coeff(problem, problem.target[position]);
    }
    return {problem.row_max[position], problem.row_sum[position], 0, mass};
  }

  // Elements of the short rows that take turns.
  static constexpr int64_t kStepElements = kHalf ? kBlock : kBlock / 2;
  static int64_t rows_at_once(const Problem<Acc>& problem) {
    const int64_t rows = kStepElements / pitch_of<W>(problem.classes);
    return rows < 1 ? 1 : rows > kBatch ? kBatch : rows;
  }

  static Softmax<Acc> read_short(const Problem<Acc>& problem, int64_t position, const S* x, Acc max,
                                 Acc* kept) {
    if (ignored(problem, position)) return kIgnored;
    const int64_t ahead = rows_at_once(problem) * problem.input_strides.inner;
    const auto read = problem.grad ? Base::template read_block<true> : Base::template read_block<false>;
    return with_hard_target(problem, position, read(problem, position, 0, x, ahead, max, kept));
  }

  static void write_short(const Problem<Acc>& problem, int64_t position, const Acc* kept,
                          const Softmax<Acc>& row) {
    if (ignored(problem, position)) return zero_block(problem, position, 0);
    const Slope<Acc> slope = slope_of<V>(problem, position, row);
    Base::template write_block<true>(problem, position, 0, nullptr, kept, row.max, slope);
  }

  // n rows of one block each, statistics into the batch from `at` on. They take turns step by step: within a
  // row each step waits for the last one's reduction.
  static void short_rows(const Problem<Acc>& problem, int64_t position, int64_t n, Batch<Acc>* batch,
                         int64_t at) {
    S packed[kBlock];
    alignas(64) Acc kept[kBlock];
    const S* x[kBatch];
    Acc max[kBatch];
    const int64_t pitch = pitch_of<W>(problem.classes);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = nullptr, max[i] = 0;
      if (ignored(problem, position + i)) continue;
      x[i] = logits_of(problem, position + i, 0, packed + i * pitch);
      max[i] = block_max(x[i], problem.classes);
    }
    for (int64_t i = 0; i < n; ++i)
      batch->set(at + i, read_short(problem, position + i, x[i], max[i], kept + i * pitch));
    if (!problem.grad) return;
    for (int64_t i = 0; i < n; ++i) write_short(problem, position + i, kept + i * pitch, batch->get(at + i));
  }

  static Softmax<Acc> long_row(const Problem<Acc>& problem, int64_t position) {
    const Softmax<Acc> first = block_statistics(problem, position, 0);
    Softmax<double> row{first.max, first.sum, first.linear, first.mass};
    for (int64_t b = 1; b < block_count(problem.classes); ++b)
      absorb(&row, block_statistics(problem, position, b));
    return merged(problem, position, row);
  }

  // The longest row whose exponentials are kept: they take half a second-level cache of 1 MiB.
  static constexpr int64_t kMostKept = 32 * kBlock;

  // Of one block: statistics, and exponentials relative to its own maximum into `kept`.
  static Softmax<Acc> keep_block(const Problem<Acc>& problem, int64_t position, int64_t block, Acc* kept) {
    S packed[kBlock];
    const S* x = logits_of(problem, position, block, packed);
    const Acc max = block_max(x, block_size(problem, block));
    return Base::template read_block<true>(problem, position, block, x, ahead_of(problem, block), max, kept);
  }

  static Softmax<Acc> long_row_kept(const Problem<Acc>& problem, int64_t position) {
    alignas(64) Acc kept[kMostKept];
    Softmax<Acc> blocks[kMostKept / kBlock];
    const int64_t count = block_count(problem.classes);
    int64_t b = 0;
    do blocks[b] = keep_block(problem, position, b, kept + b * kBlock);
    while (++b < count);
    const Softmax<Acc> row = merge_blocks(problem, position, blocks);
    const Slope<Acc> slope = slope_of<V>(problem, position, row);
    for (b = 0; b < count; ++b) {
      const Acc max = blocks[b].max;
      Base::template write_block<true>(problem, position, b, nullptr, kept + b * kBlock, max,
                                       Base::shifted(slope, max, row.max));
    }
    return row;
  }

  static Softmax<Acc> one_row(const Problem<Acc>& problem, int64_t position) {
    const bool skip = ignored(problem, position);
    if (kHalf && !skip && !problem.known_softmax && problem.grad && problem.classes <= kMostKept)
      return long_row_kept(problem, position);
    const Softmax<Acc> row = skip                    ? kIgnored
                             : problem.known_softmax ? known_softmax(problem, position)
                                                     : long_row(problem, position);
    if (problem.grad)
      for (int64_t b = 0; b < block_count(problem.classes); ++b) block_gradient(problem, position, b, row);
    return row;
  }

  static double run(const Problem<Acc>& problem, int64_t begin, int64_t end) {
    Batch<Acc> batch;
    typename V::Wide total{};
    const bool is_short = !problem.known_softmax && problem.classes <= kBlock;
    const int64_t turns = rows_at_once(problem);
    for (int64_t p = begin; p < end; p += kBatch) {
      const int64_t n = end - p < kBatch ? end - p : kBatch;
      for (int64_t i = 0; i < n && !is_short; ++i) batch.set(i, one_row(problem, p + i));
      for (int64_t i = 0; i < n && is_short; i += turns)
        short_rows(problem, p + i, n - i < turns ? n - i : turns, &batch, i);
      if (!problem.known_softmax) finish_losses<V>(problem, p, n, batch, &total);
    }
    V::fence();
    return sum_of_lanes<V>(total);
  }

  // One row from its blocks.
  static Softmax<Acc> merge_blocks(const Problem<Acc>& problem, int64_t position,
                                   const Softmax<Acc>* blocks) {
    if (ignored(problem, position)) return kIgnored;
    if (problem.known_softmax) return known_softmax(problem, position);
    Softmax<double> row{blocks[0].max, blocks[0].sum, blocks[0].linear, blocks[0].mass};
    for (int64_t b = 1; b < block_count(problem.classes); ++b) absorb(&row, blocks[b]);
    return merged(problem, position, row);
  }
};
