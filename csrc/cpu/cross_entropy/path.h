// Which kernel serves a problem, and every tuned number of cross entropy on the CPU. No torch, no STL: the
// kernels of each instruction set include it. A number that suits one family of processors and not another is
// found by forcing each path in turn (set_cross_entropy_path) and belongs here, beside what it was measured
// on.
#pragma once

#include "cpu/cross_entropy/problem.h"

namespace mbperf {

// How the classes and positions of a problem are laid over vectors and threads.
enum class Path {
  kRows,     // classes along the vector, one reduction a row; any strides, far apart classes packed first
  kGroups,   // classes along the vector, as many rows to a reduction as a vector has lanes
  kTiles,    // positions along the vector, rows of few classes transposed on the way in and out
  kColumns,  // as kRows, each row spread over threads block by block
};

// Measured on 2 cores of Zen 4 and Zen 5 with 32 MiB of last-level cache, where nothing else is said.

// Rows are worked in blocks of this many classes: a block of float logits and its exponentials stay in a
// 32 KiB first-level cache, and block boundaries do not depend on the number of threads.
constexpr int64_t kBlock = 4096;

// Up to this many classes a vector holds one class of many positions, since a horizontal reduction a row
// would cost more than transposing.
constexpr int64_t kTileClasses = 64;

// Beside each other in memory, fewer positions than this are packed row by row instead: 1.4 to 4 times as
// fast up to 5 of them, alike at 8.
constexpr int64_t kFewLanes = 8;

// Exponentials that a span of grouped rows keeps at most, and prefers if that is at least 2 W rows.
constexpr int64_t kSpanElements = 4096;
constexpr int64_t kPreferredSpanElements = kSpanElements / 2;

// The cost of a position beside its classes, in classes: its target, its logarithm.
constexpr int64_t kPositionCost = 4;
// Elements a chunk: small enough to balance two threads, large enough to hide what a chunk costs.
constexpr int64_t kChunkElements = 16384;
// A parallel region costs about 5 us, as much as this many exponentials on one core.
constexpr int64_t kParallelElements = 32768;
// Positions are lanes of tiles: fewer in a chunk than a vector has would leave it empty for the most part.
constexpr int64_t kLeastLanes = 16;

// From this many bytes on a gradient goes past the caches: with logits as large it would not stay there
// anyway. That is 0.8 to 0.9 times as fast at 8 MB, 1.2 times at 16 MB fresh from memory. Sooner where its
// classes are far apart: with a gradient of 4 to 9 MB 1.3 to 2 times as fast, of 2.4 MB 0.8 times; yet at 2
// MB already where they are a multiple of 1 KiB apart, since their lines then compete for the same few places
// in the cache.
constexpr int64_t kStreamingBytes = int64_t{12} << 20;
constexpr int64_t kStreamingApartBytes = int64_t{4} << 20;
constexpr int64_t kStreamingCompetingBytes = int64_t{2} << 20;

static constexpr int64_t block_count(int64_t classes) { return (classes + kBlock - 1) / kBlock; }

static constexpr int64_t streaming_bytes(const Strides& grad, int64_t itemsize) {
  if (grad.classes <= 1) return kStreamingBytes;
  return grad.classes * itemsize % 1024 == 0 ? kStreamingCompetingBytes : kStreamingApartBytes;
}

// Whether every tensor of a problem with classes along it has strides that satisfy `fits`.
template <class Acc, class Fits>
constexpr bool all_strides(const Problem<Acc>& p, const Fits& fits) {
  return fits(p.input_strides) && (!p.grad || fits(p.grad_strides)) &&
         (!p.soft_target || fits(p.soft_strides));
}

// Whether a path computes a problem at all, slow or fast. Rows and columns serve every problem.
template <class Acc>
constexpr bool serves(Path path, const Problem<Acc>& p, VectorShape vector) {
  if (path == Path::kGroups) {
    // Statistics beside a t of every class: groups would be more code than all other paths of them together.
    if (p.predicted && (p.soft_target || p.prob_coeff != 0)) return false;
    const int64_t pitch = (p.classes + vector.width - 1) / vector.width * vector.width;
    return all_strides(p, [](const Strides& s) { return s.classes == 1; }) &&
           pitch * vector.width <= kSpanElements;
  }
  // Tiles load vectors along positions or along classes; few classes they gather from anywhere.
  return path != Path::kTiles || p.classes <= kTileClasses ||
         all_strides(p, [](const Strides& s) { return s.inner == 1 || s.classes == 1; });
}

// The path that was fastest where it was measured; `threads` is 1 inside a parallel region.
template <class Acc>
constexpr Path choose(const Problem<Acc>& p, VectorShape vector, int threads) {
  const bool few_classes = p.classes <= kTileClasses;
  // Fewer classes than half a vector suit a transposed tile, as do parts of vectors that have to be read
  // element by element; longer rows do not pay where lanes are left empty.
  const bool fills_groups =
      p.classes > vector.width / 2 &&
      (few_classes ? !vector.parts_by_element || p.classes % vector.width == 0 : p.positions >= vector.width);
  if (fills_groups && serves(Path::kGroups, p, vector)) return Path::kGroups;
  const bool rows_adjacent = p.input_strides.classes == 1 && (!p.grad || p.grad_strides.classes == 1);
  if (few_classes || (!rows_adjacent && p.inner >= kFewLanes && serves(Path::kTiles, p, vector)))
    return Path::kTiles;
  // Rows longer than a chunk, too few to keep every thread busy to the end.
  const bool few_long_rows = p.classes >= kParallelElements && p.positions < 4 * threads;
  return threads > 1 && few_long_rows ? Path::kColumns : Path::kRows;
}

// The kernel that works ranges of positions along a path. kColumns divides rows among threads and has none.
template <class Acc>
constexpr auto kernel_of(Path path, const DtypeKernels<Acc>& kernels) {
  return path == Path::kTiles ? kernels.tiles : path == Path::kGroups ? kernels.groups : kernels.rows;
}

}  // namespace mbperf
