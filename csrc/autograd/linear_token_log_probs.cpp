// The differentiable log-probabilities and entropies of a linear layer's output: checks, autocast, and the
// node that computes the logits again, chunk by chunk, once the upstream gradients are known. Cases that the
// chunks do not serve are token_log_probs(linear(...)) in torch's own operators (reference below).
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>

#include "autograd/nodes.h"
#include "autograd/token_log_probs.h"
#include "checks.h"

namespace mbperf {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Wanted = std::array<bool, 3>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// A call; input is (N, H) from flattened() on.
struct LinearTokens {
  Tensor input, linear_weight, target, linear_bias;  // linear_bias is undefined where there is none
  TokenSettings settings;
  int64_t memory_budget;  // -1: none given

  OptionalTensor optional_bias() const {
    return linear_bias.defined() ? OptionalTensor(linear_bias) : std::nullopt;
  }
};

LogProbs forward(const LinearTokens& t) {
  using Signature =
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, c10::SymInt,
                                         int64_t, OptionalDtype, bool, const OptionalTensor&);
  static const auto op = operator_named<Signature>("mbperf::linear_token_log_probs_forward");
  auto [log_probs, entropy, row_statistics] =
      op.call(t.input, t.linear_weight, t.target, t.settings.temperature, t.settings.ignore_index,
              t.memory_budget, t.settings.out_dtype, t.settings.wants_entropy, t.optional_bias());
  return {log_probs, t.settings.wants_entropy ? entropy : Tensor(), row_statistics};
}

Gradients backward(const OptionalTensor& grad_log_probs, const OptionalTensor& grad_entropy,
                   const LinearTokens& t, const Tensor& row_statistics, Wanted wanted) {
  using Signature =
      Gradients(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, c10::SymInt, int64_t,
                Wanted, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);
  static const auto op = operator_named<Signature>("mbperf::linear_token_log_probs_backward");
  return op.call(t.input, t.linear_weight, t.target, row_statistics, t.settings.temperature,
                 t.settings.ignore_index, t.memory_budget, wanted, grad_log_probs, grad_entropy,
                 t.optional_bias());
}

LogProbs reference(const LinearTokens& t) {
  return token_log_probs_by_torch(at::linear(t.input, t.linear_weight, t.linear_bias), t.target, t.settings);
}

class LinearTokenLogProbsBackward : public torch::autograd::Node {
 public:
  explicit LinearTokenLogProbsBackward(const LinearTokens& t)
      : Node(torch::autograd::collect_next_edges(t.input, t.linear_weight, t.linear_bias)),
        settings_(t.settings),
        memory_budget_(t.memory_budget),
        input_(t.input, false),
        linear_weight_(t.linear_weight, false),
        target_(t.target, false),
        linear_bias_(t.linear_bias, false) {}

  void keep_statistics(const Tensor& row_statistics) {
    row_statistics_ = SavedVariable(row_statistics, false);
  }

  std::string name() const override { return "LinearTokenLogProbsBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    const auto upstream = [&](size_t i) {
      return grads.size() > i && grads[i].defined() ? OptionalTensor(grads[i]) : std::nullopt;
    };
    if (!upstream(0) && !upstream(1)) return variable_list(3);
    if (at::GradMode::is_enabled()) return by_reference(grads);
    const Wanted wanted{task_should_compute_output(0), task_should_compute_output(1),
                        task_should_compute_output(2)};
    const auto [input, weight, bias] =
        backward(upstream(0), upstream(1), saved(), row_statistics_.unpack(), wanted);
    return {wanted[0] ? input : Tensor(), wanted[1] ? weight : Tensor(), wanted[2] ? bias : Tensor()};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&input_, &linear_weight_, &target_, &linear_bias_, &row_statistics_})
      saved->reset_data();
    released_ = true;
  }

 private:
  LinearTokens saved() {
    return {input_.unpack(), linear_weight_.unpack(), target_.unpack(), linear_bias_.unpack(),
            settings_,       memory_budget_};
  }

  // With create_graph: the gradients as differentiable functions of everything.
  variable_list by_reference(const variable_list& grads) {
    const LinearTokens t = saved();
    const LogProbs again = reference(t);
    const Tensor values[] = {again.log_probs, again.entropy};
    const Tensor leaves[] = {t.input, t.linear_weight, t.linear_bias};
    variable_list outputs, upstream, inputs, result(3);
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) {
        outputs.push_back(values[i]);
        upstream.push_back(grads[i]);
      }
    std::vector<size_t> which;
    for (size_t i = 0; i < 3; ++i)
      if (task_should_compute_output(i)) {
        inputs.push_back(leaves[i]);
        which.push_back(i);
      }
    if (inputs.empty()) return result;
    const variable_list found =
        torch::autograd::grad(outputs, inputs, upstream, /*retain_graph=*/true, /*create_graph=*/true);
    for (size_t i = 0; i < which.size(); ++i) result[which[i]] = found[i];
    return result;
  }

  TokenSettings settings_;
  int64_t memory_budget_;
  SavedVariable input_, linear_weight_, target_, linear_bias_, row_statistics_;
  bool released_ = false;
};

void check_same_kind(const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK_TYPE(t.scalar_type() == input.scalar_type(), "linear_token_log_probs: ", name,
                   " must have the dtype of input, ", input.scalar_type(), ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == input.device(), "linear_token_log_probs: ", name,
                    " must be on the device of input, ", input.device(), ", got ", t.device());
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, "linear_token_log_probs: ", name,
                    " must be a dense tensor, got ", t.layout());
}

void check_target(const Tensor& target, const Tensor& input) {
  const bool is_index = target.scalar_type() == at::kLong || target.scalar_type() == at::kByte;
  const auto positions = input.sym_sizes().slice(0, input.dim() - 1);
  TORCH_CHECK_VALUE(is_index && target.sym_sizes() == positions,
                    "linear_token_log_probs: target must hold int64 class indices in the shape of input "
                    "without its last dimension, got ",
                    target.scalar_type(), " of shape ", target.sym_sizes(), " for input of shape ",
                    input.sym_sizes());
  TORCH_CHECK_VALUE(target.device() == input.device() && target.layout() == at::kStrided,
                    "linear_token_log_probs: target must be a dense tensor on the device of input, ",
                    input.device(), ", got ", target.layout(), " on ", target.device());
}

void check_arguments(const LinearTokens& t) {
  TORCH_CHECK_TYPE(is_fused_dtype(t.input.scalar_type()),
                   "linear_token_log_probs: input must be float32, float64, bfloat16 or float16, got ",
                   t.input.scalar_type());
  check_same_kind("input", t.input, t.input);
  TORCH_CHECK_VALUE(t.input.dim() >= 1, "linear_token_log_probs: input must have a dimension of features, ",
                    "got none");
  check_same_kind("linear_weight", t.linear_weight, t.input);
  TORCH_CHECK_VALUE(t.linear_weight.dim() == 2 && t.linear_weight.sym_size(1) == t.input.sym_size(-1) &&
                        t.linear_weight.sym_size(0) > 0,
                    "linear_token_log_probs: linear_weight must be of shape (V, H) with V > 0 and H the last "
                    "size of input, ",
                    t.input.sym_size(-1), ", got ", t.linear_weight.sym_sizes());
  if (t.linear_bias.defined()) {
    check_same_kind("linear_bias", t.linear_bias, t.input);
    TORCH_CHECK_VALUE(t.linear_bias.dim() == 1 && t.linear_bias.sym_size(0) == t.linear_weight.sym_size(0),
                      "linear_token_log_probs: linear_bias must be of shape (V) with V of linear_weight, ",
                      t.linear_weight.sym_size(0), ", got ", t.linear_bias.sym_sizes());
  }
  check_target(t.target, t.input);
  check_token_settings("linear_token_log_probs", t.settings);
}

LinearTokens flattened(const LinearTokens& t) {
  LinearTokens flat = t;
  if (t.input.dim() == 2) return flat;
  flat.input = t.input.dim() == 1 ? t.input.unsqueeze(0) : t.input.flatten(0, -2);
  flat.target = t.target.reshape({-1});
  return flat;
}

bool chunks_serve(const LinearTokens& t) {
  for (const Tensor& each : {t.input, t.linear_weight, t.linear_bias, t.target})
    if (is_transformed(each)) return false;
  return !TORCH_GUARD_OR_FALSE(t.input.sym_numel().sym_eq(0));
}

LogProbs by_chunks(const LinearTokens& t) {
  const auto run = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward(t);
  };
  const bool has_leaf = t.input.requires_grad() || t.linear_weight.requires_grad() ||
                        (t.linear_bias.defined() && t.linear_bias.requires_grad());
  if (!at::GradMode::is_enabled() || !has_leaf) return run();
  auto* raw = new LinearTokenLogProbsBackward(t);
  const auto node = owned(raw);
  const LogProbs result = run();
  raw->keep_statistics(result.row_statistics);
  torch::autograd::set_history(result.log_probs, node);
  if (t.settings.wants_entropy) torch::autograd::set_history(result.entropy, node);
  return result;
}

LogProbs log_probs(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                   const OptionalTensor& linear_bias, const TokenSettings& settings,
                   std::optional<int64_t> memory_budget) {
  TORCH_CHECK_VALUE(!memory_budget || *memory_budget >= 0,
                    "linear_token_log_probs: memory_budget must be a number of bytes >= 0 or None, got ",
                    *memory_budget);
  const LinearTokens given{
      input, linear_weight, target, linear_bias.value_or(Tensor()), settings, memory_budget.value_or(-1)};
  check_arguments(given);
  const LinearTokens flat = flattened(given);
  LogProbs result = chunks_serve(flat) ? by_chunks(flat) : reference(flat);
  if (input.dim() == 2) return result;
  result.log_probs = result.log_probs.reshape_symint(target.sym_sizes());
  if (settings.wants_entropy) result.entropy = result.entropy.reshape_symint(target.sym_sizes());
  return result;
}

Tensor linear_token_log_probs(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                              const OptionalTensor& linear_bias, double temperature, c10::SymInt ignore_index,
                              OptionalDtype out_dtype, std::optional<int64_t> memory_budget) {
  const TokenSettings s{temperature, std::move(ignore_index), out_dtype, false};
  return log_probs(input, linear_weight, target, linear_bias, s, memory_budget).log_probs;
}

std::tuple<Tensor, Tensor> linear_token_log_probs_with_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptionalTensor& linear_bias,
    double temperature, c10::SymInt ignore_index, OptionalDtype out_dtype,
    std::optional<int64_t> memory_budget) {
  const TokenSettings s{temperature, std::move(ignore_index), out_dtype, true};
  const LogProbs result = log_probs(input, linear_weight, target, linear_bias, s, memory_budget);
  return {result.log_probs, result.entropy};
}

// F.linear runs in the lower precision; what is made of its logits is in float32 in any case.
template <c10::DispatchKey kKey, auto kFunction>
auto in_lower_precision(const char* name, const Tensor& input, const Tensor& linear_weight,
                        const Tensor& target, const OptionalTensor& linear_bias, double temperature,
                        c10::SymInt ignore_index, OptionalDtype out_dtype,
                        std::optional<int64_t> memory_budget) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  const auto device = input.device().type();
  const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, device); };
  static const auto op = operator_named<std::remove_pointer_t<decltype(kFunction)>>(name);
  return op.call(cast(input), cast(linear_weight), target,
                 linear_bias && linear_bias->defined() ? OptionalTensor(cast(*linear_bias)) : std::nullopt,
                 temperature, std::move(ignore_index), out_dtype, memory_budget);
}

template <c10::DispatchKey kKey>
struct Autocast {
  static Tensor log_probs(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                          const OptionalTensor& linear_bias, double temperature, c10::SymInt ignore_index,
                          OptionalDtype out_dtype, std::optional<int64_t> memory_budget) {
    return in_lower_precision<kKey, &linear_token_log_probs>(
        "mbperf::linear_token_log_probs", input, linear_weight, target, linear_bias, temperature,
        std::move(ignore_index), out_dtype, memory_budget);
  }
  static std::tuple<Tensor, Tensor> with_entropy(const Tensor& input, const Tensor& linear_weight,
                                                 const Tensor& target, const OptionalTensor& linear_bias,
                                                 double temperature, c10::SymInt ignore_index,
                                                 OptionalDtype out_dtype,
                                                 std::optional<int64_t> memory_budget) {
    return in_lower_precision<kKey, &linear_token_log_probs_with_entropy>(
        "mbperf::linear_token_log_probs_with_entropy", input, linear_weight, target, linear_bias, temperature,
        std::move(ignore_index), out_dtype, memory_budget);
  }
  static void register_in(torch::Library& m) {
    m.impl("linear_token_log_probs", log_probs);
    m.impl("linear_token_log_probs_with_entropy", with_entropy);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeImplicitAutograd, m) {
  m.impl("linear_token_log_probs", linear_token_log_probs);
  m.impl("linear_token_log_probs_with_entropy", linear_token_log_probs_with_entropy);
}

TORCH_LIBRARY_IMPL(mbperf, AutocastCPU, m) { Autocast<c10::DispatchKey::AutocastCPU>::register_in(m); }
TORCH_LIBRARY_IMPL(mbperf, AutocastCUDA, m) { Autocast<c10::DispatchKey::AutocastCUDA>::register_in(m); }

}  // namespace mbperf
