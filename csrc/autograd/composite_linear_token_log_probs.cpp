// The passes of linear + token_log_probs on a backend without products of its own: ATen's, chunk by chunk,
// without waiting for the device. Rows whose target is ignored have gradients of zero rather than none.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "linear_token_log_probs.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

class PlainProducts {
 public:
  PlainProducts(const Tensor& input, const Tensor& linear_weight, const OptionalTensor& linear_bias,
                Wanted wanted)
      : input_(input), weight_(linear_weight), bias_(linear_bias.value_or(Tensor())) {
    const auto sums = input.options().dtype(accumulate_type(input));
    if (wanted[0]) grad_.input = at::empty(input.sizes(), input.options());
    if (wanted[1]) grad_.linear_weight = at::zeros(linear_weight.sizes(), sums);
    if (wanted[2]) grad_.linear_bias = at::zeros({linear_weight.size(0)}, sums);
  }

  Tensor logits(int64_t begin, int64_t n) const {
    return at::linear(rows_of(input_, begin, n), weight_, bias_);
  }

  void differentiate(int64_t begin, int64_t n, const Tensor& g) {
    if (grad_.input.defined()) rows_of(grad_.input, begin, n).copy_(at::mm(g, weight_));
    if (grad_.linear_weight.defined()) grad_.linear_weight.add_(at::mm(g.t(), rows_of(input_, begin, n)));
    if (grad_.linear_bias.defined())
      grad_.linear_bias.add_(at::sum(g, {0}, false, grad_.linear_bias.scalar_type()));
  }

  LinearGradients finish() const {
    const auto rounded = [&](const Tensor& t) { return t.defined() ? t.to(input_.scalar_type()) : t; };
    return {grad_.input, rounded(grad_.linear_weight), rounded(grad_.linear_bias)};
  }

 private:
  const Tensor &input_, &weight_;
  const Tensor bias_;
  LinearGradients grad_;  // summed in the accumulation dtype
};

int64_t rows_a_chunk(const Tensor& input, const Tensor& linear_weight, int64_t memory_budget) {
  const size_t row_bytes = size_t(linear_weight.size(0)) * input.element_size();
  return chunk_rows(device_chunk(0, memory_budget), input.size(0), row_bytes);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight,
                                           const Tensor& target, double temperature, int64_t ignore_index,
                                           int64_t memory_budget, std::optional<at::ScalarType> out_dtype,
                                           bool wants_entropy, const OptionalTensor& linear_bias) {
  PlainProducts products(input, linear_weight, linear_bias, {});
  const TokenResults results =
      linear_tokens_forward(products, input, target, rows_a_chunk(input, linear_weight, memory_budget),
                            {temperature, ignore_index}, wants_entropy);
  const at::ScalarType dtype = out_dtype.value_or(accumulate_type(input));
  return {results.log_probs.to(dtype), results.entropy.to(dtype), results.row_statistics};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& input, const Tensor& linear_weight,
                                            const Tensor& target, const Tensor& row_statistics,
                                            double temperature, int64_t ignore_index, int64_t memory_budget,
                                            std::array<bool, 3> wanted, const OptionalTensor& grad_log_probs,
                                            const OptionalTensor& grad_entropy,
                                            const OptionalTensor& linear_bias) {
  PlainProducts products(input, linear_weight, linear_bias, wanted);
  const LinearGradients g = linear_tokens_backward(
      products, target, row_statistics, grad_log_probs.value_or(Tensor()), grad_entropy.value_or(Tensor()),
      rows_a_chunk(input, linear_weight, memory_budget), {temperature, ignore_index});
  return {or_empty(g.input, input), or_empty(g.linear_weight, input), or_empty(g.linear_bias, input)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeExplicitAutograd, m) {
  m.impl("linear_token_log_probs_forward", forward);
  m.impl("linear_token_log_probs_backward", backward);
}

}  // namespace mbperf
