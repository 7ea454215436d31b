// Cross entropy with positions along the vector: lane p holds one class of position p, so that no reduction
// is horizontal. For few classes (rows are transposed in registers on the way in and out) and for logits
// whose neighbouring positions are adjacent in memory (segmentation maps, transposed logits).
// A tile is up to 4 vectors of positions by kTileClasses classes; more classes come in several tiles with
// the online maximum of Milakov and Gimelshein, and the gradient recomputes the exponentials.
// Included inside an anonymous namespace, after cross_entropy_rows-inl.h.

template <class V, class S, Target kTarget>
struct Tiles {
  using Acc = typename V::Scalar;
  using RowKernel = Rows<V, S, kTarget>;
  static constexpr int W = V::kWidth;
  static constexpr int kVectors = 4;
  static constexpr int kLanes = kVectors * W;
  static constexpr Acc kInfinity = __builtin_inff();

  struct alignas(64) Tile {
    Acc at[kTileClasses][kLanes];
  };

  // Per position, in lanes. A lane that is not live (ignored, or past the last position) counts for nothing.
  struct alignas(64) Lane {
    Batch<Acc> softmax;
    Acc live[kLanes], hard[kLanes], factor[kLanes], scale[kLanes];
    int64_t target[kLanes];
  };
  static_assert(kLanes <= kBatch);

  struct Span {
    int64_t position;  // the first one
    int64_t lanes;     // positions in use
    int vectors;       // vectors in use
  };

  // Classes [first, first + n) of the span, from memory into the tile.
  static void load(const Task<Acc>& task, const void* base, const Strides& strides, Span span, int64_t first,
                   int64_t n, Tile* tile) {
    const S* p =
        static_cast<const S*>(base) + offset_of(strides, task, span.position) + first * strides.classes;
    if (strides.inner == 1 && strides.classes != 1) {
      for (int64_t c = 0; c < n; ++c)
        for (int v = 0; v < span.vectors; ++v) {
          const S* line = p + c * strides.classes + v * W;
          V::store(&tile->at[c][v * W], load_part<V>(line, span.lanes - v * W, 0));
          // The next span's: one stream a class is more than the hardware follows.
          __builtin_prefetch(line + kLanes);
        }
      return;
    }
    for (int v = 0; v < span.vectors; ++v)
      for (int64_t c = 0; c < n; c += W) {
        V m[W];
        for (int r = 0; r < W; ++r) {
          const bool inside = v * W + r < span.lanes;
          m[r] = inside ? load_part<V>(p + (v * W + r) * strides.inner + c, n - c, 0) : V::set1(0);
        }
        transpose(m);
        const int64_t classes = n - c < W ? n - c : W;
        for (int64_t j = 0; j < classes; ++j) V::store(&tile->at[c + j][v * W], m[j]);
      }
  }

  static void store(const Task<Acc>& task, Span span, int64_t first, int64_t n, const Tile& tile) {
    const Strides& strides = task.grad_strides;
    S* p = static_cast<S*>(task.grad) + offset_of(strides, task, span.position) + first * strides.classes;
    if (strides.inner == 1 && strides.classes != 1) {
      for (int64_t c = 0; c < n; ++c)
        for (int v = 0; v < span.vectors; ++v)
          put(p + c * strides.classes + v * W, V::load(&tile.at[c][v * W]), span.lanes - v * W,
              task.streaming_stores);
      return;
    }
    for (int v = 0; v < span.vectors; ++v)
      for (int64_t c = 0; c < n; c += W) {
        V m[W];
        const int64_t classes = n - c < W ? n - c : W;
        for (int64_t j = 0; j < W; ++j) m[j] = j < classes ? V::load(&tile.at[c + j][v * W]) : V::set1(0);
        transpose(m);
        for (int r = 0; r < W && v * W + r < span.lanes; ++r)
          store_part(p + (v * W + r) * strides.inner + c, m[r], n - c);
      }
  }

  MBPERF_INLINE static void put(S* p, V v, int64_t left, bool streaming) {
    if (streaming && left >= W && reinterpret_cast<uintptr_t>(p) % (W * sizeof(S)) == 0)
      return V::stream(p, v);
    store_part(p, v, left);
  }

  // q of class c in vector v, from the tile of soft targets.
  MBPERF_INLINE static V share(const Task<Acc>& task, const Tile& soft, int64_t first, int64_t c, int v) {
    V q = V::set1(task.smooth_share);
    if constexpr (kTarget == Target::kSoft)
      q = V::fma(V::load(&soft.at[c][v * W]), V::set1(task.hard_share), q);
    return task.weight ? q * V::set1(task.weight[first + c]) : q;
  }

  static void begin(const Task<Acc>& task, Span span, Lane* lane) {
    const bool soft = kTarget == Target::kSoft;
    for (int64_t i = 0; i < kLanes; ++i) {
      const bool inside = i < span.lanes;
      const int64_t y = soft || !inside ? 0 : task.target[span.position + i];
      const bool live = inside && (soft || y != task.ignore_index);
      lane->target[i] = live ? y : 0;
      lane->live[i] = live ? Acc(1) : Acc(0);
      lane->hard[i] = live && !soft ? task.hard_share : Acc(0);
      lane->softmax.max[i] = -kInfinity;
      lane->softmax.sum[i] = lane->softmax.linear[i] = lane->softmax.mass[i] = 0;
    }
    if (!soft && task.weight)
      for (int64_t i = 0; i < span.lanes; ++i) lane->hard[i] *= task.weight[lane->target[i]];
  }

  // Takes in classes [first, first + n); leaves their exponentials in the tile.
  static void absorb(const Task<Acc>& task, Span span, int64_t first, int64_t n, Tile* tile, const Tile& soft,
                     Lane* lane) {
    for (int v = 0; v < span.vectors; ++v) {
      V max = V::load(&lane->softmax.max[v * W]);
      const V before = max;
      for (int64_t c = 0; c < n; ++c) max = V::max(max, V::load(&tile->at[c][v * W]));
      const V centre = V::finite_or_zero(max);
      V sum = V::load(&lane->softmax.sum[v * W]), linear = V::load(&lane->softmax.linear[v * W]);
      V mass = V::load(&lane->softmax.mass[v * W]);
      if (first > 0) {
        sum = sum * V::exp(before - centre);
        if constexpr (kTarget != Target::kHard) linear = linear + V::product_or_zero(mass, before - centre);
      }
      for (int64_t c = 0; c < n; ++c) {
        const V centred = V::load(&tile->at[c][v * W]) - centre;
        const V exponential = V::exp(centred);
        sum = sum + exponential;
        V::store(&tile->at[c][v * W], exponential);
        if constexpr (kTarget != Target::kHard) {
          const V q = share(task, soft, first, c, v);
          linear = V::fma(q, centred, linear);
          mass = mass + q;
        }
      }
      V::store(&lane->softmax.max[v * W], max);
      V::store(&lane->softmax.sum[v * W], sum);
      V::store(&lane->softmax.linear[v * W], linear);
      V::store(&lane->softmax.mass[v * W], mass);
    }
  }

  // Adds the hard targets; lanes that are not live get statistics that give a loss of 0.
  static void finish(const Task<Acc>& task, Span span, Lane* lane) {
    alignas(64) Acc at_target[kLanes] = {};
    if constexpr (kTarget != Target::kSoft) {
      const Strides& strides = task.input_strides;
      const S* x = static_cast<const S*>(task.input) + offset_of(strides, task, span.position);
      for (int64_t i = 0; i < span.lanes; ++i)
        at_target[i] = scalar_at<V>(x + i * strides.inner + lane->target[i] * strides.classes);
    }
    const V zero = V::set1(0);
    for (int v = 0; v < span.vectors; ++v) {
      const int64_t i = v * W;
      const V live = V::load(&lane->live[i]), hard = V::load(&lane->hard[i]);
      const V max = V::load(&lane->softmax.max[i]);
      V linear = V::load(&lane->softmax.linear[i]);
      if constexpr (kTarget != Target::kSoft) linear = V::fma(hard, V::load(&at_target[i]) - max, linear);
      V::store(&lane->softmax.linear[i], V::where(live, linear, zero));
      V::store(&lane->softmax.mass[i], V::where(live, V::load(&lane->softmax.mass[i]) + hard, zero));
      V::store(&lane->softmax.max[i], V::where(live, max, zero));
      V::store(&lane->softmax.sum[i], V::where(live, V::load(&lane->softmax.sum[i]), V::set1(1)));
    }
  }

  static void recall(const Task<Acc>& task, Span span, Lane* lane) {
    for (int64_t i = 0; i < span.lanes; ++i) {
      lane->softmax.max[i] = task.row_max[span.position + i];
      lane->softmax.sum[i] = task.row_sum[span.position + i];
      lane->softmax.mass[i] = lane->hard[i];
      if constexpr (kTarget == Target::kSmooth) lane->softmax.mass[i] += task.smooth_share * task.weight_sum;
    }
  }

  static void set_slopes(const Task<Acc>& task, Span span, Lane* lane) {
    for (int v = 0; v < span.vectors; ++v) {
      const int64_t left = span.lanes - v * W;
      const V scale = task.row_scale ? load_part<V>(task.row_scale + span.position + v * W, left, 0)
                                     : V::set1(task.scale);
      const V sum = V::load(&lane->softmax.sum[v * W]);
      V rise = V::load(&lane->softmax.mass[v * W]);
      if (task.z_loss != 0) {
        const V lse = V::load(&lane->softmax.max[v * W]) + V::log(sum);
        rise = V::fma(V::set1(2 * task.z_loss), lse, rise);
      }
      V::store(&lane->factor[v * W], rise * scale / sum);
      V::store(&lane->scale[v * W], scale);
    }
  }

  // Exponentials in the tile become the gradient of classes [first, first + n).
  static void differentiate(const Task<Acc>& task, Span span, int64_t first, int64_t n, Tile* tile,
                            const Tile& soft, const Lane& lane) {
    for (int v = 0; v < span.vectors; ++v) {
      const V factor = V::load(&lane.factor[v * W]), scale = V::load(&lane.scale[v * W]);
      const V live = V::load(&lane.live[v * W]);
      for (int64_t c = 0; c < n; ++c) {
        V g = V::load(&tile->at[c][v * W]) * factor;
        if constexpr (kTarget != Target::kHard) g = g - share(task, soft, first, c, v) * scale;
        V::store(&tile->at[c][v * W], V::where(live, g, V::set1(0)));
      }
    }
    if constexpr (kTarget != Target::kSoft)
      for (int64_t i = 0; i < span.lanes; ++i) {
        const int64_t c = lane.target[i] - first;
        if (lane.live[i] != 0 && c >= 0 && c < n) tile->at[c][i] -= lane.hard[i] * lane.scale[i];
      }
  }

  static void exponentiate(Span span, int64_t n, Tile* tile, const Lane& lane) {
    for (int v = 0; v < span.vectors; ++v) {
      const V max = V::load(&lane.softmax.max[v * W]);
      for (int64_t c = 0; c < n; ++c)
        V::store(&tile->at[c][v * W], V::exp(V::load(&tile->at[c][v * W]) - max));
    }
  }

  static int64_t tile_size(const Task<Acc>& task, int64_t first) {
    return task.classes - first < kTileClasses ? task.classes - first : kTileClasses;
  }

  static void load_soft(const Task<Acc>& task, Span span, int64_t first, int64_t n, Tile* soft) {
    if constexpr (kTarget == Target::kSoft)
      load(task, task.soft_target, task.soft_strides, span, first, n, soft);
  }

  static void add_soft_mass(const Task<Acc>& task, Span span, int64_t first, int64_t n, const Tile& soft,
                            Lane* lane) {
    for (int v = 0; v < span.vectors; ++v) {
      V mass = V::load(&lane->softmax.mass[v * W]);
      for (int64_t c = 0; c < n; ++c) mass = mass + share(task, soft, first, c, v);
      V::store(&lane->softmax.mass[v * W], mass);
    }
  }

  static double one_span(const Task<Acc>& task, Span span) {
    Tile tile, soft;
    Lane lane;
    begin(task, span, &lane);
    if (task.known_softmax) recall(task, span, &lane);
    for (int64_t c = 0; c < task.classes; c += kTileClasses) {
      const int64_t n = tile_size(task, c);
      if (task.known_softmax && kTarget != Target::kSoft) break;
      load_soft(task, span, c, n, &soft);
      if (task.known_softmax) {
        add_soft_mass(task, span, c, n, soft, &lane);
      } else {
        load(task, task.input, task.input_strides, span, c, n, &tile);
        absorb(task, span, c, n, &tile, soft, &lane);
      }
    }
    if (!task.known_softmax) finish(task, span, &lane);
    if (task.grad) write_gradient(task, span, &tile, &soft, &lane);
    return task.known_softmax ? 0 : finish_losses<V>(task, span.position, span.lanes, lane.softmax);
  }

  static void write_gradient(const Task<Acc>& task, Span span, Tile* tile, Tile* soft, Lane* lane) {
    const bool kept = !task.known_softmax && task.classes <= kTileClasses;
    set_slopes(task, span, lane);
    for (int64_t c = 0; c < task.classes; c += kTileClasses) {
      const int64_t n = tile_size(task, c);
      if (!kept) {
        load(task, task.input, task.input_strides, span, c, n, tile);
        load_soft(task, span, c, n, soft);
        exponentiate(span, n, tile, *lane);
      }
      differentiate(task, span, c, n, tile, *soft, *lane);
      store(task, span, c, n, *tile);
    }
  }

  // A span never crosses from one outer index to the next.
  static double run(const Task<Acc>& task, int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t p = begin; p < end;) {
      const int64_t left_inside = task.inner - p % task.inner;
      int64_t lanes = end - p < left_inside ? end - p : left_inside;
      if (lanes > kLanes) lanes = kLanes;
      total += one_span(task, {p, lanes, int((lanes + W - 1) / W)});
      p += lanes;
    }
    V::fence();
    return total;
  }
};
