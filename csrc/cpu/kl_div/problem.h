// The arguments and results of a kernel of kl_div_from_logits. For student logits x and teacher logits z over
// the classes c of a row, at temperature T:
//   q_c = exp((x_c - m_x) / T) / s_x,  p_c = exp((z_c - m_z) / T) / s_z,  m the largest logit, s the sum
//   d = sum exp((z_c - m_z) / T) ((z_c - m_z) - (x_c - m_x))
//   loss = sum p_c (log p_c - log q_c) = d / (T s_z) + log(s_x / s_z)
//   grad_c = (q_c - p_c) scale / T
// A class with p_c = 0 adds nothing to d, whatever its logits. Plain data, no torch, no STL.
#pragma once

#include "cpu/cross_entropy/path.h"

namespace mbperf {

// First choices, by the sizes of caches; not tuned by measurement.

// Rows are worked in blocks of this many classes: two blocks of float logits and their exponentials take a
// first-level cache of 32 KiB, and block boundaries do not depend on the number of threads.
constexpr int64_t kPairBlock = 2048;

// The longest row of half precision whose exponentials are kept for the gradient, in blocks: both sides take
// 512 KiB, half a second-level cache.
constexpr int64_t kMostKeptBlocks = 32;

static constexpr int64_t pair_block_count(int64_t classes) { return (classes + kPairBlock - 1) / kPairBlock; }

// Sums over one block of consecutive classes of one row, or over a whole row once merged.
// Acc is float for float, bfloat16 and float16 logits, double for double.
template <typename Acc>
struct PairSums {
  Acc m_x, s_x, m_z, s_z, d;

  template <typename Other>
  PairSums<Other> as() const {
    return {Other(m_x), Other(s_x), Other(m_z), Other(s_z), Other(d)};
  }
};

template <typename Acc>
struct KlDivProblem {
  const void *student, *teacher;           // x and z: (rows, classes), a row's classes adjacent
  int64_t student_stride, teacher_stride;  // from row to row, in elements
  void* grad;                              // of the student, contiguous; nullptr: not wanted
  int64_t rows, classes;
  Acc inverse_temperature;
  Acc scale;              // d(result)/d(loss of a row) / T
  const Acc* row_scale;   // a further factor for each row (the upstream gradient), or nullptr
  Acc* loss;              // one a row, or nullptr
  bool streaming_stores;  // the gradient is larger than the last cache: do not read its lines first
};

// The kernels of one logit dtype. A range [begin, end) counts rows; the returned value is the sum of the
// losses of that range.
template <typename Acc>
struct KlDivDtype {
  double (*rows)(const KlDivProblem<Acc>&, int64_t begin, int64_t end);
  double (*tiles)(const KlDivProblem<Acc>&, int64_t begin, int64_t end);
  // One row spread over threads: sums of a block; their merger, which also writes the loss and returns it;
  // the gradient of a block.
  PairSums<Acc> (*block_sums)(const KlDivProblem<Acc>&, int64_t row, int64_t block);
  double (*merge_blocks)(const KlDivProblem<Acc>&, int64_t row, const PairSums<Acc>* blocks,
                         PairSums<Acc>* merged);
  void (*block_gradient)(const KlDivProblem<Acc>&, int64_t row, int64_t block, const PairSums<Acc>& merged);
};

struct KlDivKernels {
  KlDivDtype<float> float32, bfloat16, float16;
  KlDivDtype<double> float64;
};

extern const KlDivKernels kKlDivBaseline;
extern const KlDivKernels kKlDivAvx2;
extern const KlDivKernels kKlDivAvx512;
extern const KlDivKernels kKlDivNeon;

}  // namespace mbperf
