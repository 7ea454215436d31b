// The arguments of a launch of the KL divergence kernels; formulas and letters as in cpu/kl_div/problem.h.
// For student logits x and teacher logits z over the classes c of a row, at temperature T:
//   q_c = exp((x_c - m_x) / T) / s_x,  p_c = exp((z_c - m_z) / T) / s_z
//   d = sum exp((z_c - m_z) / T) ((z_c - m_z) - (x_c - m_x)),  loss = d / (T s_z) + log(s_x / s_z)
//   grad_c = (q_c - p_c) scale / T
// Plain data, no torch, no CUDA header.
#pragma once

#include "cuda/cross_entropy/problem.h"

namespace mbperf::cuda {

// Rows of student, teacher and gradient all start at the same place within 16 bytes.
template <class Acc>
struct KlDivProblem {
  const void *student, *teacher;
  void* grad;                              // contiguous; nullptr: not wanted
  int64_t student_stride, teacher_stride;  // from row to row, in elements
  int64_t rows, classes;
  Acc inverse_temperature;
  Acc scale;            // d(result)/d(loss of a row) / T
  const Acc* upstream;  // times this, one for all or one a row; nullptr is 1
  bool upstream_per_row;
  Acc* loss;  // one a row, or nullptr
};

// Returns a cudaError_t; 0 is success. Instantiated once a dtype, in kernels.cu.
template <class S>
int launch_kl_div(const KlDivProblem<AccumulateType<S>>& problem, Stream stream);

}  // namespace mbperf::cuda
