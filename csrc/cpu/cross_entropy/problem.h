// What a row kernel of cross entropy is told and what it hands back. Plain data: no torch, no STL, so that
// the per-instruction-set files that include it emit no shared (weak) symbols.
#pragma once

#include <cstdint>

#include "half.h"
#include "strides.h"

namespace mbperf {

// Statistics of one block of kBlock consecutive classes of one row, or of a whole row once merged.
// Acc is float for float, bfloat16 and float16 logits, double for double.
template <typename Acc>
struct Softmax {
  Acc max;     // largest logit
  Acc sum;     // sum of exp(logit - max)
  Acc linear;  // sum of q_c (logit_c - max): q is the soft target or the smoothing share, 0 without either
  Acc mass;    // sum of q_c
};

// With q_c the target distribution (weighted, smoothed) of a row, a = sum q_c, lse = max + log(sum):
//   loss = a log(sum) - sum_c q_c (x_c - max) + z_loss lse^2
//   grad_c = softmax_c (a + 2 z_loss lse) scale - q_c scale
// never max + log(sum) first: at logits of 2^24 that would round away the loss.
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
  bool known_softmax;     // row_max and row_sum are inputs: only the gradient is computed
  bool streaming_stores;  // the gradient is larger than the last cache: do not read its lines first
};

// What the vectors of a dtype's kernels are like, as far as it decides which kernel serves a problem.
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

}  // namespace mbperf
