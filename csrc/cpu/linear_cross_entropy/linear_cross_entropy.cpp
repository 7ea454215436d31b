// Linear + cross entropy on the CPU, chunk by chunk: logits Z = X W^T + b, their gradient G = (p sum t - t)
// scale over them, dX = G W, dW += G^T X. Ignored rows are left out before the products.
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <limits>

#include "cpu/linear_cross_entropy/live_rows.h"
#include "cpu/linear_cross_entropy/products.h"
#include "linear_cross_entropy.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalDtype = std::optional<at::ScalarType>;

// The rows that count, and what the mean divides by.
struct Live : LiveRows {
  int64_t positions = 0;   // that count
  double denominator = 1;  // of the mean
};

Live live_rows(const LinearArguments& a) {
  Live live{{a.input, a.target, {}}, a.target.numel(), double(a.input.size(0))};
  if (is_soft(a)) {
    live.positions = a.target.numel() / a.linear_weight.size(0);
    live.denominator = double(live.positions);
    return live;
  }
  live.target = a.target.to(at::kLong).contiguous();
  int64_t positions = 0;
  double weights = 0;
  const Tensor weight = a.weight && a.weight->defined() ? a.weight->to(at::kDouble).contiguous() : Tensor();
  const double* w = weight.defined() ? weight.const_data_ptr<double>() : nullptr;
  over_live_targets(live.target, a.linear_weight.size(0), a.ignore_index, [&](int64_t y) {
    ++positions;
    weights += w ? w[y] : 1;
  });
  live.positions = positions;
  live.denominator = weights;
  if (a.linear_weight.dim() == 2 && positions < live.target.numel()) live.leave_out(a.ignore_index);
  return live;
}

Tensor scalar(double value, at::ScalarType dtype) {
  return at::scalar_tensor(value, at::TensorOptions().dtype(dtype));
}

double value_of(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : double(*t.const_data_ptr<float>());
}

// A call, with everything in rows and columns.
struct Call {
  const LinearArguments& a;
  const at::ScalarType dtype;
  const bool soft;
  const Live live;
  const int64_t rows, chunk;
  const Tensor linear_weight, linear_bias;
  Softcap softcap;
  Products products;
  ChunkRows row_operators;

  explicit Call(const LinearArguments& arguments, Wanted wanted = {})
      : a(arguments),
        dtype(a.input.scalar_type()),
        soft(is_soft(a)),
        live(live_rows(a)),
        rows(live.input.size(0)),
        chunk(chunk_rows(cpu_chunk(dtype, a.chunk_rows, a.memory_budget), rows, row_bytes())),
        linear_weight(matrix_of(a)),
        linear_bias(vector_of_bias(a)),
        softcap(a.softcap),
        products(live.input, linear_weight, linear_bias, chunk, wanted),
        row_operators{a, a.z_loss, products.accumulate_dtype()} {}

  size_t row_bytes() const {
    return size_t(columns_of(a.linear_weight)) * Products::logits_size(dtype) * (a.softcap == 0 ? 1 : 2);
  }

  // body(first row, how many, their logits, their targets)
  template <class Body>
  void over_chunks(const Body& body) {
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t n = std::min(chunk, rows - begin);
      const Tensor z = softcap.forward(products.logits(begin, n));
      const Tensor y = rows_of(live.target, begin, n);
      // Logits of float16 are wider than its probabilities; the row operators read both in one type.
      body(begin, n, with_classes(z, a.linear_weight), soft ? y.to(z.scalar_type()) : y);
    }
  }

  void differentiate(int64_t begin, int64_t n, const Tensor& gradient, double factor) {
    products.differentiate(begin, n, softcap.backward(gradient.view({n, linear_weight.size(0)})), factor);
  }

  // The factor from a gradient of the sum of losses to that of the mean; 1 where all is ignored.
  double scale() const {
    if (a.reduction != kMean || live.positions == 0) return 1;
    return 1 / live.denominator;
  }

  Tensor reduced(double total, OptionalDtype out_dtype) const {
    return scalar(a.reduction == kMean ? total / live.denominator : total, out_dtype.value_or(dtype));
  }

  LinearGradients gradients(Wanted wanted) {
    LinearGradients g = products.finish();
    if (rows == 0) {
      if (wanted[1]) g.linear_weight.zero_();
    }
    g.input = live.among_all(g.input, a.input.size(0));
    if (g.linear_weight.defined()) g.linear_weight = g.linear_weight.view(a.linear_weight.sizes());
    if (g.linear_bias.defined()) g.linear_bias = g.linear_bias.view(a.linear_bias->sizes());
    return g;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                                   int64_t reduction, int64_t ignore_index, double label_smoothing,
                                   double z_loss, double softcap, int64_t chunk_rows, int64_t memory_budget,
                                   OptionalDtype out_dtype, bool wants_lse, const OptionalTensor& linear_bias,
                                   const OptionalTensor& weight) {
  const LinearArguments a{input,        linear_weight,   target, linear_bias, weight,     reduction,
                          ignore_index, label_smoothing, z_loss, softcap,     chunk_rows, memory_budget};
  Call call(a);
  const auto options = input.options().dtype(call.products.accumulate_dtype());
  std::vector<int64_t> sizes = position_sizes(a);
  sizes.front() = call.rows;
  Tensor losses, lse;
  if (reduction == kNone) losses = at::empty(sizes, options);
  if (wants_lse) lse = at::empty(sizes, options);
  double total = 0;
  call.over_chunks([&](int64_t begin, int64_t n, const Tensor& z, const Tensor& y) {
    const Tensor loss = call.row_operators.loss_writing_lse(z, y, reduction == kNone ? kNone : kSum,
                                                            wants_lse ? rows_of(lse, begin, n) : Tensor());
    if (reduction == kNone) {
      rows_of(losses, begin, n).copy_(loss);
    } else {
      total += value_of(loss);
    }
  });
  const int64_t all = input.size(0);
  if (wants_lse && !call.soft) lse.masked_fill_(call.live.target == ignore_index, 0);
  Tensor loss = reduction == kNone ? call.live.among_all(losses, all).to(out_dtype.value_or(call.dtype))
                                   : call.reduced(total, out_dtype);
  return {loss, or_empty(call.live.among_all(lse, all), at::empty({0}, options))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_gradient(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target, int64_t reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, int64_t chunk_rows,
    int64_t memory_budget, OptionalDtype out_dtype, std::array<bool, 3> wanted,
    const OptionalTensor& linear_bias, const OptionalTensor& weight) {
  const LinearArguments a{input,        linear_weight,   target, linear_bias, weight,     reduction,
                          ignore_index, label_smoothing, z_loss, softcap,     chunk_rows, memory_budget};
  Call call(a, wanted);
  double total = 0;
  call.over_chunks([&](int64_t begin, int64_t n, const Tensor& z, const Tensor& y) {
    total += value_of(call.row_operators.gradient_(z, y));
    call.differentiate(begin, n, z, call.scale());
  });
  const LinearGradients g = call.gradients(wanted);
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
  const Tensor per_position = has_loss && reduction == kNone ? call.live.of(*grad_loss) : Tensor();
  const Tensor lse = has_lse ? call.live.of(*grad_lse) : Tensor();
  const double factor = reduction == kNone ? 1 : has_loss ? grad_loss->item<double>() * call.scale() : 0;
  call.over_chunks([&](int64_t begin, int64_t n, const Tensor& z, const Tensor& y) {
    Tensor gradient = z;
    const Tensor through_lse =
        gradients_(gradient, y, has_loss, has_lse ? rows_of(lse, begin, n) : Tensor(), call.row_operators);
    if (!has_lse && reduction != kNone) return call.differentiate(begin, n, gradient, factor);
    if (reduction != kNone) gradient.mul_(factor);
    apply_upstream_(gradient, per_position.defined() ? rows_of(per_position, begin, n) : Tensor(),
                    through_lse);
    call.differentiate(begin, n, gradient, 1);
  });
  const LinearGradients g = call.gradients(wanted);
  return {or_empty(g.input, input), or_empty(g.linear_weight, input), or_empty(g.linear_bias, input)};
}

void scale_gradients_(at::TensorList gradients, const Tensor& grad_loss, const Tensor& target, bool soft,
                      int64_t classes, int64_t ignore_index) {
  if (!soft) over_live_targets(target.to(at::kLong).contiguous(), classes, ignore_index, [](int64_t) {});
  if (grad_loss.item<double>() == 1) return;
  for (const Tensor& g : gradients) g.mul_(grad_loss);
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("linear_cross_entropy_forward", forward);
  m.impl("linear_cross_entropy_forward_gradient", forward_gradient);
  m.impl("linear_cross_entropy_backward", backward);
  m.impl("linear_cross_entropy_scale_gradients_", scale_gradients_);
}

}  // namespace mbperf
