// A tile: one class of up to 16 vectors of positions per line, brought in from memory and out again; where
// the classes of a position are adjacent in memory, squares of W x W elements are transposed in registers.
// Included inside an anonymous namespace, after vector-inl.h.

// Positions that are worked together.
struct Span {
  int64_t position;  // the first one
  int64_t lanes;     // positions in use
  int64_t run;       // of them in a row: those of one outer index
  int vectors;       // vectors in use
};

// A number that a function can take as an argument and use as a constant.
template <int N>
struct Count {
  constexpr operator int() const { return N; }
};

// Neighbouring positions are adjacent in memory, rather than the classes of one position.
inline bool along_positions(const Strides& strides) { return strides.inner == 1 && strides.classes != 1; }

// Whether vectors from p on can go past the caches.
template <class V, class S>
MBPERF_INLINE bool streams(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % (V::kWidth * sizeof(S)) == 0;
}

// The first `left` elements of v to p, past the caches where that is asked for and possible.
template <class V, class S>
MBPERF_INLINE void put(S* p, V v, int64_t left, bool streaming) {
  if (streaming && left >= V::kWidth && streams<V>(p)) return V::stream(p, v);
  store_part(p, v, left);
}

template <class V>
struct alignas(64) Tile {
  using Acc = typename V::Scalar;
  static constexpr int W = V::kWidth;
  static constexpr int kVectors = 16;
  static constexpr int kLanes = kVectors * W;
  // A vector more than a line needs: lines whose distance is a power of two compete for places in the cache.
  static constexpr int kStride = kLanes + W;

  Acc at[kTileClasses][kStride];

  // n classes of the span; p is the first of its first position.
  template <class S>
  void load(const S* p, const Strides& strides, Span span, int64_t n) {
    if (along_positions(strides)) {
      for_runs(strides, span, n, [&](int64_t offset, int64_t c, int64_t lane, int64_t left) {
        V::store(&at[c][lane], load_part<V>(p + offset, left, 0));
      });
      return;
    }
    if (strides.classes != 1) return gather(p, strides, span, n);
    for_squares(span, n, [&](int v, int64_t c, auto whole, int64_t lanes, int64_t classes) {
      read_square<whole>(p + v * W * strides.inner + c, strides.inner, lanes, classes, &at[c][v * W]);
    });
  }

  template <class S>
  void store(S* p, const Strides& strides, Span span, int64_t n) const {
    if (along_positions(strides)) {
      for_runs(strides, span, n, [&](int64_t offset, int64_t c, int64_t lane, int64_t left) {
        store_part(p + offset, V::load(&at[c][lane]), left);
      });
      return;
    }
    if (strides.classes != 1) return scatter(p, strides, span, n);
    for_squares(span, n, [&](int v, int64_t c, auto whole, int64_t lanes, int64_t classes) {
      write_square<whole>(&at[c][v * W], p + v * W * strides.inner + c, strides.inner, lanes, classes);
    });
  }

 private:
  // Calls body(offset, c, lane, left) for the vectors of each class: where one begins in memory and in the
  // tile, and how many elements of its run are left. The rest of a vector belongs to the next one.
  template <class Body>
  MBPERF_INLINE static void for_runs(const Strides& strides, Span span, int64_t n, const Body& body) {
    for (int64_t c = 0; c < n; ++c)
      for (int64_t first = 0, outer = c * strides.classes; first < span.lanes;
           first += span.run, outer += strides.outer)
        for (int64_t i = 0; i < span.run; i += W) body(outer + i, c, first + i, span.run - i);
  }

  // Neither positions nor classes are adjacent: element by element.
  template <class S>
  void gather(const S* p, const Strides& strides, Span span, int64_t n) {
    for (int v = 0; v < span.vectors; ++v, p += W * strides.inner)
      for (int64_t c = 0; c < n; ++c) {
        S some[W] = {};
        const S* x = p + c * strides.classes;
        const int64_t lanes = span.lanes - v * W;
        for (int64_t r = 0; r < W && r < lanes; ++r) some[r] = x[r * strides.inner];
        V::store(&at[c][v * W], V::load(some));
      }
  }

  template <class S>
  void scatter(S* p, const Strides& strides, Span span, int64_t n) const {
    for (int v = 0; v < span.vectors; ++v, p += W * strides.inner)
      for (int64_t c = 0; c < n; ++c) {
        S some[W];
        V::store(some, V::load(&at[c][v * W]));
        S* g = p + c * strides.classes;
        const int64_t lanes = span.lanes - v * W;
        for (int64_t r = 0; r < W && r < lanes; ++r) g[r * strides.inner] = some[r];
      }
  }

  // Calls body(v, c, whole, lanes, classes) for each square; `whole` where none of it lies outside.
  template <class Body>
  MBPERF_INLINE static void for_squares(Span span, int64_t n, const Body& body) {
    for (int v = 0; v < span.vectors; ++v)
      for (int64_t c = 0; c < n; c += W) {
        const int64_t lanes = span.lanes - v * W, classes = n - c;
        if (lanes >= W && classes >= W)
          body(v, c, Count<true>{}, W, W);
        else if (lanes >= W)
          body(v, c, Count<false>{}, W, classes);
        else
          body(v, c, Count<false>{}, lanes, classes < W ? classes : W);
      }
  }

  // The first `classes` elements of the first `lanes` rows, transposed into the tile; zeros for the rest.
  template <bool kWhole, class S>
  MBPERF_INLINE static void read_square(const S* rows, int64_t stride, int64_t lanes, int64_t classes,
                                        Acc* tile) {
    V m[W];
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      const S* row = rows + r * stride;
      m[r] = kWhole ? V::load(row) : r < lanes ? V::load_n(row, classes, 0) : V::set1(0);
    }
    transpose(m);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) V::store(tile + j * kStride, m[j]);
  }

  template <bool kWhole, class S>
  MBPERF_INLINE static void write_square(const Acc* tile, S* rows, int64_t stride, int64_t lanes,
                                         int64_t classes) {
    V m[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) m[j] = V::load(tile + j * kStride);
    transpose(m);
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      S* row = rows + r * stride;
      if (kWhole)
        V::store(row, m[r]);
      else if (r < lanes)
        V::store_n(row, m[r], classes);
    }
  }
};
