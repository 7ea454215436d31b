// What every backend of kl_div_from_logits shares: its reductions.
#pragma once

#include <ATen/ATen.h>

#include "checks.h"

namespace mbperf {

// Beside those of checks.h: the sum over the size of the first dimension.
constexpr int64_t kBatchMean = 3;

// What the sum of the losses of all rows is divided by. Of one row, student (C), the batch is that row.
inline double kl_div_denominator(const at::Tensor& student, int64_t reduction) {
  if (reduction == kMean) return double(student.numel());
  return reduction == kBatchMean && student.dim() > 1 ? double(student.size(0)) : 1;
}

}  // namespace mbperf
