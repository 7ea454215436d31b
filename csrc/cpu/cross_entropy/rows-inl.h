// Cross entropy with the classes of a row along the vector: one horizontal reduction a row.
// A row of at most kBlock classes keeps its exponentials in the first-level cache. A longer one is worked
// block by block, each with its own m, and its gradient computes them again from a row that is still in
// cache; half precision, where that is most of the time, keeps them in the second-level cache. Included
// inside an anonymous namespace, after blocks-inl.h.

//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s
//   loss = log(s) sum t_c - sum t_c (x_c - m),  grad_c = p_c sum t_c - t_c    (z loss and scale: problem.h)
template <class V, class S, Target kTarget>
struct Rows : Blocks<V, S, kTarget> {
  using Base = Blocks<V, S, kTarget>;
  using Base::absorb, Base::ahead_of, Base::block_gradient, Base::block_max, Base::block_of, Base::block_size;
  using Base::block_statistics, Base::ignored, Base::logits_of, Base::merged, Base::soft_part;
  using Base::W, Base::kHalf, Base::kIgnored;
  using Base::with_hard_target, Base::zero_block;
  using typename Base::Acc;

  static Softmax<Acc> known_softmax(const Problem<Acc>& problem, int64_t position) {
    Acc t_sum = problem.prob_coeff * problem.weight_sum;
    if constexpr (is_given(kTarget)) {
      S packed[kBlock];
      double total = 0;
      for (int64_t b = 0; b < block_count(problem.classes); ++b) {
        const int64_t n = block_size(problem, b);
        const S* soft =
            block_of(problem, problem.soft_target, problem.soft_strides, position, b * kBlock, n, packed);
        V of_block = V::set1(0);
        for (int64_t i = 0; i < n; i += W)
          of_block = of_block + V::first_lanes(t_of_classes<V, kTarget>(problem, soft_part(soft, i, n - i),
                                                                        b * kBlock + i, n - i),
                                               n - i);
        total += V::reduce_add(of_block);
      }
      t_sum = Acc(total);
    } else {
      t_sum += target_coeff(problem, problem.target[position]);
    }
    const Acc moment = problem.row_moment ? problem.row_moment[position] : 0;
    return {problem.row_max[position], problem.row_sum[position], 0, t_sum, moment};
  }

  // Elements of the short rows that are worked together, step by step.
  static constexpr int64_t kStepElements = kHalf ? kBlock : kBlock / 2;
  static int64_t rows_per_step(const Problem<Acc>& problem) {
    const int64_t rows = kStepElements / pitch_of<W>(problem.classes);
    return rows < 1 ? 1 : rows > kBatch ? kBatch : rows;
  }

  static Softmax<Acc> read_short(const Problem<Acc>& problem, int64_t position, const S* x, Acc m,
                                 Acc* kept) {
    if (ignored(problem, position)) return kIgnored;
    const int64_t ahead = rows_per_step(problem) * problem.input_strides.inner;
    const auto read = problem.grad ? Base::template read_block<true> : Base::template read_block<false>;
    return with_hard_target(problem, position, read(problem, position, 0, x, ahead, m, kept));
  }

  static void write_short(const Problem<Acc>& problem, int64_t position, const Acc* kept,
                          const Softmax<Acc>& row) {
    if (ignored(problem, position)) return zero_block(problem, position, 0);
    const Slope<Acc> slope = slope_of<V, kTarget>(problem, position, row);
    Base::template write_block<true>(problem, position, 0, nullptr, kept, row.m, slope);
  }

  // n rows of one block each, statistics into the batch from `at` on. Each step runs over all rows before the
  // next: within a row it would wait for the reduction of the step before.
  static void short_rows(const Problem<Acc>& problem, int64_t position, int64_t n, Batch<Acc>* batch,
                         int64_t at) {
    S packed[kBlock];
    alignas(64) Acc kept[kBlock];
    const S* x[kBatch];
    Acc m[kBatch];
    const int64_t pitch = pitch_of<W>(problem.classes);
    for (int64_t i = 0; i < n; ++i) {
      x[i] = nullptr, m[i] = 0;
      if (ignored(problem, position + i)) continue;
      x[i] = logits_of(problem, position + i, 0, packed + i * pitch);
      m[i] = block_max(x[i], problem.classes);
    }
    for (int64_t i = 0; i < n; ++i)
      batch->set(at + i, read_short(problem, position + i, x[i], m[i], kept + i * pitch));
    if constexpr (kTarget != Target::kEntropy) {  // whose gradient always finds the statistics known
      if (!problem.grad) return;
      for (int64_t i = 0; i < n; ++i)
        write_short(problem, position + i, kept + i * pitch, batch->get(at + i));
    }
  }

  static Softmax<Acc> long_row(const Problem<Acc>& problem, int64_t position) {
    const Softmax<Acc> first = block_statistics(problem, position, 0);
    Softmax<double> row{first.m, first.s, first.tx_sum, first.t_sum, first.moment};
    for (int64_t b = 1; b < block_count(problem.classes); ++b)
      absorb(problem, &row, block_statistics(problem, position, b));
    return merged(problem, position, row);
  }

  // The longest row whose exponentials are kept: they take half a second-level cache of 1 MiB.
  static constexpr int64_t kMostKept = 32 * kBlock;

  // Statistics of one block; its exponentials, relative to its own maximum, into `kept`.
  static Softmax<Acc> keep_block(const Problem<Acc>& problem, int64_t position, int64_t block, Acc* kept) {
    S packed[kBlock];
    const S* x = logits_of(problem, position, block, packed);
    const Acc m = block_max(x, block_size(problem, block));
    return Base::template read_block<true>(problem, position, block, x, ahead_of(problem, block), m, kept);
  }

  static Softmax<Acc> long_row_kept(const Problem<Acc>& problem, int64_t position) {
    alignas(64) Acc kept[kMostKept];
    Softmax<Acc> blocks[kMostKept / kBlock];
    const int64_t count = block_count(problem.classes);
    int64_t b = 0;
    do blocks[b] = keep_block(problem, position, b, kept + b * kBlock);
    while (++b < count);
    const Softmax<Acc> row = merge_blocks(problem, position, blocks);
    const Slope<Acc> slope = slope_of<V, kTarget>(problem, position, row);
    for (b = 0; b < count; ++b) {
      const Acc m = blocks[b].m;
      Base::template write_block<true>(problem, position, b, nullptr, kept + b * kBlock, m,
                                       Base::shifted(slope, m, row.m));
    }
    return row;
  }

  static Softmax<Acc> one_row(const Problem<Acc>& problem, int64_t position) {
    const bool skip = ignored(problem, position);
    if constexpr (Base::kRelativeToBlock)
      if (!skip && !problem.known_softmax && problem.grad && problem.classes <= kMostKept)
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
    const int64_t step = rows_per_step(problem);
    for (int64_t p = begin; p < end; p += kBatch) {
      const int64_t n = end - p < kBatch ? end - p : kBatch;
      for (int64_t i = 0; i < n && !is_short; ++i) batch.set(i, one_row(problem, p + i));
      for (int64_t i = 0; i < n && is_short; i += step)
        short_rows(problem, p + i, n - i < step ? n - i : step, &batch, i);
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
    Softmax<double> row{blocks[0].m, blocks[0].s, blocks[0].tx_sum, blocks[0].t_sum, blocks[0].moment};
    for (int64_t b = 1; b < block_count(problem.classes); ++b) absorb(problem, &row, blocks[b]);
    return merged(problem, position, row);
  }
};
