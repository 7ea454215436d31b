// The differentiable KL divergence from logits: checks, autocast, and the node that holds the gradient.
// A reduced loss takes the gradient of the student in the forward pass; with reduction none, and of float16
// (what rounds to zero there no loss scaling would bring back), backward makes the pass again. The gradient
// of the teacher, double backward, forward mode and functorch transforms go through torch's own operators
// (by_torch below).
#include "kl_div.h"

#include <ATen/TensorOperators.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/promote_types.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "autograd/fallback.h"
#include "autograd/nodes.h"

namespace mbperf {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct KlDivSettings {
  double temperature;
  int64_t reduction;
  OptionalDtype out_dtype;
};

Tensor forward(const Tensor& student, const Tensor& teacher, const KlDivSettings& s) {
  using Signature = Tensor(const Tensor&, const Tensor&, double, int64_t, OptionalDtype);
  static const auto op = operator_named<Signature>("mbperf::kl_div_forward");
  return op.call(student, teacher, s.temperature, s.reduction, s.out_dtype);
}

std::tuple<Tensor, Tensor> forward_gradient(const Tensor& student, const Tensor& teacher,
                                            const KlDivSettings& s) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, int64_t, OptionalDtype);
  static const auto op = operator_named<Signature>("mbperf::kl_div_forward_gradient");
  return op.call(student, teacher, s.temperature, s.reduction, s.out_dtype);
}

Tensor backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                const KlDivSettings& s) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, double, int64_t);
  static const auto op = operator_named<Signature>("mbperf::kl_div_backward");
  return op.call(grad_loss, student, teacher, s.temperature, s.reduction);
}

// In the place of a target stands the gradient itself: of its shape are probabilities, which are not checked.
void scale_gradient_(Tensor& grad_student, const Tensor& grad_loss) {
  using Signature = void(Tensor&, const Tensor&, const Tensor&, c10::SymInt);
  static const auto op = operator_named<Signature>("mbperf::cross_entropy_scale_gradient_");
  op.call(grad_student, grad_loss, grad_student, -100);
}

// Differentiable any number of times, in every mode, and with respect to both.
Tensor by_torch(const Tensor& student, const Tensor& teacher, const KlDivSettings& s) {
  const auto log_probabilities = [&](const Tensor& t) {
    return (widened(t) / s.temperature).log_softmax(-1);
  };
  const Tensor log_q = log_probabilities(student), log_p = log_probabilities(teacher), p = log_p.exp();
  // Masked before the product: behind it the gradient would be 0 * inf.
  const Tensor difference = (log_p - log_q).masked_fill(p == 0, 0);
  Tensor loss = (p * difference).sum(-1);
  if (s.reduction != kNone) loss = loss.sum();
  if (s.reduction == kMean) loss = loss / student.sym_numel();
  if (s.reduction == kBatchMean && student.dim() > 1) loss = loss / student.sym_size(0);
  return loss.to(s.out_dtype.value_or(student.scalar_type()));
}

class KlDivBackward : public torch::autograd::Node {
 public:
  KlDivBackward(const Tensor& student, const Tensor& teacher, KlDivSettings settings)
      : Node(torch::autograd::collect_next_edges(student)),
        settings_(std::move(settings)),
        student_(student, false),
        teacher_(teacher, false) {}

  void keep_gradient(Tensor grad_student) { grad_student_ = std::move(grad_student); }

  std::string name() const override { return "KlDivBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    if (!task_should_compute_output(0) || !grads[0].defined()) return {Tensor()};
    if (at::GradMode::is_enabled()) return {by_torch_again(grads[0])};
    // Handed out once, so that nobody else holds what is scaled in place; a second backward recomputes.
    if (!grad_student_.defined())
      return {backward(grads[0], student_.unpack(), teacher_.unpack(), settings_)};
    Tensor grad = std::move(grad_student_);
    grad_student_.reset();
    if (at::isTensorSubclassLike(grad) || at::isTensorSubclassLike(grads[0]))
      return {at::mul(grad, grads[0])};
    scale_gradient_(grad, grads[0]);
    return {grad};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    student_.reset_data();
    teacher_.reset_data();
    grad_student_.reset();
    released_ = true;
  }

 private:
  // With create_graph: the gradient as a differentiable function of both logits and the upstream gradient.
  Tensor by_torch_again(const Tensor& grad_loss) {
    const Tensor student = student_.unpack();
    const Tensor again = by_torch(student, teacher_.unpack(), settings_);
    return torch::autograd::grad({again}, {student}, {grad_loss}, /*retain_graph=*/true,
                                 /*create_graph=*/true)[0];
  }

  KlDivSettings settings_;
  SavedVariable student_, teacher_;
  Tensor grad_student_;
  bool released_ = false;
};

void check_logits(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(is_fused_dtype(t.scalar_type()), "kl_div_from_logits: ", name,
                   " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, "kl_div_from_logits: ", name,
                    " must be a dense tensor, got layout ", t.layout());
  TORCH_CHECK_VALUE(t.dim() > 0, "kl_div_from_logits: ", name,
                    " must have a dimension of classes, got a scalar");
}

void check(const Tensor& student, const Tensor& teacher, const KlDivSettings& s) {
  check_logits("student", student);
  check_logits("teacher", teacher);
  TORCH_CHECK_VALUE(student.sym_sizes() == teacher.sym_sizes(),
                    "kl_div_from_logits: teacher must have the shape of student, ", student.sym_sizes(),
                    ", got ", teacher.sym_sizes());
  TORCH_CHECK_VALUE(student.device() == teacher.device(),
                    "kl_div_from_logits: teacher must be on the device of student, ", student.device(),
                    ", got ", teacher.device());
  // Within these its inverse is a number in float32 as well.
  TORCH_CHECK_VALUE(s.temperature >= 1e-30 && s.temperature <= 1e30,
                    "kl_div_from_logits: temperature must be a number > 0, from 1e-30 to 1e30, got ",
                    s.temperature);
  TORCH_CHECK_VALUE(
      s.reduction >= kNone && s.reduction <= kBatchMean,
      "kl_div_from_logits: reduction must be 0 (none), 1 (mean), 2 (sum) or 3 (batchmean), got ",
      s.reduction);
  TORCH_CHECK_TYPE(!s.out_dtype || is_fused_dtype(*s.out_dtype),
                   "kl_div_from_logits: out_dtype must be float32, float64, bfloat16 or float16, got ",
                   *s.out_dtype);
}

Tensor differentiable(const Tensor& student, const Tensor& teacher, const KlDivSettings& s) {
  const bool grad_mode = at::GradMode::is_enabled();
  if (is_transformed(student) || is_transformed(teacher) || (grad_mode && teacher.requires_grad()) ||
      TORCH_GUARD_OR_FALSE(student.sym_numel().sym_eq(0)))
    return by_torch(student, teacher, s);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!grad_mode || !student.requires_grad()) return forward(student, teacher, s);
  auto* raw = new KlDivBackward(student, teacher, s);
  const auto node = owned(raw);
  Tensor loss;
  if (s.reduction == kNone || student.scalar_type() == at::kHalf) {
    loss = forward(student, teacher, s);
  } else {
    auto [reduced, grad_student] = forward_gradient(student, teacher, s);
    raw->keep_gradient(std::move(grad_student));
    loss = reduced;
  }
  torch::autograd::set_history(loss, node);
  return loss;
}

// Logits of two dtypes are computed with in the wider one.
Tensor kl_div_from_logits(const Tensor& student, const Tensor& teacher, double temperature, int64_t reduction,
                          OptionalDtype out_dtype) {
  const KlDivSettings s{temperature, reduction, out_dtype};
  check(student, teacher, s);
  if (student.scalar_type() == teacher.scalar_type()) return differentiable(student, teacher, s);
  const at::ScalarType wider = at::promote_types(student.scalar_type(), teacher.scalar_type());
  return differentiable(student.to(wider), teacher.to(wider), s);
}

// F.kl_div and F.log_softmax run in float32 under autocast. The kernels accumulate in float32 whatever they
// read, so half-precision logits stay as they are and only the loss is handed out in float32.
template <c10::DispatchKey kKey>
Tensor with_autocast(const Tensor& student, const Tensor& teacher, double temperature, int64_t reduction,
                     OptionalDtype out_dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(kKey);
  static const auto op = operator_named<decltype(kl_div_from_logits)>("mbperf::kl_div_from_logits");
  const auto is_half = [](const Tensor& t) { return c10::elementSize(t.scalar_type()) == 2; };
  if (is_half(student) && is_half(teacher) && !out_dtype) out_dtype = at::kFloat;
  return op.call(student, teacher, temperature, reduction, out_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeImplicitAutograd, m) { m.impl("kl_div_from_logits", kl_div_from_logits); }

TORCH_LIBRARY_IMPL(mbperf, AutocastCPU, m) {
  m.impl("kl_div_from_logits", with_autocast<c10::DispatchKey::AutocastCPU>);
}
TORCH_LIBRARY_IMPL(mbperf, AutocastCUDA, m) {
  m.impl("kl_div_from_logits", with_autocast<c10::DispatchKey::AutocastCUDA>);
}

}  // namespace mbperf
