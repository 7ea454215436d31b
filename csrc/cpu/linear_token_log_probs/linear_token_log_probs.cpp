// Linear + token_log_probs on the CPU, chunk by chunk: the products of linear_cross_entropy, without the rows
// whose target is ignored.
#include <torch/library.h>

#include "cpu/linear_cross_entropy/live_rows.h"
#include "cpu/linear_cross_entropy/products.h"
#include "linear_token_log_probs.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

LiveRows live_rows(const Tensor& input, const Tensor& target, int64_t classes, int64_t ignore_index) {
  LiveRows live{input, target.to(at::kLong).contiguous(), {}};
  int64_t count = 0;
  over_live_targets(live.target, classes, ignore_index, [&](int64_t) { ++count; });
  if (count < live.target.numel()) live.leave_out(ignore_index);
  return live;
}

int64_t rows_a_chunk(const Tensor& input, const Tensor& linear_weight, int64_t memory_budget) {
  const at::ScalarType dtype = input.scalar_type();
  const size_t row_bytes = size_t(linear_weight.size(0)) * Products::logits_size(dtype);
  return chunk_rows(cpu_chunk(dtype, 0, memory_budget), input.size(0), row_bytes);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& linear_weight,
                                           const Tensor& target, double temperature, int64_t ignore_index,
                                           int64_t memory_budget, std::optional<at::ScalarType> out_dtype,
                                           bool wants_entropy, const OptionalTensor& linear_bias) {
  const LiveRows live = live_rows(input, target, linear_weight.size(0), ignore_index);
  const int64_t all = input.size(0), chunk = rows_a_chunk(live.input, linear_weight, memory_budget);
  const Tensor bias = linear_bias.value_or(Tensor());
  Products products(live.input, linear_weight, bias, chunk, {});
  const TokenResults results = linear_tokens_forward(products, live.input, live.target, chunk,
                                                     {temperature, ignore_index}, wants_entropy);
  const at::ScalarType dtype = out_dtype.value_or(accumulate_type(input));
  const Tensor entropy = wants_entropy ? live.among_all(results.entropy, all) : results.entropy;
  return {live.among_all(results.log_probs, all).to(dtype), entropy.to(dtype),
          live.among_all(results.row_statistics, all, 1)};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& input, const Tensor& linear_weight,
                                            const Tensor& target, const Tensor& row_statistics,
                                            double temperature, int64_t ignore_index, int64_t memory_budget,
                                            std::array<bool, 3> wanted, const OptionalTensor& grad_log_probs,
                                            const OptionalTensor& grad_entropy,
                                            const OptionalTensor& linear_bias) {
  const LiveRows live = live_rows(input, target, linear_weight.size(0), ignore_index);
  const int64_t chunk = rows_a_chunk(live.input, linear_weight, memory_budget);
  const Tensor bias = linear_bias.value_or(Tensor());
  Products products(live.input, linear_weight, bias, chunk, wanted);
  LinearGradients g = linear_tokens_backward(
      products, live.target, live.of(row_statistics, 1), live.of(grad_log_probs.value_or(Tensor())),
      live.of(grad_entropy.value_or(Tensor())), chunk, {temperature, ignore_index});
  if (live.target.size(0) == 0 && wanted[1]) g.linear_weight.zero_();
  g.input = live.among_all(g.input, input.size(0));
  return {or_empty(g.input, input), or_empty(g.linear_weight, input), or_empty(g.linear_bias, input)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CPU, m) {
  m.impl("linear_token_log_probs_forward", forward);
  m.impl("linear_token_log_probs_backward", backward);
}

}  // namespace mbperf
