// Which kernel serves which layout, and on how large a grid. No torch: what is chosen here runs on the CPU as
// well. Included by the file that instantiates it for one dtype.
#pragma once

#include "cuda/cross_entropy/held_kernels.cuh"
#include "cuda/cross_entropy/online_kernels.cuh"
#include "cuda/cross_entropy/sums_kernels.cuh"
#include "cuda/launch.cuh"

namespace mbperf::cuda {

constexpr int64_t blocks_for(int64_t n, int64_t each) { return (n + each - 1) / each; }

// The offset within 16 bytes at which rows of a tensor start, or -1 where it differs from row to row.
template <class S>
int64_t row_head(const void* base, const Strides& strides, bool many_outer) {
  constexpr int64_t E = Vector<S>::kSize;
  const bool alike = strides.inner % E == 0 && (!many_outer || strides.outer % E == 0);
  return alike ? int64_t(reinterpret_cast<uintptr_t>(base) / sizeof(S)) % E : -1;
}

// Whether each row of `other` starts at the same place within 16 bytes as that of the logits.
template <class S>
bool heads_agree(const Problem<AccumulateType<S>>& problem, const void* other, const Strides& strides) {
  constexpr int64_t E = Vector<S>::kSize;
  const auto difference = int64_t(reinterpret_cast<uintptr_t>(other) / sizeof(S) % E) -
                          int64_t(reinterpret_cast<uintptr_t>(problem.input) / sizeof(S) % E);
  return difference == 0 && (strides.inner - problem.input_strides.inner) % E == 0 &&
         (strides.outer - problem.input_strides.outer) % E == 0;
}

template <class S>
bool classes_adjacent(const Problem<AccumulateType<S>>& problem) {
  return problem.classes == 1 ||
         (problem.input_strides.classes == 1 && (!problem.grad || problem.grad_strides.classes == 1) &&
          (!problem.soft_target || problem.soft_strides.classes == 1));
}

template <class S>
bool can_be_held(const Problem<AccumulateType<S>>& problem) {
  return classes_adjacent<S>(problem) && problem.classes < int64_t{1} << 30 &&
         (!problem.grad || heads_agree<S>(problem, problem.grad, problem.grad_strides)) &&
         (!problem.soft_target || heads_agree<S>(problem, problem.soft_target, problem.soft_strides));
}

// 16-byte vectors that the longest of a row's spans touches.
template <class S>
int64_t vectors_a_row(const Problem<AccumulateType<S>>& problem) {
  constexpr int64_t E = Vector<S>::kSize;
  const int64_t head = row_head<S>(problem.input, problem.input_strides, problem.inner != problem.positions);
  return blocks_for((head < 0 ? E - 1 : head) + problem.classes, E);
}

template <class S, int kLanes>
Grid held_grid(int64_t positions, unsigned cluster) {
  using Shape = HeldShape<kLanes>;
  const int64_t slots = Shape::kWholeBlock ? int64_t(cluster) * Shape::kWarps : 0;
  return {blocks_for(positions, Shape::kRows) * cluster, Shape::kThreads, 1,
          slots * int64_t(sizeof(Softmax<AccumulateType<S>>)), cluster};
}

template <class S, Target kTarget, int kLanes, int kVectors>
int launch_held(const Problem<AccumulateType<S>>& problem, unsigned cluster, Stream stream) {
  return launch(held_rows_kernel<S, kTarget, kLanes, kVectors>,
                held_grid<S, kLanes>(problem.positions, cluster), stream, problem);
}

constexpr int kHugeLanes = 512;

// Blocks a cluster for rows of `vectors`: as few as hold a row, more where the chip would stand idle.
// 0 where no cluster holds it.
template <class S>
unsigned cluster_for(int64_t vectors, int64_t positions, unsigned largest, const Device& device) {
  constexpr int64_t kHeld = kHugeLanes * kLongVectors<S>;  // 64 KiB a block, 32 of doubles
  unsigned cluster = 1;
  while (cluster * kHeld < vectors) cluster *= 2;
  if (cluster > largest) return 0;
  const unsigned portable = largest < kPortableCluster ? largest : kPortableCluster;
  while (2 * cluster <= portable && 2 * cluster * positions <= device.multiprocessors &&
         vectors >= 2 * int64_t(cluster) * kHugeLanes)
    cluster *= 2;
  return cluster;
}

template <class S, Target kTarget>
int launch_looped(const Problem<AccumulateType<S>>& problem, Stream stream) {
  const auto slot = int64_t(sizeof(Softmax<AccumulateType<S>>));
  return launch(looped_rows_kernel<S, kTarget>,
                Grid{problem.positions, kLoopThreads, 1, kLoopThreads / kWarp * slot}, stream, problem);
}

template <class S, Target kTarget>
int launch_streamed(const Problem<AccumulateType<S>>& problem, Stream stream) {
  const auto slot = int64_t(sizeof(Softmax<AccumulateType<S>>));
  return launch(streamed_rows_kernel<S, kTarget>,
                Grid{problem.positions, kStreamThreads, 1, kStreamThreads / kWarp * slot}, stream, problem);
}

template <class S, Target kTarget>
int launch_adjacent(const Problem<AccumulateType<S>>& problem, const Device& device, Stream stream) {
  constexpr int kLong = kLongVectors<S>;
  const int64_t vectors = vectors_a_row<S>(problem);
  if (vectors <= 8 * 4) return launch_held<S, kTarget, 8, 4>(problem, 1, stream);
  if (vectors <= 32 * kLong) return launch_held<S, kTarget, 32, kLong>(problem, 1, stream);
  if (vectors <= 128 * kLong) return launch_held<S, kTarget, 128, kLong>(problem, 1, stream);
  // Of fewer rows than this a cluster each keeps more of the chip busy.
  if (!problem.grad && problem.positions >= device.multiprocessors)
    return launch_streamed<S, kTarget>(problem, stream);
  const unsigned largest = largest_cluster(held_rows_kernel<S, kTarget, kHugeLanes, kLong>,
                                           held_grid<S, kHugeLanes>(1, kLargestCluster), device,
                                           vectors > kPortableCluster * kHugeLanes * kLong);
  const unsigned cluster = cluster_for<S>(vectors, problem.positions, largest, device);
  if (cluster) return launch_held<S, kTarget, kHugeLanes, kLong>(problem, cluster, stream);
  return launch_looped<S, kTarget>(problem, stream);
}

template <class S, Target kTarget>
int launch_tile(const Problem<AccumulateType<S>>& problem, Stream stream) {
  const int64_t bytes = kTileThreads * problem.classes * int64_t(sizeof(S)) * (problem.soft_target ? 2 : 1);
  return launch(tile_kernel<S, kTarget>,
                Grid{blocks_for(problem.positions, kTileThreads), kTileThreads, 1, bytes}, stream, problem);
}

template <class S, Target kTarget>
int launch_positions(const Problem<AccumulateType<S>>& problem, Stream stream) {
  const unsigned along_classes = problem.classes <= 32 ? 1 : problem.classes <= 256 ? 4 : 8;
  const unsigned along_positions = kPositionThreads / along_classes;
  const auto slot = int64_t(sizeof(Softmax<AccumulateType<S>>));
  return launch(positions_kernel<S, kTarget>,
                Grid{blocks_for(problem.positions, along_positions), along_positions, along_classes,
                     along_classes > 1 ? kPositionThreads * slot : 0},
                stream, problem);
}

// Threads along fewer positions than this would leave most of each 32-byte sector unread.
constexpr int64_t kFewPositions = 16;

template <class S, Target kTarget>
int launch_target(const Problem<AccumulateType<S>>& problem, const Device& device, Stream stream) {
  const bool small = problem.classes * int64_t(sizeof(S)) <= kTileRowBytes;
  if (classes_adjacent<S>(problem)) {
    if (small) return launch_tile<S, kTarget>(problem, stream);
    return can_be_held<S>(problem) ? launch_adjacent<S, kTarget>(problem, device, stream)
                                   : launch_looped<S, kTarget>(problem, stream);
  }
  return small || problem.inner >= kFewPositions ? launch_positions<S, kTarget>(problem, stream)
                                                 : launch_looped<S, kTarget>(problem, stream);
}

template <class S>
int launch_rows(const Problem<AccumulateType<S>>& problem, const Device& device, Stream stream) {
  if (problem.soft_target || (problem.weight && problem.prob_coeff != 0))
    return launch_target<S, Target::kAny>(problem, device, stream);
  if (problem.inverse_temperature != 0) return launch_target<S, Target::kEntropy>(problem, device, stream);
  return problem.prob_coeff != 0 ? launch_target<S, Target::kSmooth>(problem, device, stream)
                                 : launch_target<S, Target::kHard>(problem, device, stream);
}

template <class S>
int launch_scaling(const Scaling& scaling, const Device& device, Stream stream) {
  const int64_t vectors = blocks_for(scaling.n, Vector<S>::kSize) + 1;
  const int64_t wanted = blocks_for(vectors, 4 * kScalingThreads),
                most = 8 * int64_t{1} * device.multiprocessors;
  return launch(scaling_kernel<S>, Grid{wanted < most ? wanted : most, kScalingThreads}, stream, scaling);
}

template <class Source, class Finish>
int launch_sum(const Source& source, int64_t n, double* scratch, const Finish& finish, Stream stream) {
  constexpr int64_t kSlots = kSumThreads / kWarp * int64_t(sizeof(Pair));
  Pair* const partial = reinterpret_cast<Pair*>(scratch);
  const int64_t least = blocks_for(n, kMostPartials), chunk = least > kSumChunk ? least : kSumChunk;
  const int64_t blocks = blocks_for(n, chunk);
  const int code = launch(sum_kernel<Source, Finish>, Grid{blocks, kSumThreads, 1, kSlots}, stream, source, n,
                          chunk, partial, finish);
  if (blocks == 1 || code != 0) return code;
  return launch(sum_kernel<Partials, Finish>, Grid{1, kSumThreads, 1, kSlots}, stream, Partials{partial},
                blocks, blocks, static_cast<Pair*>(nullptr), finish);
}

template <class Acc>
int launch_totals(const Problem<Acc>& problem, Totals* totals, double* scratch, Stream stream) {
  return launch_sum(TargetWeights<Acc>{problem.target, problem.weight, problem.classes, problem.ignore_index},
                    problem.positions, scratch, ToTotals{totals}, stream);
}

template <class Acc>
int launch_loss(const Acc* losses, const LossSum& sum, double* scratch, Stream stream) {
  return launch_sum(Losses<Acc>{losses}, sum.positions, scratch, ToLoss{sum}, stream);
}

}  // namespace mbperf::cuda
