// What every backend of kl_div_from_logits shares: its reductions, and how its calls are made.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace mbperf {

// Beside those of checks.h: the sum over the size of the first dimension.
constexpr int64_t kBatchMean = 3;

// What the sum of the losses of all rows is divided by. Of one row, student (C), the batch is that row.
inline double kl_div_denominator(const at::Tensor& student, int64_t reduction) {
  if (reduction == kMean) return double(student.numel());
  return reduction == kBatchMean && student.dim() > 1 ? double(student.size(0)) : 1;
}

// Sets what a backend's problem says of rows (N, C) of both logits.
template <class Acc, class Problem>
void set_logits(Problem& problem, const at::Tensor& student, const at::Tensor& teacher, double temperature,
                double denominator) {
  problem.student = student.const_data_ptr();
  problem.teacher = teacher.const_data_ptr();
  problem.student_stride = student.stride(0);
  problem.teacher_stride = teacher.stride(0);
  problem.rows = student.size(0);
  problem.classes = student.size(1);
  problem.inverse_temperature = Acc(1 / temperature);
  problem.scale = Acc(1 / (temperature * denominator));
}

// Calls body(Call<Acc>&), of the backend's own Call, with the accumulation type of the logits.
template <template <class> class Call, class Body>
auto with_call(const at::Tensor& student, const at::Tensor& teacher, double temperature, int64_t reduction,
               const Body& body) {
  if (student.scalar_type() == at::kDouble) {
    Call<double> call(student, teacher, temperature, reduction);
    return body(call);
  }
  Call<float> call(student, teacher, temperature, reduction);
  return body(call);
}

}  // namespace mbperf
