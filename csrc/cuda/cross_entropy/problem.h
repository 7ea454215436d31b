// The arguments of a launch of the cross entropy kernels. For logits x and a target distribution t_c
// (weighted, smoothed) over the classes c of a row:
//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s,  lse = m + log(s)
//   loss = log(s) sum t_c - sum t_c (x_c - m) + z_loss lse^2
//   grad_c = (p_c (sum t_c + 2 z_loss lse) - t_c) scale
// With an entropy H at temperature T, for hard targets y alone and t_y = -1, so that the loss is log p_y:
//   z_c = (x_c - m) / T,  s = sum exp(z_c),  p_c = exp(z_c) / s,  mean = sum p_c z_c
//   H = -sum p_c log p_c = log(s) - mean: neither term is negative, so that nothing cancels
//   grad_c = ((c == y) - p_c) / T scale - p_c (z_c - mean) / T entropy_scale
// Plain data, no torch, no CUDA header: kernels read it on the device or, through host_shim, on the CPU.
#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "half.h"
#include "strides.h"

namespace mbperf::cuda {

// The type that logits S are accumulated in.
template <class S>
struct Accumulate {
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};
template <class S>
using AccumulateType = typename Accumulate<S>::Type;

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The divisor of `mean`, known on the device alone: the host never waits for it.
struct Totals {
  double denominator;  // sum of the targets' weights over the positions that count
  double scale;        // 1 / denominator
  double z_ratio;      // denominator / number of positions that count: the z loss is averaged over these
};

// The loss is never formed as lse - x_y: at logits of 2^24 that would round it away.
template <class Acc>
struct Problem {
  const void* input;
  void* grad;               // nullptr: no gradient wanted; may be input
  const void* soft_target;  // probabilities of input's dtype and shape, or nullptr
  Strides input_strides, grad_strides, soft_strides;
  const int64_t* target;  // one a position; nullptr when soft_target is set
  const Acc* weight;      // one a class, or nullptr
  int64_t positions, inner, classes, ignore_index;
  Acc target_coeff;      // 1 - label_smoothing
  Acc prob_coeff;        // label_smoothing / classes
  Acc z_loss;            // times totals->z_ratio where totals are given
  Acc scale;             // d(result)/d(loss_p), where totals are not given
  const Totals* totals;  // of a mean over class indices, else nullptr
  const Acc* upstream;   // times this, one for all or one a position; nullptr is 1
  bool upstream_per_position;
  bool known_softmax;  // row_max, row_sum and row_moment are inputs: only the gradient is computed
  Acc* loss;           // per position, or nullptr
  Acc* row_max;        // per position, both or neither
  Acc* row_sum;
  Acc inverse_temperature;   // 1 / T, or 0: no entropy wanted, logits as they are
  const Acc* entropy_scale;  // d(result)/d(H) per position, or nullptr
  Acc* entropy;              // H per position, or nullptr
  Acc* row_moment;           // sum of exp(z_c) z_c, with row_max and row_sum where an entropy is wanted
};

// Sum of n numbers, or of pairs of numbers, in double, over chunks that depend on n alone.
struct Pair {
  double first, second;
};
constexpr int64_t kSumChunk = 8192;
constexpr int64_t kMostPartials = 1024;

// Doubles of scratch that the sums below take.
constexpr int64_t kScratchDoubles = 2 * kMostPartials;

struct LossSum {
  int64_t positions;
  double denominator;    // where totals are not given
  const Totals* totals;  // or nullptr
  void* loss;            // one number
  Dtype dtype;
};

// grad *= *upstream unless it is 1, after checking hard targets again; n elements, adjacent.
struct Scaling {
  void* grad;
  int64_t n;
  const void* upstream;
  Dtype upstream_dtype;
  const int64_t* target;  // or nullptr
  int64_t positions, classes, ignore_index;
};

struct Device {
  int multiprocessors;
  bool has_clusters;  // compute capability 9.0 or later
};

// All return a cudaError_t; 0 is success. Instantiated once a dtype, in <dtype>.cu.
template <class S>
int launch_rows(const Problem<AccumulateType<S>>& problem, const Device& device, Stream stream);
template <class S>
int launch_scaling(const Scaling& scaling, const Device& device, Stream stream);
// Instantiated once an accumulation type, in sums.cu.
template <class Acc>
int launch_totals(const Problem<Acc>& problem, Totals* totals, double* scratch, Stream stream);
template <class Acc>
int launch_loss(const Acc* losses, const LossSum& sum, double* scratch, Stream stream);

}  // namespace mbperf::cuda
