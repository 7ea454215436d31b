// The arguments and results of a row kernel of cross entropy. For logits x and a target distribution t_c
// (weighted, smoothed) over the classes c of a row:
//   m = max x_c,  s = sum exp(x_c - m),  p_c = exp(x_c - m) / s,  lse = m + log(s)
//   loss = log(s) sum t_c - sum t_c (x_c - m) + z_loss lse^2
//   grad_c = (p_c (sum t_c + 2 z_loss lse) - t_c) scale
// With an entropy H at temperature T, for hard targets y alone and t_y = -1, so that the loss is log p_y:
//   z_c = (x_c - m) / T,  s = sum exp(z_c),  p_c = exp(z_c) / s,  mean = sum p_c z_c
//   H = -sum p_c log p_c = log(s) - mean: neither term is negative, so that nothing cancels
//   grad_c = ((c == y) - p_c) / T scale - p_c (z_c - mean) / T entropy_scale
// With statistics: H and the class of m, at temperature 1, beside any targets and without a gradient of H.
// Plain data, no torch, no STL: the files that include it, one an instruction set, emit no weak symbols.
#pragma once

#include <cstdint>

#include "half.h"
#include "strides.h"

namespace mbperf {

// Statistics of one block of kBlock consecutive classes of one row, or of a whole row once merged.
// Acc is float for float, bfloat16 and float16 logits, double for double.
template <typename Acc>
struct Softmax {
  Acc m;       // largest logit
  Acc s;       // sum of exp(x_c - m)
  Acc tx_sum;  // sum of t_c (x_c - m)
  Acc t_sum;   // sum of t_c: 0 in a kernel for hard targets until the target's own t_y is added
  Acc moment;  // sum of exp(z_c) z_c, where an entropy is wanted: z_c = x_c - m for statistics
};

// The loss is never formed as lse - x_y: at logits of 2^24 that would round it away.
template <typename Acc>
struct Problem {
  const void* input;
  Strides input_strides;
  void* grad;  // nullptr: no gradient wanted
  Strides grad_strides;
  const int64_t* target;    // hard targets, one a position; nullptr when soft_target is set
  const void* soft_target;  // probabilities, same dtype and shape as input
  Strides soft_strides;
  const Acc* weight;  // one a class, or nullptr
  int64_t positions, inner, classes;
  int64_t ignore_index;
  Acc target_coeff;  // 1 - label_smoothing
  Acc prob_coeff;    // label_smoothing / classes
  Acc weight_sum;    // with smoothing: sum of weight, or classes
  Acc z_loss;
  Acc scale;             // d(result)/d(loss_p): 1 / denominator for mean, 1 for sum
  const Acc* row_scale;  // per position instead of scale (reduction none), or nullptr
  Acc* loss;             // per position, or nullptr
  Acc* row_max;          // per position, both or neither
  Acc* row_sum;
  Acc inverse_temperature;   // 1 / T, or 0: no entropy that has a gradient wanted, logits as they are
  const Acc* entropy_scale;  // d(result)/d(H) per position, or nullptr
  Acc* entropy;              // H per position, or nullptr
  Acc* row_moment;           // with row_max and row_sum where an entropy is wanted
  int64_t* predicted;        // with entropy, row_max and row_sum: the class of m per position, or nullptr
  Acc* probability;          // with predicted: p of that class
  bool known_softmax;        // row_max, row_sum and row_moment are inputs: only the gradient is computed
  bool streaming_stores;     // the gradient is larger than the last cache: do not read its lines first
};

// The vectors of a dtype's kernels, as far as they decide which kernel serves a problem.
struct VectorShape {
  int width;              // lanes
  bool parts_by_element;  // part of a vector is read and written element by element
};

// The kernels of one logit dtype. A range [begin, end) counts positions; the returned value is the sum of
// the losses of that range.
template <typename Acc>
struct DtypeKernels {
  VectorShape vector;
  double (*rows)(const Problem<Acc>&, int64_t begin, int64_t end);
  double (*groups)(const Problem<Acc>&, int64_t begin, int64_t end);
  double (*tiles)(const Problem<Acc>&, int64_t begin, int64_t end);
  // Sets predicted and probability, after a kernel that has set row_max and row_sum.
  void (*predict)(const Problem<Acc>&, int64_t begin, int64_t end);
  // One row spread over threads: statistics of a block; their merger (or what is known already), which
  // also writes the loss and returns it; the gradient of a block.
  Softmax<Acc> (*block_statistics)(const Problem<Acc>&, int64_t position, int64_t block);
  double (*merge_blocks)(const Problem<Acc>&, int64_t position, const Softmax<Acc>* blocks,
                         Softmax<Acc>* row);
  void (*block_gradient)(const Problem<Acc>&, int64_t position, int64_t block, const Softmax<Acc>& row);
};

struct RowKernels {
  DtypeKernels<float> float32, bfloat16, float16;
  DtypeKernels<double> float64;
  // Counts the targets that are not ignore_index. Returns the index of the first of them outside
  // [0, classes), or -1.
  int64_t (*scan_targets)(const int64_t* target, int64_t n, int64_t classes, int64_t ignore_index,
                          int64_t* live);
};

extern const RowKernels kRowsBaseline;
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
extern const RowKernels kRowsNeon;
// Those that serve problems with statistics, and no others.
extern const RowKernels kStatsBaseline;
extern const RowKernels kStatsAvx2;
extern const RowKernels kStatsAvx512;
extern const RowKernels kStatsNeon;

}  // namespace mbperf
