// Linear + cross entropy on CUDA: cuBLAS products by ATen and the row kernels, chunk by chunk, on the current
// stream. Nothing waits for the device, so that a captured graph can hold it: how many rows are ignored is
// known there alone, and their gradients are zeros rather than left out.
#include "linear_cross_entropy.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

struct Call {
  const LinearArguments& a;
  const at::ScalarType dtype, accumulate;
  const bool soft;
  const int64_t rows, chunk;
  const Tensor linear_weight, linear_bias, target, logits;
  Softcap softcap;
  ChunkRows row_operators;
  Tensor positions, denominator;  // that count; of the mean
  Tensor weight_sum, bias_sum;
  LinearGradients grad;

  Call(const LinearArguments& arguments, Wanted wanted)
      : a(arguments),
        dtype(a.input.scalar_type()),
        accumulate(accumulate_type(a.input)),
        soft(is_soft(a)),
        rows(a.input.size(0)),
        chunk(chunk_rows(device_chunk(a.chunk_rows, a.memory_budget), rows, row_bytes())),
        linear_weight(matrix_of(a)),
        linear_bias(vector_of_bias(a)),
        target(soft ? a.target : a.target.to(at::kLong)),
        logits(at::empty({chunk, linear_weight.size(0)}, a.input.options())),
        softcap(a.softcap),
        row_operators{a, a.z_loss, accumulate} {
    if (a.reduction == kMean) set_mean();
    const bool sums_wide = chunk < rows && c10::elementSize(dtype) == 2;
    if (wanted[0]) grad.input = at::empty_like(a.input);
    if (wanted[1]) grad.linear_weight = at::empty_like(linear_weight);
    if (wanted[1] && sums_wide)
      weight_sum = at::zeros(linear_weight.sizes(), a.input.options().dtype(accumulate));
    if (wanted[2]) bias_sum = at::zeros({linear_weight.size(0)}, a.input.options().dtype(accumulate));
  }

  size_t row_bytes() const {
    return size_t(columns_of(a.linear_weight)) * c10::elementSize(dtype) * (a.softcap == 0 ? 1 : 2);
  }

  void set_mean() {
    const auto options = a.input.options().dtype(accumulate);
    if (soft) {
      positions = denominator = at::full({}, double(target.numel() / a.linear_weight.size(0)), options);
      return;
    }
    const Tensor counts = target != a.ignore_index;
    positions = denominator = counts.sum().to(accumulate);
    if (a.weight && a.weight->defined()) {
      const Tensor of_target =
          a.weight->to(accumulate).index_select(0, target.masked_fill(~counts, 0).view(-1));
      denominator = at::where(counts.view(-1), of_target, at::zeros({}, options)).sum();
    }
  }

  // The factor from a gradient of the sum of losses to that of the result; 0 where all is ignored.
  Tensor scale() const {
    if (a.reduction != kMean) return {};
    return at::where(positions == 0, at::zeros_like(denominator), denominator.reciprocal());
  }

  Tensor reduced(const Tensor& total, OptionalDtype out_dtype) const {
    return (a.reduction == kMean ? total / denominator : total).to(out_dtype.value_or(dtype));
  }

  template <class Body>
  void over_chunks(const Body& body) {
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t n = std::min(chunk, rows - begin);
      Tensor z = rows_of(logits, 0, n);
      const Tensor x = rows_of(a.input, begin, n);
      linear_bias.defined() ? at::addmm_out(z, linear_bias, x, linear_weight.t())
                            : at::mm_out(z, x, linear_weight.t());
      z = softcap.forward(z);
      body(begin, n, with_classes(z, a.linear_weight), rows_of(target, begin, n));
    }
  }

  // scale, where defined, goes to the rows of X and dX: both are far smaller than the chunk and dW.
  void differentiate(int64_t begin, int64_t n, const Tensor& gradient, const Tensor& scale) {
    const Tensor g = softcap.backward(gradient.view({n, linear_weight.size(0)}));
    Tensor x = rows_of(a.input, begin, n);
    if (grad.input.defined()) {
      Tensor dx = rows_of(grad.input, begin, n);
      at::mm_out(dx, g, linear_weight);
      if (scale.defined()) dx.mul_(scale);
    }
    if (bias_sum.defined()) {
      const Tensor sum = at::sum(g, {0}, false, accumulate);
      bias_sum.add_(scale.defined() ? sum * scale : sum);
    }
    if (!grad.linear_weight.defined()) return;
    if (scale.defined()) x = (x * scale).to(dtype);
    if (weight_sum.defined()) {
      at::addmm_out(weight_sum, weight_sum, g.t(), x, accumulate);
    } else {
      at::addmm_out(grad.linear_weight, grad.linear_weight, g.t(), x, begin > 0);
    }
  }

  LinearGradients gradients() {
    if (weight_sum.defined()) grad.linear_weight.copy_(weight_sum);
    if (grad.linear_weight.defined()) grad.linear_weight = grad.linear_weight.view(a.linear_weight.sizes());
    if (bias_sum.defined()) grad.linear_bias = bias_sum.to(dtype).view(a.linear_bias->sizes());
    return grad;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                   int64_t reduction, int64_t ignore_index, double label_smoothing,
                                   double z_loss, double softcap, int64_t chunk_rows, int64_t memory_budget,
                                   OptionalDtype out_dtype, bool wants_lse, const OptionalTensor& linear_bias,
                                   const OptionalTensor& weight) {
  const LinearArguments a{input,        linear_weight,   target, linear_bias, weight,     reduction,
                          ignore_index, label_smoothing, z_loss, softcap,     chunk_rows, memory_budget};
  Call call(a, {});
  const auto options = input.options().dtype(call.accumulate);
  const int64_t by_row = reduction == kNone ? kNone : kSum;
  Tensor losses = reduction == kNone ? at::empty(position_sizes(a), options) : at::zeros({}, options);
  Tensor lse = wants_lse ? at::empty(position_sizes(a), options) : at::empty({0}, options);
  call.over_chunks([&](int64_t begin, int64_t n, const Tensor& z, const Tensor& y) {
    const Tensor loss =
        call.row_operators.loss_writing_lse(z, y, by_row, wants_lse ? rows_of(lse, begin, n) : Tensor());
    if (reduction == kNone) {
      rows_of(losses, begin, n).copy_(loss);
    } else {
      losses.add_(loss);
    }
  });
  if (wants_lse && !call.soft) lse.masked_fill_(call.target == ignore_index, 0);
  return {call.reduced(losses, out_dtype), lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_gradient(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, int64_t chunk_rows,
    int64_t memory_budget, OptionalDtype out_dtype, std::array<bool, 3> wanted,
    const OptionalTensor& linear_bias, const OptionalTensor& weight) {
  const LinearArguments a{input,        linear_weight,   target, linear_bias, weight,     reduction,
                          ignore_index, label_smoothing, z_loss, softcap,     chunk_rows, memory_budget};
  Call call(a, wanted);
  Tensor total = at::zeros({}, input.options().dtype(call.accumulate));
  const Tensor scale = call.scale();
  call.over_chunks([&](int64_t begin, int64_t n, const Tensor& z, const Tensor& y) {
    total.add_(call.row_operators.gradient_(z, y));
    call.differentiate(begin, n, z, scale);
  });
  const LinearGradients g = call.gradients();
  return {call.reduced(total, out_dtype), or_empty(g.input, input), or_empty(g.linear_weight, input),
          or_empty(g.linear_bias, input)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& input, const Tensor& linear_weight,
                                            const Tensor& target, int64_t reduction, int64_t ignore_index,
                                            double label_smoothing, double z_loss, double softcap,
                                            int64_t chunk_rows, int64_t memory_budget,
                                            std::array<bool, 3> wanted, const OptionalTensor& grad_loss,
                                            const OptionalTensor& grad_lse, const OptionalTensor& linear_bias,
                                            const OptionalTensor& weight) {
  const LinearArguments a{input,        linear_weight,   target, linear_bias, weight,     reduction,
                          ignore_index, label_smoothing, z_loss, softcap,     chunk_rows, memory_budget};
  Call call(a, wanted);
  const bool has_loss = grad_loss && grad_loss->defined(), has_lse = grad_lse && grad_lse->defined();
  Tensor scale = call.scale();
  if (has_loss && reduction != kNone) {
    const Tensor upstream = grad_loss->to(call.accumulate);
    scale = scale.defined() ? scale * upstream : upstream;
  }
  call.over_chunks([&](int64_t begin, int64_t n, const Tensor& z, const Tensor& y) {
    Tensor gradient = z, per_position;
    const Tensor through_lse = gradients_(
        gradient, y, has_loss, has_lse ? rows_of(*grad_lse, begin, n) : Tensor(), call.row_operators);
    if (!has_lse && reduction != kNone) return call.differentiate(begin, n, gradient, scale);
    if (reduction != kNone && has_loss) gradient.mul_(scale);
    if (reduction == kNone && has_loss) per_position = rows_of(*grad_loss, begin, n);
    apply_upstream_(gradient, per_position, through_lse);
    call.differentiate(begin, n, gradient, {});
  });
  const LinearGradients g = call.gradients();
  return {or_empty(g.input, input), or_empty(g.linear_weight, input), or_empty(g.linear_bias, input)};
}

// Targets changed since are not checked: no gradient here is indexed by them.
void scale_gradients_(at::TensorList gradients, const Tensor& grad_loss, const Tensor& /*target*/,
                      bool /*soft*/, int64_t /*classes*/, int64_t /*ignore_index*/) {
  using Signature = void(Tensor&, const Tensor&, const Tensor&, c10::SymInt);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::cross_entropy_scale_gradient_", "")
                             .typed<Signature>();
  for (Tensor g : gradients)
    op.call(g, grad_loss, g, -100);  // by a test on the device, nothing where it is 1
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) {
  m.impl("linear_cross_entropy_forward", forward);
  m.impl("linear_cross_entropy_forward_gradient", forward_gradient);
  m.impl("linear_cross_entropy_backward", backward);
  m.impl("linear_cross_entropy_scale_gradients_", scale_gradients_);
}

}  // namespace mbperf
