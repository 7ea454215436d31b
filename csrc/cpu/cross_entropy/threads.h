// The work of a call shared by threads: over rows, over the columns of few long rows, over targets. Sums are
// taken over chunks that do not depend on the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/cross_entropy/path.h"
#include "shape.h"

namespace mbperf {

// The positions of a call in ranges for threads to take. None crosses from one outer index to the next,
// unless it takes several whole ones, so that no span of lanes is cut short.
class Chunks {
 public:
  Chunks(const Shape& shape, int64_t least) : shape_(shape) {
    const int64_t rows = std::max(kChunkElements / (shape.classes + kPositionCost), least);
    size_ = rows >= 512 ? rows / 256 * 256 : rows >= 64 ? rows / 64 * 64 : rows;  // whole tiles
    if (size_ >= shape.inner) {
      size_ = size_ / shape.inner * shape.inner;
      stretch_ = shape.positions();
    } else {
      stretch_ = shape.inner;
    }
    each_ = (stretch_ + size_ - 1) / size_;
  }

  int64_t largest() const { return std::min(size_, stretch_); }  // positions
  int64_t count() const { return shape_.positions() / stretch_ * each_; }
  int64_t begin(int64_t i) const { return i / each_ * stretch_ + i % each_ * size_; }
  int64_t end(int64_t i) const { return std::min(begin(i) + size_, (i / each_ + 1) * stretch_); }

 private:
  const Shape& shape_;
  int64_t size_;     // positions in a chunk
  int64_t stretch_;  // positions that are divided without regard to others
  int64_t each_;     // chunks of a stretch
};

template <class Body>
void over_range(int64_t count, bool parallel, const Body& body) {
  if (!parallel) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// The sum of body(begin, end) over chunks of a call's positions that do not depend on the number of threads.
template <class Body>
double sum_over_chunks(const Shape& shape, int64_t least, const Body& body) {
  if (shape.positions() == 0) return 0;
  const Chunks chunks(shape, least);
  if (chunks.count() == 1) return body(0, shape.positions());
  std::vector<double> partial(chunks.count());
  over_range(chunks.count(), shape.positions() * (shape.classes + kPositionCost) >= kParallelElements,
             [&](int64_t i) { partial[i] = body(chunks.begin(i), chunks.end(i)); });
  double total = 0;
  for (const double p : partial) total += p;
  return total;
}

template <class Acc>
double run_over_rows(const Problem<Acc>& problem, const DtypeKernels<Acc>& kernels, const Shape& shape,
                     Path path) {
  const auto kernel = kernel_of(path, kernels);
  return sum_over_chunks(shape, path == Path::kTiles ? kLeastLanes : 1, [&](int64_t begin, int64_t end) {
    const double loss = kernel(problem, begin, end);
    if (problem.predicted) kernels.predict(problem, begin, end);
    return loss;
  });
}

template <class Acc>
double run_over_columns(const Problem<Acc>& problem, const DtypeKernels<Acc>& kernels) {
  const int64_t blocks = block_count(problem.classes);
  std::vector<Softmax<Acc>> statistics(problem.positions * blocks);
  std::vector<Softmax<Acc>> rows(problem.positions);
  if (!problem.known_softmax)
    over_range(problem.positions * blocks, true,
               [&](int64_t i) { statistics[i] = kernels.block_statistics(problem, i / blocks, i % blocks); });
  double total = 0;
  for (int64_t p = 0; p < problem.positions; ++p)
    total += kernels.merge_blocks(problem, p, &statistics[p * blocks], &rows[p]);
  if (problem.predicted)
    over_range(problem.positions, true, [&](int64_t p) { kernels.predict(problem, p, p + 1); });
  if (problem.grad)
    over_range(problem.positions * blocks, true,
               [&](int64_t i) { kernels.block_gradient(problem, i / blocks, i % blocks, rows[i / blocks]); });
  return total;
}

// The sum of body(begin, end) over chunks of [0, n) that do not depend on the number of threads.
template <class Sum, class Body>
Sum over_targets(int64_t n, const Body& body) {
  constexpr int64_t size = 2 * kParallelElements;
  if (n <= size) return body(0, n);
  std::vector<Sum> partial((n + size - 1) / size);
  over_range(int64_t(partial.size()), true,
             [&](int64_t i) { partial[i] = body(i * size, std::min(n, (i + 1) * size)); });
  return std::accumulate(partial.begin(), partial.end(), Sum{});
}

// The sum of term(i) for i in [begin, end), in eight parts: one would wait for each addition in turn.
template <class Term>
double sum_of(int64_t begin, int64_t end, const Term& term) {
  double part[8] = {};
  int64_t i = begin;
  for (; i + 8 <= end; i += 8)
    for (int j = 0; j < 8; ++j) part[j] += term(i + j);
  for (; i < end; ++i) part[0] += term(i);
  return std::accumulate(part, part + 8, 0.0);
}

}  // namespace mbperf
