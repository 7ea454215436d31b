// The table of row kernels of one instruction set, from its vector types VFloat and VDouble.
// Included inside an anonymous namespace, last.

template <class Acc>
inline Target kind_of(const Problem<Acc>& problem) {
  if (problem.soft_target) return kOfStats ? Target::kSoftStats : Target::kSoft;
  if (problem.inverse_temperature != 0) return Target::kEntropy;
  if (problem.prob_coeff != 0) return kOfStats ? Target::kSmoothStats : Target::kSmooth;
  return kOfStats ? Target::kHardStats : Target::kHard;
}

template <Target kTarget>
struct Kind {
  constexpr operator Target() const { return kTarget; }
};

// Calls body(kind of the problem's targets), which it can use as a constant.
template <class Acc, class Body>
inline auto with_kind(const Problem<Acc>& problem, const Body& body) {
  constexpr Target kSoft = kOfStats ? Target::kSoftStats : Target::kSoft,
                   kSmooth = kOfStats ? Target::kSmoothStats : Target::kSmooth,
                   kHard = kOfStats ? Target::kHardStats : Target::kHard;
  switch (kind_of(problem)) {
    case kSoft:
      return body(Kind<kSoft>{});
    case kSmooth:
      return body(Kind<kSmooth>{});
    case Target::kEntropy:
      if constexpr (!kOfStats) return body(Kind<Target::kEntropy>{});
      [[fallthrough]];
    default:
      return body(Kind<kHard>{});
  }
}

template <class V, class S, class Acc = typename V::Scalar>
inline constexpr DtypeKernels<Acc> dtype_kernels() {
  return {
      {V::kWidth, kParts<S> == Parts::kByElement},
      [](const Problem<Acc>& problem, int64_t begin, int64_t end) {
        return with_kind(problem, [&](auto kind) { return Rows<V, S, kind>::run(problem, begin, end); });
      },
      [](const Problem<Acc>& problem, int64_t begin, int64_t end) {
        return with_kind(problem, [&](auto kind) {
          if constexpr (has_moment(kind) && spreads(kind))  // not served
            return Rows<V, S, kind>::run(problem, begin, end);
          else
            return Groups<V, S, kind>::run(problem, begin, end);
        });
      },
      [](const Problem<Acc>& problem, int64_t begin, int64_t end) {
        return with_kind(problem, [&](auto kind) { return Tiles<V, S, kind>::run(problem, begin, end); });
      },
      kOfStats ? Predictions<V, S>::run : nullptr,
      [](const Problem<Acc>& problem, int64_t position, int64_t block) {
        return with_kind(
            problem, [&](auto kind) { return Rows<V, S, kind>::block_statistics(problem, position, block); });
      },
      [](const Problem<Acc>& problem, int64_t position, const Softmax<Acc>* blocks, Softmax<Acc>* row) {
        *row = with_kind(
            problem, [&](auto kind) { return Rows<V, S, kind>::merge_blocks(problem, position, blocks); });
        if (problem.known_softmax) return 0.0;
        Batch<Acc> batch;
        batch.set(0, *row);
        typename V::Wide total{};
        finish_losses<V>(problem, position, 1, batch, &total);
        return sum_of_lanes<V>(total);
      },
      [](const Problem<Acc>& problem, int64_t position, int64_t block, const Softmax<Acc>& row) {
        with_kind(problem, [&](auto kind) {
          Rows<V, S, kind>::block_gradient(problem, position, block, row);
          V::fence();
        });
      },
  };
}

int64_t scan_targets(const int64_t* target, int64_t n, int64_t classes, int64_t ignore_index, int64_t* live) {
  *live = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t stop = n - i < 256 ? n : i + 256;
    int64_t counted = 0, outside = 0;  // sums without a branch: this loop is vectorised
    for (int64_t j = i; j < stop; ++j) {
      const int64_t counts = target[j] != ignore_index;
      counted += counts;
      outside += counts & int64_t(uint64_t(target[j]) >= uint64_t(classes));
    }
    for (; outside; ++i)
      if (uint64_t(target[i]) >= uint64_t(classes) && target[i] != ignore_index) return i;
    *live += counted;
    i = stop;
  }
  return -1;
}

constexpr RowKernels table() {
  return {dtype_kernels<VFloat, float>(), dtype_kernels<VFloat, BFloat16>(), dtype_kernels<VFloat, Float16>(),
          dtype_kernels<VDouble, double>(), scan_targets};
}
