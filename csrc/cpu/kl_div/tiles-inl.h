// KL divergence of rows of few classes: each lane of a vector is a row, one class at a time, so that nothing
// is reduced across a vector; rows are transposed on the way in and out.
// Included inside an anonymous namespace, after pairs-inl.h and tile-inl.h.

//   d = sum exp((z_c - m_z) / T) ((z_c - m_z) - (x_c - m_x)),  loss = d / (T s_z) + log(s_x / s_z)
//   grad_c = (q_c - p_c) scale / T
template <class V, class S>
struct KlDivTiles {
  using Acc = typename V::Scalar;
  using Problem = KlDivProblem<Acc>;
  using Tile = mbperf::Tile<V>;
  static constexpr int W = V::kWidth;
  static constexpr int kUnroll = 2;         // vectors of either side: four chains of operations
  static constexpr int64_t kLanes = 4 * W;  // rows that are worked together
  using Batch = PairBatch<Acc, int(kLanes)>;

  // Sums of U vectors of rows from lane `lane` on; leaves their exponentials in the tiles.
  template <int U>
  static void read(const Problem& problem, int64_t lane, Tile* x, Tile* z, Batch* batch) {
    const V inverse_temperature = V::set1(problem.inverse_temperature);
    V m_x[U], m_z[U];
    for (int u = 0; u < U; ++u) m_x[u] = m_z[u] = V::set1(-__builtin_inff());
    for (int64_t c = 0; c < problem.classes; ++c)
      for (int u = 0; u < U; ++u) {
        m_x[u] = V::max(m_x[u], V::load(&x->at[c][lane + u * W]));
        m_z[u] = V::max(m_z[u], V::load(&z->at[c][lane + u * W]));
      }
    for (int u = 0; u < U; ++u) m_x[u] = V::finite_or_zero(m_x[u]), m_z[u] = V::finite_or_zero(m_z[u]);
    PairVectors<V, U> sums;
    for (int64_t c = 0; c < problem.classes; ++c) {
      V e[2 * U];
      for (int u = 0; u < U; ++u) {
        e[u] = V::load(&x->at[c][lane + u * W]) - m_x[u];
        e[U + u] = V::load(&z->at[c][lane + u * W]) - m_z[u];
      }
      sums.template add<S>(e, inverse_temperature);
      for (int u = 0; u < U; ++u) {
        V::store(&x->at[c][lane + u * W], e[u]);
        V::store(&z->at[c][lane + u * W], e[U + u]);
      }
    }
    for (int u = 0; u < U; ++u) {
      V::store(&batch->s_x[lane + u * W], sums.s_x[u]);
      V::store(&batch->s_z[lane + u * W], sums.s_z[u]);
      V::store(&batch->d[lane + u * W], sums.d[u]);
    }
  }

  // The student's exponentials become the gradient.
  static void differentiate(const Problem& problem, Span span, Tile* x, const Tile& z, const Batch& batch) {
    for (int64_t i = 0; i < span.lanes; i += W) {
      V scale = V::set1(problem.scale);
      if (problem.row_scale)
        scale = scale * load_part<V>(problem.row_scale + span.position + i, span.lanes - i, 0);
      const PairFactors<V> factors{scale / V::load(&batch.s_x[i]), scale / V::load(&batch.s_z[i])};
      for (int64_t c = 0; c < problem.classes; ++c)
        V::store(&x->at[c][i], gradient_of(V::load(&x->at[c][i]), V::load(&z.at[c][i]), factors));
    }
  }

  static void one_span(const Problem& problem, Span span, typename V::Wide* total) {
    Tile x, z;
    Batch batch;
    const auto load = [&](const void* base, int64_t stride, Tile* tile) {
      tile->load(static_cast<const S*>(base) + span.position * stride, Strides{0, stride, 1}, span,
                 problem.classes);
    };
    load(problem.student, problem.student_stride, &x);
    load(problem.teacher, problem.teacher_stride, &z);
    int64_t v = 0;
    for (; v + kUnroll <= span.vectors; v += kUnroll) read<kUnroll>(problem, v * W, &x, &z, &batch);
    for (; v < span.vectors; ++v) read<1>(problem, v * W, &x, &z, &batch);
    finish_pairs<V>(problem, span.position, span.lanes, batch, total);
    if (!problem.grad) return;
    differentiate(problem, span, &x, z, batch);
    const Strides strides{0, problem.classes, 1};
    x.store(static_cast<S*>(problem.grad) + span.position * problem.classes, strides, span, problem.classes);
  }

  static double run(const Problem& problem, int64_t begin, int64_t end) {
    typename V::Wide total{};
    for (int64_t r = begin; r < end; r += kLanes) {
      const int64_t lanes = end - r < kLanes ? end - r : kLanes;
      one_span(problem, {r, lanes, lanes, int((lanes + W - 1) / W)}, &total);
    }
    return sum_of_lanes<V>(total);
  }
};
