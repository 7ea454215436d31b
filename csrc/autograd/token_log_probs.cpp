// The differentiable log-probabilities of targets, with the entropies of their rows: forward keeps two or
// three numbers a row, backward takes both upstream gradients in one pass. Double backward, forward mode and
// functorch transforms go through torch's own operators, which hold several times the logits.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/log_softmax.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "autograd/nodes.h"
#include "autograd/token_log_probs.h"
#include "checks.h"

namespace mbperf {

LogProbs token_log_probs_by_torch(const Tensor& logits, const Tensor& target, const TokenSettings& s) {
  const int64_t dim = class_dim(logits);
  const Tensor index = target.to(at::kLong), ignored = index == s.ignore_index;
  const Tensor live = widened(logits).masked_fill(ignored.unsqueeze(dim), 0);
  const Tensor log_p = at::log_softmax(live / s.temperature, dim);
  const auto handed_out = [&](const Tensor& rows) {
    const Tensor masked = rows.masked_fill(ignored, 0);
    return s.out_dtype ? masked.to(*s.out_dtype) : masked;
  };
  const Tensor at_target = log_p.gather(dim, index.masked_fill(ignored, 0).unsqueeze(dim)).squeeze(dim);
  if (!s.wants_entropy) return {handed_out(at_target), Tensor(), Tensor()};
  // 0 log 0 is 0, with a gradient of 0.
  const Tensor finite = log_p.masked_fill(log_p == -std::numeric_limits<double>::infinity(), 0);
  return {handed_out(at_target), handed_out(-(log_p.exp() * finite).sum(dim)), Tensor()};
}

void check_token_settings(const char* function, const TokenSettings& s) {
  // As float32 its inverse is then finite and not 0.
  TORCH_CHECK_VALUE(s.temperature >= 1e-30 && s.temperature <= 1e30, function,
                    ": temperature must be a number between 1e-30 and 1e30, got ", s.temperature);
  TORCH_CHECK_TYPE(!s.out_dtype || is_fused_dtype(*s.out_dtype), function,
                   ": out_dtype must be float32, float64, bfloat16 or float16, got ", *s.out_dtype);
}

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

LogProbs forward(const Tensor& logits, const Tensor& target, const TokenSettings& s) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, double, c10::SymInt,
                                                       OptionalDtype, bool);
  static const auto op = operator_named<Signature>("mbperf::token_log_probs_forward");
  auto [log_probs, entropy, row_statistics] =
      op.call(logits, target, s.temperature, s.ignore_index, s.out_dtype, s.wants_entropy);
  return {log_probs, s.wants_entropy ? entropy : Tensor(), row_statistics};
}

Tensor backward(const OptionalTensor& grad_log_probs, const OptionalTensor& grad_entropy,
                const Tensor& logits, const Tensor& target, const Tensor& row_statistics,
                const TokenSettings& s) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, double, c10::SymInt,
                           const OptionalTensor&, const OptionalTensor&);
  static const auto op = operator_named<Signature>("mbperf::token_log_probs_backward");
  return op.call(logits, target, row_statistics, s.temperature, s.ignore_index, grad_log_probs, grad_entropy);
}

class TokenLogProbsBackward : public torch::autograd::Node {
 public:
  TokenLogProbsBackward(const Tensor& logits, const Tensor& target, TokenSettings settings)
      : Node(torch::autograd::collect_next_edges(logits)),
        settings_(std::move(settings)),
        logits_(logits, false),
        target_(target, false) {}

  void keep_statistics(const Tensor& row_statistics) {
    row_statistics_ = SavedVariable(row_statistics, false);
  }

  std::string name() const override { return "TokenLogProbsBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!task_should_compute_output(0)) return {Tensor()};
    const auto upstream = [&](size_t i) {
      return grads.size() > i && grads[i].defined() ? OptionalTensor(grads[i]) : std::nullopt;
    };
    if (!upstream(0) && !upstream(1)) return {Tensor()};
    if (at::GradMode::is_enabled()) return {by_torch_again(grads)};
    return {backward(upstream(0), upstream(1), logits_.unpack(), target_.unpack(), row_statistics_.unpack(),
                     settings_)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    logits_.reset_data();
    target_.reset_data();
    row_statistics_.reset_data();
    released_ = true;
  }

 private:
  // With create_graph: the gradient as a differentiable function of the logits and the upstream gradients.
  Tensor by_torch_again(const variable_list& grads) {
    const Tensor logits = logits_.unpack();
    const LogProbs again = token_log_probs_by_torch(logits, target_.unpack(), settings_);
    const Tensor all[] = {again.log_probs, again.entropy};
    variable_list outputs, upstream;
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) {
        outputs.push_back(all[i]);
        upstream.push_back(grads[i]);
      }
    return torch::autograd::grad(outputs, {logits}, upstream, /*retain_graph=*/true,
                                 /*create_graph=*/true)[0];
  }

  TokenSettings settings_;
  SavedVariable logits_, target_, row_statistics_;
  bool released_ = false;
};

void check_arguments(const Tensor& logits, const Tensor& target, const TokenSettings& s) {
  TORCH_CHECK_TYPE(is_fused_dtype(logits.scalar_type()),
                   "token_log_probs: logits must be float32, float64, bfloat16 or float16, got ",
                   logits.scalar_type());
  TORCH_CHECK_VALUE(logits.layout() == at::kStrided && target.layout() == at::kStrided,
                    "token_log_probs: logits and target must be dense tensors, got ", logits.layout(),
                    " and ", target.layout());
  TORCH_CHECK_VALUE(target.device() == logits.device(), "token_log_probs: target must be on the device of ",
                    "logits, ", logits.device(), ", got ", target.device());
  TORCH_CHECK_VALUE(logits.dim() >= 1, "token_log_probs: logits must have a dimension of classes, got none");
  TORCH_CHECK_VALUE(hard_target_fits(logits, target),
                    "token_log_probs: target must hold int64 class indices in the shape of logits without ",
                    "dimension ", class_dim(logits), ", got ", target.scalar_type(), " of shape ",
                    target.sym_sizes(), " for logits of shape ", logits.sym_sizes());
  check_token_settings("token_log_probs", s);
}

LogProbs log_probs(const Tensor& logits, const Tensor& any_target, const TokenSettings& s) {
  check_arguments(logits, any_target, s);
  const Tensor target = logits.dim() == 1 && any_target.dim() == 1 ? any_target.squeeze(0) : any_target;
  if (is_transformed(logits) || is_transformed(target) || TORCH_GUARD_OR_FALSE(logits.sym_numel().sym_eq(0)))
    return token_log_probs_by_torch(logits, target, s);
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward(logits, target, s);
  };
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) return run();
  auto* raw = new TokenLogProbsBackward(logits, target, s);
  const auto node = owned(raw);
  const LogProbs result = run();
  raw->keep_statistics(result.row_statistics);
  torch::autograd::set_history(result.log_probs, node);
  if (s.wants_entropy) torch::autograd::set_history(result.entropy, node);
  return result;
}

Tensor token_log_probs(const Tensor& logits, const Tensor& target, double temperature,
                       c10::SymInt ignore_index, OptionalDtype out_dtype) {
  return log_probs(logits, target, {temperature, std::move(ignore_index), out_dtype, false}).log_probs;
}

std::tuple<Tensor, Tensor> token_log_probs_with_entropy(const Tensor& logits, const Tensor& target,
                                                        double temperature, c10::SymInt ignore_index,
                                                        OptionalDtype out_dtype) {
  const LogProbs result = log_probs(logits, target, {temperature, std::move(ignore_index), out_dtype, true});
  return {result.log_probs, result.entropy};
}

}  // namespace

// Nothing for autocast: the kernels accumulate in float32 whatever they read, and hand out float32.
TORCH_LIBRARY_IMPL(mbperf, CompositeImplicitAutograd, m) {
  m.impl("token_log_probs", token_log_probs);
  m.impl("token_log_probs_with_entropy", token_log_probs_with_entropy);
}

}  // namespace mbperf
