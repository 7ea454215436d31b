// Cross entropy with statistics on a backend without kernels of its own for them: its loss by the passes of
// cross_entropy, its statistics by torch's operators on a chunk of the logits at a time.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_stats_composite(
    const Tensor& input, const Tensor& target, int64_t reduction, int64_t ignore_index,
    double label_smoothing, OptionalDtype out_dtype, double z_loss, bool wants_gradient,
    const OptionalTensor& weight) {
  const Settings s{reduction, ignore_index, label_smoothing, out_dtype, z_loss};
  const auto [entropy, predicted, probability] = stats_by_chunks(input, target, s);
  const auto [loss, row_max, row_sum] = forward_softmax(input, target, weight, s);
  const Tensor grad_input = wants_gradient
                                ? backward(at::ones_like(loss), input, target, weight, row_max, row_sum, s)
                                : at::empty({0}, input.options());
  return {loss, grad_input, row_max, row_sum, entropy, predicted, probability};
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_forward_stats", forward_stats_composite);
}

}  // namespace mbperf
