// The passes of token_log_probs on a backend without kernels of their own: those of cross_entropy where they
// do, else torch's operators on a chunk of the logits at a time.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>

#include "autograd/passes.h"
#include "checks.h"

namespace mbperf {
namespace {

// Of a chunk, two copies of which are held: 64 MB each in float32.
constexpr int64_t kChunkLogits = int64_t{1} << 24;
// exp of it is 0 also in float64.
constexpr double kLowest = -750;

// Some of the rows of (C) or (N, C, ...) logits as z = (logit - m) / temperature, and their targets.
struct Chunk {
  Tensor index, ignored, m, z;  // all with a dimension of classes, but for z of one
};

// Calls body(chunk, begin, rows) for ranges of the first dimension.
template <class Body>
void for_chunks(const Tensor& logits, const Tensor& target, int64_t ignore_index, double temperature,
                const Body& body) {
  const int64_t rows = logits.size(0);
  const int64_t step = std::max<int64_t>(kChunkLogits / std::max<int64_t>(logits.numel() / rows, 1), 1);
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t n = std::min(step, rows - begin);
    const Tensor y = target.narrow(0, begin, n).to(at::kLong).unsqueeze(1), ignored = y == ignore_index;
    const Tensor x = widened(logits.narrow(0, begin, n)), m = x.amax(1, /*keepdim=*/true);
    body(Chunk{y.masked_fill(ignored, 0), ignored, m, (x - m).div_(temperature)}, begin, n);
  }
}

Tensor batched(const Tensor& t, bool single) { return single ? t.unsqueeze(0) : t; }

std::tuple<Tensor, Tensor, Tensor> forward_by_chunks(const Tensor& all_logits, const Tensor& all_targets,
                                                     double temperature, int64_t ignore_index,
                                                     at::ScalarType out_dtype, bool wants_entropy) {
  const bool single = all_logits.dim() == 1;
  const Tensor logits = batched(all_logits, single), target = batched(all_targets, single);
  const auto options = logits.options().dtype(widened(at::empty({0}, logits.options())).scalar_type());
  std::vector<int64_t> sizes = target.sizes().vec();
  Tensor log_probs = at::empty(sizes, options),
         entropy = at::empty(wants_entropy ? sizes : std::vector<int64_t>{0}, options);
  sizes.insert(sizes.begin(), wants_entropy ? 3 : 2);
  Tensor statistics = at::empty(sizes, options);
  for_chunks(logits, target, ignore_index, temperature, [&](Chunk c, int64_t begin, int64_t n) {
    const auto put = [&](const Tensor& all, const Tensor& value) {
      all.narrow(0, begin, n).copy_(value.squeeze(1));
    };
    const Tensor z_y = c.z.gather(1, c.index), e = c.z.exp(), s = e.sum(1, /*keepdim=*/true), log_s = s.log();
    put(log_probs, (z_y - log_s).masked_fill_(c.ignored, 0));
    put(statistics[0], c.m);
    put(statistics[1], s);
    if (!wants_entropy) return;
    const Tensor moment = c.z.clamp_min_(kLowest).mul_(e).sum(1, /*keepdim=*/true);
    put(entropy, (log_s - moment / s).masked_fill_(c.ignored, 0));
    put(statistics[2], moment);
  });
  return {log_probs.view(all_targets.sizes()).to(out_dtype),
          (wants_entropy ? entropy.view(all_targets.sizes()) : entropy).to(out_dtype), statistics.flatten(1)};
}

std::tuple<Tensor, Tensor, Tensor> forward_composite(const Tensor& logits, const Tensor& target,
                                                     double temperature, int64_t ignore_index,
                                                     OptionalDtype out_dtype, bool wants_entropy) {
  const at::ScalarType dtype =
      out_dtype.value_or(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  if (temperature != 1 || wants_entropy)
    return forward_by_chunks(logits, target, temperature, ignore_index, dtype, wants_entropy);
  const Settings s{kNone, ignore_index, 0, dtype, 0};
  auto [loss, row_max, row_sum] = forward_softmax(logits, target, std::nullopt, s);
  return {loss.neg_(), at::empty({0}, loss.options()), at::stack({row_max, row_sum})};
}

Tensor backward_by_chunks(const Tensor& grad_log_probs, const Tensor& grad_entropy, const Tensor& all_logits,
                          const Tensor& all_targets, const Tensor& row_statistics, double temperature,
                          int64_t ignore_index) {
  const bool single = all_logits.dim() == 1;
  const Tensor logits = batched(all_logits, single), target = batched(all_targets, single);
  Tensor grad = at::empty(logits.sizes(), logits.options());
  std::vector<int64_t> sizes = target.sizes().vec();
  sizes.insert(sizes.begin(), row_statistics.size(0));
  const Tensor statistics = row_statistics.view(sizes);
  for_chunks(logits, target, ignore_index, temperature, [&](Chunk c, int64_t begin, int64_t n) {
    const auto rows = [&](const Tensor& all) {
      return all.narrow(0, begin, n).unsqueeze(1).to(c.z.scalar_type());
    };
    const Tensor e = c.z.exp(), s = rows(statistics[1]);
    const Tensor g =
        (grad_log_probs.defined() ? rows(batched(grad_log_probs, single)) : at::zeros_like(s)) / temperature;
    Tensor v = e;
    if (grad_entropy.defined()) {
      const Tensor tilt = -rows(batched(grad_entropy, single)) / (temperature * s),
                   mean = rows(statistics[2]) / s;
      v = c.z.clamp_min_(kLowest).mul_(tilt).add_(-g / s - tilt * mean).mul_(e);
    } else {
      v.mul_(-g / s);
    }
    grad.narrow(0, begin, n).copy_(v.scatter_add_(1, c.index, g).masked_fill_(c.ignored, 0));
  });
  return grad.view(all_logits.sizes());
}

Tensor backward_composite(const Tensor& logits, const Tensor& target, const Tensor& row_statistics,
                          double temperature, int64_t ignore_index, const OptionalTensor& grad_log_probs,
                          const OptionalTensor& grad_entropy) {
  const Tensor through_log_probs = grad_log_probs.value_or(Tensor()),
               through_entropy = grad_entropy.value_or(Tensor());
  if (temperature != 1 || through_entropy.defined())
    return backward_by_chunks(through_log_probs, through_entropy, logits, target, row_statistics, temperature,
                              ignore_index);
  return backward(-through_log_probs, logits, target, std::nullopt, row_statistics[0], row_statistics[1],
                  {kNone, ignore_index, 0, std::nullopt, 0});
}

void backward_in_place_composite(Tensor& logits, const Tensor& target, const Tensor& row_statistics,
                                 double temperature, int64_t ignore_index,
                                 const OptionalTensor& grad_log_probs, const OptionalTensor& grad_entropy) {
  logits.copy_(backward_composite(logits, target, row_statistics, temperature, ignore_index, grad_log_probs,
                                  grad_entropy));
}

}  // namespace

TORCH_LIBRARY_IMPL(mbperf, CompositeExplicitAutograd, m) {
  m.impl("token_log_probs_forward", forward_composite);
  m.impl("token_log_probs_backward", backward_composite);
  m.impl("token_log_probs_backward_", backward_in_place_composite);
}

}  // namespace mbperf
