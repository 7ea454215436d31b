// The differentiable cross entropy: saves tensors and calls operators through the dispatcher.
// mean and sum take the gradient in the forward pass; none keeps the row statistics and computes it later.
// Double backward, forward mode, functorch transforms, gradients of probabilities, and every case that
// the kernels do not serve go through torch's own operators (by_torch below).
#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "autograd/fallback.h"
#include "autograd/nodes.h"
#include "autograd/passes.h"
#include "checks.h"

namespace mbperf {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

Tensor lse_of(const Tensor& row_max, const Tensor& row_sum, const Tensor& input) {
  std::vector<c10::SymInt> sizes = input.sym_sizes().vec();
  sizes.erase(sizes.begin() + class_dim(input));
  return (row_max + row_sum.log()).view_symint(sizes);
}

// Its least value is 6e-8: gradients below it survive only if they are scaled before they are rounded.
bool is_half(const Tensor& t) { return t.scalar_type() == at::kHalf; }

std::pair<Tensor, Tensor> loss_and_gradient(const Tensor& input, const Tensor& target,
                                            const OptionalTensor& weight, const Settings& s) {
  if (s.softcap == 0) {
    auto [loss, grad_input] = forward_gradient(input, target, weight, s);
    return {loss, grad_input};
  }
  auto [loss, grad_input, row_max, row_sum] = forward_softcap(input, target, weight, s, true);
  return {loss, grad_input};
}

std::tuple<Tensor, Tensor, Tensor> loss_and_softmax(const Tensor& input, const Tensor& target,
                                                    const OptionalTensor& weight, const Settings& s) {
  if (s.softcap == 0) return forward_softmax(input, target, weight, s);
  auto [loss, grad_input, row_max, row_sum] = forward_softcap(input, target, weight, s, false);
  return {loss, row_max, row_sum};
}

// The forward pass that took the gradient.
enum class TakenBy { kForward, kForwardInPlace, kForwardStats };

class CrossEntropyBackward : public torch::autograd::Node {
 public:
  CrossEntropyBackward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                       Settings settings)
      : Node(torch::autograd::collect_next_edges(input)),
        settings_(std::move(settings)),
        input_(input, false),
        target_(target, false),
        weight_(weight.value_or(Tensor()), false) {}

  void keep_gradient(Tensor grad_input, TakenBy pass) {
    grad_input_ = std::move(grad_input);
    taken_by_ = pass;
  }
  void keep_softmax(const Tensor& row_max, const Tensor& row_sum) {
    row_max_ = SavedVariable(row_max, false);
    row_sum_ = SavedVariable(row_sum, false);
    has_softmax_ = true;
  }

  std::string name() const override { return "CrossEntropyBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!task_should_compute_output(0)) return {Tensor()};
    if (at::GradMode::is_enabled()) return {by_torch_again(grads)};
    Tensor grad = grads[0].defined() ? input_gradient(grads[0]) : Tensor();
    if (grads.size() > 1 && grads[1].defined()) {
      const Tensor through_lse = lse_gradient(grads[1]);
      grad = grad.defined() ? grad + through_lse : through_lse;
    }
    return {grad};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    input_.reset_data();
    target_.reset_data();
    weight_.reset_data();
    row_max_.reset_data();
    row_sum_.reset_data();
    grad_input_.reset();
    released_ = true;
  }

 private:
  bool overwrote_input() const { return taken_by_ == TakenBy::kForwardInPlace; }
  Tensor saved_input() { return input_.unpack(); }
  Tensor saved_target() { return target_.unpack(); }
  OptionalTensor saved_weight() {
    Tensor weight = weight_.unpack();
    return weight.defined() ? OptionalTensor(weight) : std::nullopt;
  }

  Tensor input_gradient(const Tensor& grad_loss) {
    if (has_softmax_) return from_softmax(grad_loss);
    // The gradient is handed out once, so that nobody else holds it while it is scaled in place; a second
    // backward runs the forward pass again and gets the same bits.
    TORCH_CHECK(
        grad_input_.defined() || !overwrote_input(),
        "cross_entropy: backward a second time needs the logits, and inplace=True has overwritten them; "
        "use inplace=False with retain_graph=True");
    Tensor grad = grad_input_.defined() ? std::move(grad_input_) : gradient_again();
    grad_input_.reset();
    if (at::isTensorSubclassLike(grad) || at::isTensorSubclassLike(grad_loss))
      return at::mul(grad, grad_loss);
    scale_(grad, grad_loss);
    return grad;
  }

  Tensor gradient_again() {
    const Tensor input = saved_input(), target = saved_target();
    if (taken_by_ == TakenBy::kForwardStats)
      return std::get<1>(forward_stats(input, target, saved_weight(), settings_, true));
    return loss_and_gradient(input, target, saved_weight(), settings_).second;
  }

  void scale_(Tensor& grad, const Tensor& grad_loss) {
    if (is_half(grad) && !overwrote_input())
      return rescale_gradient_(grad, grad_loss, saved_input(), saved_target(), saved_weight(), settings_);
    scale_gradient_(grad, grad_loss, saved_target(), settings_);
  }

  Tensor from_softmax(const Tensor& grad_loss) {
    const auto pass = settings_.softcap == 0 ? backward : backward_softcap;
    return pass(grad_loss, saved_input(), saved_target(), saved_weight(), row_max_.unpack(),
                row_sum_.unpack(), settings_);
  }

  Tensor lse_gradient(const Tensor& grad_lse) {
    const Tensor input = saved_input(), target = saved_target();
    const int64_t dim = class_dim(input);
    const Tensor logits = softcapped(widened(input), settings_);
    Tensor grad = at::softmax(logits, dim) * grad_lse.unsqueeze(dim);
    if (settings_.softcap != 0) grad = grad * (1 - (logits / settings_.softcap).square());
    if (!is_soft(input, target))
      grad = grad.masked_fill(ignored_positions(input, target, settings_).unsqueeze(dim), 0);
    return grad.to(input.scalar_type());
  }

  // With create_graph: the gradient as a differentiable function of the logits and the upstream gradients.
  Tensor by_torch_again(const variable_list& grads) {
    const Tensor input = saved_input();
    const LossAndLse again = by_torch(input, saved_target(), saved_weight(), settings_, grads.size() > 1);
    variable_list outputs, upstream;
    if (grads[0].defined()) {
      outputs.push_back(again.loss);
      upstream.push_back(grads[0]);
    }
    if (grads.size() > 1 && grads[1].defined()) {
      outputs.push_back(again.lse);
      upstream.push_back(grads[1]);
    }
    if (outputs.empty()) return Tensor();
    return torch::autograd::grad(outputs, {input}, upstream, /*retain_graph=*/true, /*create_graph=*/true)[0];
  }

  Settings settings_;
  SavedVariable input_, target_, weight_, row_max_, row_sum_;
  Tensor grad_input_;
  TakenBy taken_by_ = TakenBy::kForward;
  bool has_softmax_ = false, released_ = false;
};

bool needs_torch(const Tensor& input, const Tensor& target, const OptionalTensor& weight, bool grad_mode) {
  const Tensor w = weight.value_or(Tensor());
  if (is_transformed(input) || is_transformed(target) || is_transformed(w)) return true;
  return grad_mode && (target.requires_grad() || (w.defined() && w.requires_grad()));
}

template <class Run>
auto record(const Tensor& input, const Tensor& target, const OptionalTensor& weight, const Settings& s,
            const Run& run) {
  auto* raw = new CrossEntropyBackward(input, target, weight, s);
  const auto node = owned(raw);
  LossAndLse result = run(*raw);
  torch::autograd::set_history(result.loss, node);
  if (result.lse.defined()) torch::autograd::set_history(result.lse, node);
  return result;
}

void check(const Tensor& input, const Tensor& target, const Settings& s) {
  TORCH_CHECK_TYPE(input.defined(), "cross_entropy: input must be a tensor, got None");
  TORCH_CHECK_TYPE(target.defined(), "cross_entropy: target must be a tensor, got None");
  TORCH_CHECK_VALUE(s.z_loss >= 0, "cross_entropy: z_loss must be a number >= 0, got ", s.z_loss);
  TORCH_CHECK_TYPE(!s.out_dtype || is_fused_dtype(*s.out_dtype),
                   "cross_entropy: out_dtype must be float32, float64, bfloat16 or float16, got ",
                   *s.out_dtype);
}

// Whether the forward pass takes the gradient. A graph that is only recorded cannot ask what the upstream
// gradient will be, and no pass scales the gradient of soft-capped logits before it is rounded.
bool differentiates_at_once(const Tensor& input, const Settings& s) {
  const bool scaled_blindly = is_half(input) && (at::isTensorSubclassLike(input) || s.softcap != 0);
  return s.reduction != kNone && !scaled_blindly;
}

LossAndLse loss_and_lse(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                        const Settings& s, bool wants_lse) {
  check(input, target, s);
  const bool grad_mode = at::GradMode::is_enabled();
  if (needs_torch(input, target, weight, grad_mode) ||
      !is_fused_case(input, target, weight, s.reduction, s.ignore_index, s.label_smoothing))
    return by_torch(input, target, weight, s, wants_lse);
  const bool differentiate = grad_mode && input.requires_grad();
  auto with_softmax = [&](CrossEntropyBackward* node) -> LossAndLse {
    auto [loss, row_max, row_sum] = loss_and_softmax(input, target, weight, s);
    if (node) node->keep_softmax(row_max, row_sum);
    return {loss, wants_lse ? lse_of(row_max, row_sum, input) : Tensor()};
  };
  if (!differentiate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return wants_lse || s.softcap != 0 ? with_softmax(nullptr)
                                       : LossAndLse{forward(input, target, weight, s), Tensor()};
  }
  return record(input, target, weight, s, [&](CrossEntropyBackward& node) -> LossAndLse {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (wants_lse || !differentiates_at_once(input, s)) return with_softmax(&node);
    auto [loss, grad_input] = loss_and_gradient(input, target, weight, s);
    node.keep_gradient(std::move(grad_input), TakenBy::kForward);
    return {loss, Tensor()};
  });
}

Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                     OptionalDtype out_dtype, double z_loss, std::optional<double> softcap) {
  return loss_and_lse(input, target, weight,
                      {reduction, std::move(ignore_index), label_smoothing, out_dtype, z_loss,
                       checked_softcap(softcap)},
                      false)
      .loss;
}

std::tuple<Tensor, Tensor> cross_entropy_with_lse(const Tensor& input, const Tensor& target,
                                                  const OptionalTensor& weight, int64_t reduction,
                                                  c10::SymInt ignore_index, double label_smoothing,
                                                  OptionalDtype out_dtype, double z_loss,
                                                  std::optional<double> softcap) {
  LossAndLse result = loss_and_lse(
      input, target, weight,
      {reduction, std::move(ignore_index), label_smoothing, out_dtype, z_loss, checked_softcap(softcap)},
      true);
  return {result.loss, result.lse};
}

std::tuple<Tensor, Stats> loss_and_stats(const Tensor& input, const Tensor& target,
                                         const OptionalTensor& weight, const Settings& s) {
  check(input, target, s);
  const bool grad_mode = at::GradMode::is_enabled();
  if (needs_torch(input, target, weight, grad_mode) ||
      !is_fused_case(input, target, weight, s.reduction, s.ignore_index, s.label_smoothing)) {
    Tensor loss = by_torch(input, target, weight, s, false).loss;  // before the rest: it names what is wrong
    return {loss, stats_by_torch(input, target, s)};
  }
  Stats stats;
  const auto run = [&](CrossEntropyBackward* node) -> LossAndLse {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const bool wants_gradient = node && differentiates_at_once(input, s);
    auto [loss, grad_input, row_max, row_sum, entropy, predicted, probability] =
        forward_stats(input, target, weight, s, wants_gradient);
    stats = {entropy, predicted, probability};
    if (wants_gradient)
      node->keep_gradient(std::move(grad_input), TakenBy::kForwardStats);
    else if (node)
      node->keep_softmax(row_max, row_sum);
    return {loss, Tensor()};
  };
  if (!grad_mode || !input.requires_grad()) return {run(nullptr).loss, stats};
  Tensor loss = record(input, target, weight, s, [&](CrossEntropyBackward& node) { return run(&node); }).loss;
  return {loss, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_stats(
    const Tensor& input, const Tensor& target, const OptionalTensor& weight, int64_t reduction,
    c10::SymInt ignore_index, double label_smoothing, OptionalDtype out_dtype, double z_loss,
    std::optional<double> softcap) {
  auto [loss, stats] = loss_and_stats(
      input, target, weight,
      {reduction, std::move(ignore_index), label_smoothing, out_dtype, z_loss, checked_softcap(softcap)});
  return {loss, stats.entropy, stats.predicted, stats.probability};
}

Tensor cross_entropy_in_place(Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              int64_t reduction, c10::SymInt ignore_index, double label_smoothing,
                              OptionalDtype out_dtype, double z_loss, std::optional<double> softcap) {
  const Settings s{reduction, std::move(ignore_index), label_smoothing, out_dtype,
                   z_loss,    checked_softcap(softcap)};
  const bool differentiate = at::GradMode::is_enabled() && input.requires_grad();
  if (!differentiate || s.softcap != 0 || s.reduction == kNone || needs_torch(input, target, weight, true) ||
      !is_fused_case(input, target, weight, s.reduction, s.ignore_index, s.label_smoothing))
    return loss_and_lse(input, target, weight, s, false).loss;
  check(input, target, s);
  TORCH_CHECK(
      !input.is_leaf(),
      "cross_entropy: inplace=True would overwrite input, a leaf that requires grad; pass the output of a "
      "layer, or inplace=False");
  TORCH_CHECK(!target.is_alias_of(input),
              "cross_entropy: inplace=True would overwrite target, which shares the memory of input");
  TORCH_CHECK(!weight || !weight->defined() || !weight->is_alias_of(input),
              "cross_entropy: inplace=True would overwrite weight, which shares the memory of input");
  TORCH_CHECK(!input.is_view() || at::has_internal_overlap(input) == at::MemOverlap::No,
              "cross_entropy: inplace=True needs an input whose elements do not overlap in memory");
  return record(input, target, weight, s,
                [&](CrossEntropyBackward& node) -> LossAndLse {
                  const at::AutoDispatchBelowADInplaceOrView below_autograd;
                  Tensor loss = forward_in_place(input, target, weight, s);
                  torch::autograd::impl::bump_version(input);
                  node.keep_gradient(input.detach(), TakenBy::kForwardInPlace);
                  return {loss, Tensor()};
                })
      .loss;
}

// On a backend without a kernel that looks at grad_loss first.
void rescale_from_softmax_(Tensor& grad_input, const Tensor& grad_loss, const Tensor& input,
                           const Tensor& target, int64_t reduction, c10::SymInt ignore_index,
                           double label_smoothing, double z_loss, const OptionalTensor& weight) {
  const Settings s{reduction, std::move(ignore_index), label_smoothing, std::nullopt, z_loss};
  const auto [loss, row_max, row_sum] = forward_softmax(input, target, weight, s);
  grad_input.copy_(backward(grad_loss, input, target, weight, row_max, row_sum, s));
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeImplicitAutograd, m) {
  m.impl("cross_entropy", cross_entropy);
  m.impl("cross_entropy_with_lse", cross_entropy_with_lse);
  m.impl("cross_entropy_with_stats", cross_entropy_with_stats);
  m.impl("cross_entropy_", cross_entropy_in_place);
}

TORCH_LIBRARY_IMPL(mbperf, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_rescale_gradient_", rescale_from_softmax_);
}

}  // namespace mbperf
