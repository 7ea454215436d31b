// Which arguments of cross_entropy the fused kernels serve. Everything else is handed to torch's own
// cross_entropy, which answers or raises in its own words; so no check is written, or worded, twice.
#pragma once

#include <ATen/core/Tensor.h>

namespace mbperf {

enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// torch decides by the shapes alone whether target holds probabilities.
inline bool is_soft(const at::Tensor& input, const at::Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

inline bool is_fused_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}

inline bool hard_target_fits(const at::Tensor& input, const at::Tensor& target) {
  const bool is_index =
      target.scalar_type() == at::kLong || (target.scalar_type() == at::kByte && input.dim() <= 2);
  if (!is_index) return false;
  if (input.dim() == 1) return target.dim() <= 1 && target.sym_numel() == 1;
  if (target.dim() != input.dim() - 1 || target.sym_size(0) != input.sym_size(0)) return false;
  for (int64_t d = 1; d < target.dim(); ++d)
    if (target.sym_size(d) != input.sym_size(d + 1)) return false;
  return true;
}

inline bool soft_target_fits(const at::Tensor& input, const at::Tensor& target, bool ignores) {
  return target.scalar_type() == input.scalar_type() && !ignores;
}

inline bool weight_fits(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                        const c10::SymInt& classes) {
  return !weight || !weight->defined() ||
         (weight->dim() == 1 && weight->sym_size(0) == classes &&
          weight->scalar_type() == input.scalar_type() && weight->device() == input.device());
}

inline bool is_fused_case(const at::Tensor& input, const at::Tensor& target,
                          const std::optional<at::Tensor>& weight, int64_t reduction,
                          const c10::SymInt& ignore_index, double label_smoothing) {
  if (!is_fused_dtype(input.scalar_type()) || input.layout() != at::kStrided || input.dim() < 1) return false;
  if (target.layout() != at::kStrided || target.device() != input.device()) return false;
  // A graph that is recorded for rows counted only when it runs is fused too: no row is no fault.
  if (TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0)) || reduction < kNone || reduction > kSum)
    return false;
  if (!(label_smoothing >= 0.0 && label_smoothing <= 1.0)) return false;
  const c10::SymInt classes = input.sym_size(input.dim() == 1 ? 0 : 1);
  if (!weight_fits(input, weight, classes)) return false;
  return is_soft(input, target) ? soft_target_fits(input, target, ignore_index >= 0)
                                : hard_target_fits(input, target);
}

}  // namespace mbperf
