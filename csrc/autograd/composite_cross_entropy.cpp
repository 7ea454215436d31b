// Cross entropy with statistics or a soft cap on a backend without kernels of its own for them: its loss by
// the passes of cross_entropy, its statistics by torch's operators on a chunk of the logits at a time, soft
// caps by torch's operators on all of them.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "autograd/passes.h"
#include "checks.h"

namespace mbperf {
namespace {

// Of a chunk, three copies of which are held: 64 MB each in float32.
constexpr int64_t kChunkLogits = int64_t{1} << 24;

Stats stats_by_chunks(const Tensor& input, const Tensor& target, const Settings& s) {
  if (input.dim() == 1 || input.numel() <= kChunkLogits) return stats_by_torch(input, target, s);
  const int64_t rows = input.size(0);
  const int64_t step = std::max<int64_t>(kChunkLogits / (input.numel() / rows), 1);
  std::vector<Tensor> entropy, predicted, probability;
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t n = std::min(step, rows - begin);
    const Stats chunk = stats_by_torch(input.narrow(0, begin, n), target.narrow(0, begin, n), s);
    entropy.push_back(chunk.entropy);
    predicted.push_back(chunk.predicted);
    probability.push_back(chunk.probability);
  }
  return {at::cat(entropy), at::cat(predicted), at::cat(probability)};
}

// The arguments of the passes on capped logits, in the type that logits are accumulated in; as they are where
// there is no cap.
struct CappedCall {
  Tensor input, target;
  OptionalTensor weight;
  Settings settings;

  CappedCall(const Tensor& x, const Tensor& y, const OptionalTensor& w, Settings s, at::ScalarType dtype)
      : input(x), target(y), weight(w), settings(std::move(s)) {
    if (settings.softcap == 0) return;
    input = softcapped(widened(x), settings);
    target = widened(y);
    if (w && w->defined()) weight = widened(*w);
    if (!settings.out_dtype) settings.out_dtype = dtype;
  }
};

Tensor backward_softcap_composite(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                  const Tensor& row_max, const Tensor& row_sum, int64_t reduction,
                                  int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                  const OptionalTensor& weight) {
  const Settings s{reduction, ignore_index, label_smoothing, std::nullopt, z_loss, softcap};
  if (softcap == 0) return backward(grad_loss, input, target, weight, row_max, row_sum, s);
  const CappedCall c(input, target, weight, s, input.scalar_type());
  const Tensor grad = backward(grad_loss.to(c.input.scalar_type()), c.input, c.target, c.weight, row_max,
                               row_sum, c.settings);
  const Tensor slope = 1 - (c.input / softcap).square_();
  return (grad * slope).masked_fill_(grad == 0, 0).to(input.scalar_type());  // also beside a NaN
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_softcap_composite(
    const Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
    double label_smoothing, OptionalDtype out_dtype, double z_loss, double softcap, bool wants_gradient,
    const OptionalTensor& weight) {
  const CappedCall c(input, target, weight,
                     {reduction, ignore_index, label_smoothing, out_dtype, z_loss, softcap},
                     input.scalar_type());
  const auto [loss, row_max, row_sum] = forward_softmax(c.input, c.target, c.weight, c.settings);
  const Tensor grad_input =
      wants_gradient
          ? backward_softcap_composite(at::ones_like(loss), input, target, row_max, row_sum, reduction,
                                       ignore_index, label_smoothing, z_loss, softcap, weight)
          : at::empty({0}, input.options());
  return {loss, grad_input, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats_composite(
    const Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
    double label_smoothing, OptionalDtype out_dtype, double z_loss, double softcap, bool wants_gradient,
    const OptionalTensor& weight) {
  const Settings s{reduction, ignore_index, label_smoothing, out_dtype, z_loss, softcap};
  const auto [entropy, predicted, probability] = stats_by_chunks(input, target, s);
  const auto [loss, grad_input, row_max, row_sum] =
      forward_softcap_composite(input, target, reduction, ignore_index, label_smoothing, out_dtype, z_loss,
                                softcap, wants_gradient, weight);
  return {loss, grad_input, row_max, row_sum, entropy, predicted, probability};
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_forward_stats", forward_stats_composite);
  m.impl("cross_entropy_forward_softcap", forward_softcap_composite);
  m.impl("cross_entropy_backward_softcap", backward_softcap_composite);
}

}  // namespace mbperf
