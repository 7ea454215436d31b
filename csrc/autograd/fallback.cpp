#include "autograd/fallback.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/select.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "checks.h"

namespace mbperf {
namespace {

at::ScalarType accumulate_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// z_loss lse^2 of the positions that count, reduced as the loss is: over positions, without weights.
Tensor z_term(const Tensor& lse, const Tensor& target, bool soft, const Settings& s) {
  Tensor term = s.z_loss * lse.square();
  Tensor live = soft ? at::ones_like(lse, lse.options().dtype(at::kBool))
                     : (target != s.ignore_index).reshape_symint(lse.sym_sizes());
  term = at::where(live, term, at::zeros({}, term.options()));
  if (s.reduction == kNone) return term;
  return s.reduction == kSum ? term.sum() : term.sum() / live.sum();
}

}  // namespace

int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

Tensor widened(const Tensor& t) { return t.is_floating_point() ? t.to(accumulate_type(t.scalar_type())) : t; }

Tensor ignored_positions(const Tensor& input, const Tensor& target, const Settings& s) {
  return (target == s.ignore_index).reshape_symint(at::select(input, class_dim(input), 0).sym_sizes());
}

double checked_softcap(std::optional<double> softcap) {
  TORCH_CHECK_VALUE(!softcap || (*softcap >= 1e-30 && *softcap <= 1e30),
                    "cross_entropy: softcap must be a number between 1e-30 and 1e30 or None, got ", *softcap);
  return softcap.value_or(0);
}

Tensor softcapped(const Tensor& input, const Settings& s) {
  return s.softcap == 0 || !input.is_floating_point() ? input : s.softcap * at::tanh(input / s.softcap);
}

LossAndLse by_torch(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                    const Settings& s, bool wants_lse) {
  const bool soft = is_soft(input, target), needs_lse = wants_lse || s.z_loss != 0;
  const int64_t dim = class_dim(input);
  if (!is_fused_case(input, target, weight, s.reduction, s.ignore_index, s.label_smoothing)) {
    const Tensor capped = softcapped(input, s);
    Tensor loss =
        at::cross_entropy_loss_symint(capped, target, weight, s.reduction, s.ignore_index, s.label_smoothing);
    Tensor lse = needs_lse ? at::logsumexp(widened(capped), dim) : Tensor();
    if (s.z_loss != 0) loss = loss + z_term(lse, target, soft, s);
    return {s.out_dtype ? loss.to(*s.out_dtype) : loss, lse};
  }
  Tensor logits = widened(input);
  if (!soft) logits = logits.masked_fill(ignored_positions(input, target, s).unsqueeze(dim), 0);
  logits = softcapped(logits, s);
  const OptionalTensor wide_weight =
      weight && weight->defined() ? OptionalTensor(widened(*weight)) : std::nullopt;
  Tensor loss = at::cross_entropy_loss_symint(logits, widened(target), wide_weight, s.reduction,
                                              s.ignore_index, s.label_smoothing);
  Tensor lse = needs_lse ? at::logsumexp(logits, dim) : Tensor();
  if (needs_lse && !soft) lse = lse.masked_fill(ignored_positions(input, target, s), 0);
  if (s.z_loss != 0) loss = loss + z_term(lse, target, soft, s);
  return {loss.to(s.out_dtype.value_or(input.scalar_type())), lse};
}

Stats stats_by_torch(const Tensor& input, const Tensor& target, const Settings& s) {
  const int64_t dim = class_dim(input);
  const Tensor all_logits = widened(input.detach());
  const OptionalTensor ignored =
      is_soft(input, target) ? std::nullopt : OptionalTensor(ignored_positions(input, target, s));
  const auto masked = [&](const Tensor& rows, double value) {
    return ignored ? rows.masked_fill(*ignored, value) : rows;
  };
  const Tensor logits =
      softcapped(ignored ? all_logits.masked_fill(ignored->unsqueeze(dim), 0) : all_logits, s);
  const Tensor log_p = at::log_softmax(logits, dim), p = log_p.exp();
  // 0 log 0 is 0.
  const Tensor finite = log_p.masked_fill(log_p == -std::numeric_limits<double>::infinity(), 0);
  return {masked(-(p * finite).sum(dim), 0), masked(logits.argmax(dim), -1), masked(p.amax(dim), 0)};
}

}  // namespace mbperf
