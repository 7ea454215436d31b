// The differentiable linear + cross entropy: checks, autocast, and the node that holds the gradients.
// mean and sum take the gradients in the forward pass, three products in all; reduction none, lse and float16
// (what rounds to zero there no loss scaling would bring back) take them in backward from the inputs, four.
// Cases that the chunks do not serve are cross_entropy(linear(...)) in torch's own operators (reference
// below).
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/promote_types.h>
#include <ATen/ops/tanh.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>

#include "autograd/fallback.h"
#include "autograd/nodes.h"
#include "checks.h"

namespace mbperf {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using Wanted = std::array<bool, 3>;

// A call's tensors, and its settings with what is not given filled in.
struct LinearTensors {
  Tensor input, linear_weight, target;
  OptionalTensor linear_bias, weight;

  bool is_soft() const { return target.dim() == linear_weight.dim() + input.dim() - 2; }
};

struct LinearSettings {
  Settings loss;
  double softcap;  // 0: none
  int64_t chunk_rows, memory_budget;
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> forward(const LinearTensors& t, const LinearSettings& s, bool wants_lse) {
  using Signature = std::tuple<Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt, double, double, double, int64_t,
      int64_t, OptionalDtype, bool, const OptionalTensor&, const OptionalTensor&);
  static const auto op = operator_named<Signature>("mbperf::linear_cross_entropy_forward");
  return op.call(t.input, t.linear_weight, t.target, s.loss.reduction, s.loss.ignore_index,
                 s.loss.label_smoothing, s.loss.z_loss, s.softcap, s.chunk_rows, s.memory_budget,
                 s.loss.out_dtype, wants_lse, t.linear_bias, t.weight);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_gradient(const LinearTensors& t, const LinearSettings& s,
                                                            Wanted wanted) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt, double, double, double, int64_t,
      int64_t, OptionalDtype, Wanted, const OptionalTensor&, const OptionalTensor&);
  static const auto op = operator_named<Signature>("mbperf::linear_cross_entropy_forward_gradient");
  return op.call(t.input, t.linear_weight, t.target, s.loss.reduction, s.loss.ignore_index,
                 s.loss.label_smoothing, s.loss.z_loss, s.softcap, s.chunk_rows, s.memory_budget,
                 s.loss.out_dtype, wanted, t.linear_bias, t.weight);
}

Gradients backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_lse, const LinearTensors& t,
                   const LinearSettings& s, Wanted wanted) {
  using Signature = Gradients(const Tensor&, const Tensor&, const Tensor&, int64_t, c10::SymInt, double,
                              double, double, int64_t, int64_t, Wanted, const OptionalTensor&,
                              const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);
  static const auto op = operator_named<Signature>("mbperf::linear_cross_entropy_backward");
  return op.call(t.input, t.linear_weight, t.target, s.loss.reduction, s.loss.ignore_index,
                 s.loss.label_smoothing, s.loss.z_loss, s.softcap, s.chunk_rows, s.memory_budget, wanted,
                 grad_loss, grad_lse, t.linear_bias, t.weight);
}

void scale_gradients_(at::TensorList gradients, const Tensor& grad_loss, const LinearTensors& t,
                      const LinearSettings& s) {
  using Signature = void(at::TensorList, const Tensor&, const Tensor&, bool, c10::SymInt, c10::SymInt);
  static const auto op = operator_named<Signature>("mbperf::linear_cross_entropy_scale_gradients_");
  op.call(gradients, grad_loss, t.target, t.is_soft(), t.linear_weight.sym_size(0), s.loss.ignore_index);
}

Tensor defined_or_none(const OptionalTensor& t) { return t.value_or(Tensor()); }

// (V, d1, ..., H) as (V d1 ..., H), and the like.
Tensor flat_weight(const Tensor& w) { return w.dim() == 2 ? w : w.flatten(0, w.dim() - 2); }

LossAndLse reference(const LinearTensors& t, const LinearSettings& s, bool wants_lse) {
  Tensor bias = defined_or_none(t.linear_bias);
  if (bias.defined() && bias.dim() > 1) bias = bias.flatten();
  Tensor logits = at::linear(t.input, flat_weight(t.linear_weight), bias);
  if (t.linear_weight.dim() > 2) {
    std::vector<c10::SymInt> sizes = t.linear_weight.sym_sizes().vec();
    sizes.pop_back();
    sizes.insert(sizes.begin(), t.input.sym_size(0));
    logits = logits.reshape_symint(sizes);
  }
  if (t.target.is_floating_point())  // the loss is of that dtype anyway
    logits = logits.to(at::promote_types(logits.scalar_type(), t.target.scalar_type()));
  if (s.softcap != 0) logits = s.softcap * at::tanh(logits / s.softcap);
  return by_torch(logits, t.target, t.weight, s.loss, wants_lse);
}

class LinearCrossEntropyBackward : public torch::autograd::Node {
 public:
  LinearCrossEntropyBackward(const LinearTensors& t, LinearSettings settings)
      : Node(torch::autograd::collect_next_edges(t.input, t.linear_weight, defined_or_none(t.linear_bias))),
        settings_(std::move(settings)),
        input_(t.input, false),
        linear_weight_(t.linear_weight, false),
        target_(t.target, false),
        linear_bias_(defined_or_none(t.linear_bias), false),
        weight_(defined_or_none(t.weight), false) {}

  void keep_gradients(variable_list gradients) { gradients_ = std::move(gradients); }

  std::string name() const override { return "LinearCrossEntropyBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (at::GradMode::is_enabled()) return by_reference(grads);
    const Wanted wanted{task_should_compute_output(0), task_should_compute_output(1),
                        task_should_compute_output(2)};
    const bool has_lse = grads.size() > 1 && grads[1].defined();
    if (!grads[0].defined() && !has_lse) return variable_list(3);
    if (gradients_.empty()) return recomputed(grads, wanted);
    // Handed out once, so that nobody else holds what is scaled in place; a second backward recomputes.
    variable_list kept = std::move(gradients_);
    gradients_.clear();
    scale(kept, grads[0]);
    for (size_t i = 0; i < kept.size(); ++i)
      if (!wanted[i]) kept[i] = Tensor();
    return kept;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* saved : {&input_, &linear_weight_, &target_, &linear_bias_, &weight_})
      saved->reset_data();
    gradients_.clear();
    released_ = true;
  }

 private:
  LinearTensors saved() {
    const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    return {input_.unpack(), linear_weight_.unpack(), target_.unpack(), optional(linear_bias_.unpack()),
            optional(weight_.unpack())};
  }

  void scale(variable_list& gradients, const Tensor& grad_loss) {
    std::vector<Tensor> defined;
    bool traced = at::isTensorSubclassLike(grad_loss);
    for (const Tensor& g : gradients)
      if (g.defined()) {
        defined.push_back(g);
        traced |= at::isTensorSubclassLike(g);
      }
    if (!traced) return scale_gradients_(defined, grad_loss, saved(), settings_);
    for (Tensor& g : gradients)
      if (g.defined()) g = at::mul(g, grad_loss);
  }

  variable_list recomputed(const variable_list& grads, Wanted wanted) {
    const auto optional = [&](size_t i) {
      return grads.size() > i && grads[i].defined() ? OptionalTensor(grads[i]) : std::nullopt;
    };
    const auto [input, weight, bias] = backward(optional(0), optional(1), saved(), settings_, wanted);
    variable_list gradients{input, weight, bias};
    for (size_t i = 0; i < 3; ++i)
      if (!wanted[i]) gradients[i] = Tensor();
    return gradients;
  }

  // With create_graph: the gradients as differentiable functions of everything.
  variable_list by_reference(const variable_list& grads) {
    const LinearTensors t = saved();
    const LossAndLse again = reference(t, settings_, grads.size() > 1);
    variable_list outputs, upstream, inputs, result(3);
    for (size_t i = 0; i < grads.size(); ++i)
      if (grads[i].defined()) {
        outputs.push_back(i == 0 ? again.loss : again.lse);
        upstream.push_back(grads[i]);
      }
    std::vector<size_t> which;
    const Tensor all[] = {t.input, t.linear_weight, defined_or_none(t.linear_bias)};
    for (size_t i = 0; i < 3; ++i)
      if (task_should_compute_output(i)) {
        inputs.push_back(all[i]);
        which.push_back(i);
      }
    if (outputs.empty() || inputs.empty()) return result;
    const variable_list found =
        torch::autograd::grad(outputs, inputs, upstream, /*retain_graph=*/true, /*create_graph=*/true);
    for (size_t i = 0; i < which.size(); ++i) result[which[i]] = found[i];
    return result;
  }

  LinearSettings settings_;
  SavedVariable input_, linear_weight_, target_, linear_bias_, weight_;
  variable_list gradients_;
  bool released_ = false;
};

bool same_kind(const Tensor& t, const Tensor& input) {
  return t.scalar_type() == input.scalar_type() && t.device() == input.device() && t.layout() == at::kStrided;
}

// The weights of float16 and bfloat16 logits may be float32, as autocast has them.
bool class_weight_fits(const LinearTensors& t, const LinearSettings& s) {
  const Tensor w = defined_or_none(t.weight);
  if (!w.defined()) return true;
  const bool widened = w.scalar_type() == at::kFloat && s.loss.out_dtype == at::kFloat &&
                       c10::elementSize(t.input.scalar_type()) == 2;
  return w.dim() == 1 && w.sym_size(0) == t.linear_weight.sym_size(0) && w.device() == t.input.device() &&
         (widened || w.scalar_type() == t.input.scalar_type());
}

bool target_fits(const LinearTensors& t) {
  if (t.target.layout() != at::kStrided || t.target.device() != t.input.device()) return false;
  const int64_t batch = t.input.dim() - 1, inner = t.linear_weight.dim() - 2;
  const bool soft = t.is_soft();
  if (soft ? t.target.scalar_type() != t.input.scalar_type()
           : t.target.scalar_type() != at::kLong && (t.target.scalar_type() != at::kByte || inner > 0))
    return false;
  if (!soft && batch == 0) return t.target.dim() == 0;
  if (t.target.dim() != batch + inner + (soft ? 1 : 0)) return false;
  if (batch == 1 && t.target.sym_size(0) != t.input.sym_size(0)) return false;
  for (int64_t d = soft ? 0 : 1; d <= inner; ++d)
    if (t.target.sym_size(t.target.dim() - 1 - inner + d) != t.linear_weight.sym_size(d)) return false;
  return true;
}

bool chunks_serve(const LinearTensors& t, const LinearSettings& s) {
  const Tensor bias = defined_or_none(t.linear_bias), weight = defined_or_none(t.weight);
  if (!is_fused_dtype(t.input.scalar_type()) || t.input.layout() != at::kStrided) return false;
  if (!same_kind(t.linear_weight, t.input) || (bias.defined() && !same_kind(bias, t.input))) return false;
  for (const Tensor& each : {t.input, t.linear_weight, bias, t.target, weight})
    if (is_transformed(each)) return false;
  if (at::GradMode::is_enabled() &&
      (t.target.requires_grad() || (weight.defined() && weight.requires_grad())))
    return false;
  if (TORCH_GUARD_OR_FALSE(t.input.sym_numel().sym_eq(0)) || t.linear_weight.sym_numel() == 0) return false;
  if (s.loss.reduction < kNone || s.loss.reduction > kSum) return false;
  if (!(s.loss.label_smoothing >= 0.0 && s.loss.label_smoothing <= 1.0)) return false;
  return class_weight_fits(t, s) && target_fits(t);
}

// As Python prints a tuple: the errors are torch's, and torch's are written in Python.
std::string tuple(c10::SymIntArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << (sizes.size() == 1 ? ",)" : ")");
  return text.str();
}

void check_shapes(const LinearTensors& t) {
  TORCH_CHECK(t.input.dim() == 1 || t.input.dim() == 2, "expected input with dimensionality 1 or 2, got ",
              t.input.dim());
  TORCH_CHECK(t.linear_weight.dim() >= 2, "expected linear_weight with dimensionality at least 2, got ",
              t.linear_weight.dim());
  const c10::SymInt features = t.input.sym_size(-1), weight_features = t.linear_weight.sym_size(-1);
  TORCH_CHECK(features == weight_features,
              "expected equal input and linear_weight last dimensions (in_features), got ", features, " and ",
              weight_features, ", respectively");
  const auto columns = t.linear_weight.sym_sizes().slice(0, t.linear_weight.dim() - 1);
  const Tensor bias = defined_or_none(t.linear_bias);
  TORCH_CHECK(!bias.defined() || bias.sym_sizes() == columns, "expected linear_bias shape ", tuple(columns),
              ", got ", bias.defined() ? tuple(bias.sym_sizes()) : "");
  TORCH_CHECK(t.linear_weight.dim() == 2 || t.input.dim() == 2,
              "K-dimensional loss defined by linear_weight shape ", tuple(t.linear_weight.sym_sizes()),
              " requires batched input, (N, ", features, "), got unbatched input with shape ",
              tuple(t.input.sym_sizes()));
}

bool holds_probabilities(const LinearTensors& t) {
  const auto target = t.target.sym_sizes(), columns = t.linear_weight.sym_sizes();
  const int64_t batch = t.input.dim() - 1;
  if (int64_t(target.size()) != batch + t.linear_weight.dim() - 1) return false;
  if (batch == 1 && target[0] != t.input.sym_size(0)) return false;
  for (int64_t d = 0; d < t.linear_weight.dim() - 1; ++d)
    if (target[batch + d] != columns[d]) return false;
  return true;
}

void check_settings(const LinearSettings& s) {
  TORCH_CHECK_VALUE(s.loss.z_loss >= 0, "linear_cross_entropy: z_loss must be a number >= 0, got ",
                    s.loss.z_loss);
  TORCH_CHECK_VALUE(s.softcap >= 0, "linear_cross_entropy: softcap must be a number > 0 or None, got ",
                    s.softcap);
  TORCH_CHECK_TYPE(!s.loss.out_dtype || is_fused_dtype(*s.loss.out_dtype),
                   "linear_cross_entropy: out_dtype must be float32, float64, bfloat16 or float16, got ",
                   *s.loss.out_dtype);
}

LossAndLse by_chunks(const LinearTensors& t, const LinearSettings& s, bool wants_lse) {
  const auto needs_grad = [](const Tensor& x) { return x.defined() && x.requires_grad(); };
  const Wanted wanted{needs_grad(t.input), needs_grad(t.linear_weight),
                      needs_grad(defined_or_none(t.linear_bias))};
  const bool differentiate = at::GradMode::is_enabled() && (wanted[0] || wanted[1] || wanted[2]);
  const auto without_gradient = [&]() -> LossAndLse {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, lse] = forward(t, s, wants_lse);
    return {loss, wants_lse ? lse : Tensor()};
  };
  if (!differentiate) return without_gradient();
  auto* raw = new LinearCrossEntropyBackward(t, s);
  const auto node = owned(raw);
  LossAndLse result;
  if (wants_lse || s.loss.reduction == kNone || t.input.scalar_type() == at::kHalf) {
    result = without_gradient();
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, input, weight, bias] = forward_gradient(t, s, wanted);
    raw->keep_gradients(
        {wanted[0] ? input : Tensor(), wanted[1] ? weight : Tensor(), wanted[2] ? bias : Tensor()});
    result.loss = loss;
  }
  torch::autograd::set_history(result.loss, node);
  if (result.lse.defined()) torch::autograd::set_history(result.lse, node);
  return result;
}

LossAndLse loss_and_lse(LinearTensors t, LinearSettings s, bool wants_lse) {
  if (!chunks_serve(t, s)) return reference(t, s, wants_lse);
  const bool single = t.input.dim() == 1;
  if (single) {
    t.input = t.input.unsqueeze(0);
    t.target = t.target.unsqueeze(0);
  }
  // With weights the mean of the z loss has a divisor of its own.
  const double z_loss = s.loss.z_loss;
  const bool apart =
      z_loss != 0 && s.loss.reduction == kMean && t.weight && t.weight->defined() && !t.is_soft();
  if (apart) s.loss.z_loss = 0;
  LossAndLse result = by_chunks(t, s, wants_lse || apart);
  if (apart) {
    const Tensor live = (t.target != s.loss.ignore_index).sum();
    result.loss = result.loss + (z_loss * result.lse.square().sum() / live).to(result.loss.scalar_type());
  }
  if (single && s.loss.reduction == kNone) result.loss = result.loss.squeeze(0);
  if (single && result.lse.defined()) result.lse = result.lse.squeeze(0);
  return result;
}

LossAndLse checked(const LinearTensors& t, int64_t reduction, const std::optional<c10::SymInt>& ignore_index,
                   double label_smoothing, OptionalDtype out_dtype, double z_loss,
                   std::optional<double> softcap, std::optional<int64_t> chunk_rows,
                   std::optional<int64_t> memory_budget, bool wants_lse) {
  check_shapes(t);
  const bool soft = holds_probabilities(t);
  TORCH_CHECK(!soft || !ignore_index, "ignore_index cannot be specified when target contains probabilities");
  TORCH_CHECK_VALUE(!softcap || *softcap > 0,
                    "linear_cross_entropy: softcap must be a number > 0 or None, got ", *softcap);
  TORCH_CHECK_VALUE(!memory_budget || *memory_budget >= 0,
                    "linear_cross_entropy: memory_budget must be a number of bytes >= 0 or None, got ",
                    *memory_budget);
  const LinearSettings s{{reduction, ignore_index.value_or(-100), label_smoothing, out_dtype, z_loss},
                         softcap.value_or(0),
                         chunk_rows.value_or(0),
                         memory_budget.value_or(-1)};
  check_settings(s);
  return loss_and_lse(t, s, wants_lse);
}

Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& linear_bias, const OptionalTensor& weight,
                            int64_t reduction, std::optional<c10::SymInt> ignore_index,
                            double label_smoothing, OptionalDtype out_dtype, double z_loss,
                            std::optional<double> softcap, std::optional<int64_t> chunk_rows,
                            std::optional<int64_t> memory_budget) {
  return checked({input, linear_weight, target, linear_bias, weight}, reduction, ignore_index,
                 label_smoothing, out_dtype, z_loss, softcap, chunk_rows, memory_budget, false)
      .loss;
}

std::tuple<Tensor, Tensor> linear_cross_entropy_with_lse(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, const OptionalTensor& linear_bias,
    const OptionalTensor& weight, int64_t reduction, std::optional<c10::SymInt> ignore_index,
    double label_smoothing, OptionalDtype out_dtype, double z_loss, std::optional<double> softcap,
    std::optional<int64_t> chunk_rows, std::optional<int64_t> memory_budget) {
  LossAndLse r = checked({input, linear_weight, target, linear_bias, weight}, reduction, ignore_index,
                         label_smoothing, out_dtype, z_loss, softcap, chunk_rows, memory_budget, true);
  return {r.loss, r.lse};
}

// F.linear runs in the lower precision and F.cross_entropy in float32: the operands are cast, the kernels
// accumulate in float32 whatever they read, and the loss is handed out in float32.
template <c10::DispatchKey kKey>
struct Autocast {
  static LinearTensors cast(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& linear_bias, const OptionalTensor& weight) {
    const auto device = input.device().type();
    const auto dtype = at::autocast::get_lower_precision_fp_from_device_type(device);
    const auto to = [&](at::ScalarType type, const OptionalTensor& t) {
      return t && t->defined() ? OptionalTensor(at::autocast::cached_cast(type, *t, device)) : std::nullopt;
    };
    return {*to(dtype, input), *to(dtype, linear_weight),
            target.is_floating_point() ? *to(at::kFloat, target) : target, to(dtype, linear_bias),
            to(at::kFloat, weight)};
  }
  static OptionalDtype loss_dtype(const Tensor& input, OptionalDtype out_dtype) {
    return out_dtype || input.scalar_type() == at::kDouble ? out_dtype : at::kFloat;
  }

  static Tensor loss(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                     const OptionalTensor& linear_bias, const OptionalTensor& weight, int64_t reduction,
                     std::optional<c10::SymInt> ignore_index, double label_smoothing, OptionalDtype out_dtype,
                     double z_loss, std::optional<double> softcap, std::optional<int64_t> chunk_rows,
                     std::optional<int64_t> memory_budget) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static const auto op = operator_named<decltype(linear_cross_entropy)>("mbperf::linear_cross_entropy");
    const LinearTensors t = cast(input, linear_weight, target, linear_bias, weight);
    return op.call(t.input, t.linear_weight, t.target, t.linear_bias, t.weight, reduction, ignore_index,
                   label_smoothing, loss_dtype(input, out_dtype), z_loss, softcap, chunk_rows, memory_budget);
  }
  static std::tuple<Tensor, Tensor> with_lse(const Tensor& input, const Tensor& linear_weight,
                                             const Tensor& target, const OptionalTensor& linear_bias,
                                             const OptionalTensor& weight, int64_t reduction,
                                             std::optional<c10::SymInt> ignore_index, double label_smoothing,
                                             OptionalDtype out_dtype, double z_loss,
                                             std::optional<double> softcap, std::optional<int64_t> chunk_rows,
                                             std::optional<int64_t> memory_budget) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
    static const auto op =
        operator_named<decltype(linear_cross_entropy_with_lse)>("mbperf::linear_cross_entropy_with_lse");
    const LinearTensors t = cast(input, linear_weight, target, linear_bias, weight);
    return op.call(t.input, t.linear_weight, t.target, t.linear_bias, t.weight, reduction, ignore_index,
                   label_smoothing, loss_dtype(input, out_dtype), z_loss, softcap, chunk_rows, memory_budget);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeImplicitAutograd, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
  m.impl("linear_cross_entropy_with_lse", linear_cross_entropy_with_lse);
}

TORCH_LIBRARY_IMPL(mbperf, AutocastCPU, m) {
  m.impl("linear_cross_entropy", Autocast<c10::DispatchKey::AutocastCPU>::loss);
  m.impl("linear_cross_entropy_with_lse", Autocast<c10::DispatchKey::AutocastCPU>::with_lse);
}

TORCH_LIBRARY_IMPL(mbperf, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", Autocast<c10::DispatchKey::AutocastCUDA>::loss);
  m.impl("linear_cross_entropy_with_lse", Autocast<c10::DispatchKey::AutocastCUDA>::with_lse);
}

}  // namespace mbperf
