// The passes of linear + token_log_probs that all backends share. For a chunk of rows of X (N, H) at a time:
//   Z = X W^T + b, then the row operators of token_log_probs on Z; in backward Z again, its gradient G over
//   it, dX = G W,  dW += G^T X,  db += sum of the rows of G
// The upstream gradients, one a row, are not known before backward: that is why Z is computed twice.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "linear_cross_entropy.h"
#include "shape.h"

namespace mbperf {

// The settings that the operators of library.cpp have in common.
struct TokenRows {
  double temperature;
  int64_t ignore_index;

  std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& logits, const at::Tensor& target,
                                                         bool wants_entropy) const {
    using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
        const at::Tensor&, const at::Tensor&, double, c10::SymInt, std::optional<at::ScalarType>, bool);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mbperf::token_log_probs_forward", "")
                               .typed<Signature>();
    return op.call(logits, target, temperature, ignore_index, std::nullopt, wants_entropy);
  }

  // Overwrites the logits by their gradient.
  void backward_(at::Tensor logits, const at::Tensor& target, const at::Tensor& row_statistics,
                 const std::optional<at::Tensor>& grad_log_probs,
                 const std::optional<at::Tensor>& grad_entropy) const {
    using Signature = void(at::Tensor&, const at::Tensor&, const at::Tensor&, double, c10::SymInt,
                           const std::optional<at::Tensor>&, const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("mbperf::token_log_probs_backward_", "")
                               .typed<Signature>();
    op.call(logits, target, row_statistics, temperature, ignore_index, grad_log_probs, grad_entropy);
  }
};

// Log-probabilities and entropies (N), in the accumulation dtype, and row statistics (2 or 3, N).
struct TokenResults {
  at::Tensor log_probs, entropy, row_statistics;

  TokenResults(const at::Tensor& input, bool wants_entropy) {
    const auto options = input.options().dtype(accumulate_type(input));
    const int64_t rows = input.size(0);
    log_probs = at::empty({rows}, options);
    entropy = at::empty({wants_entropy ? rows : 0}, options);
    row_statistics = at::empty({wants_entropy ? 3 : 2, rows}, options);
  }
};

// Products has logits(first row, how many), differentiate(first row, how many, gradient) and finish().
template <class Products>
TokenResults linear_tokens_forward(Products& products, const at::Tensor& input, const at::Tensor& target,
                                   int64_t chunk, const TokenRows& rows, bool wants_entropy) {
  TokenResults results(input, wants_entropy);
  for (int64_t begin = 0; begin < input.size(0); begin += chunk) {
    const int64_t n = std::min(chunk, input.size(0) - begin);
    const auto [log_probs, entropy, statistics] =
        rows.forward(products.logits(begin, n), rows_of(target, begin, n), wants_entropy);
    rows_of(results.log_probs, begin, n).copy_(log_probs);
    if (wants_entropy) rows_of(results.entropy, begin, n).copy_(entropy);
    results.row_statistics.narrow(1, begin, n).copy_(statistics);
  }
  return results;
}

// Upstream gradients are undefined where there are none.
template <class Products>
LinearGradients linear_tokens_backward(Products& products, const at::Tensor& target,
                                       const at::Tensor& row_statistics, const at::Tensor& grad_log_probs,
                                       const at::Tensor& grad_entropy, int64_t chunk, const TokenRows& rows) {
  for (int64_t begin = 0; begin < target.size(0); begin += chunk) {
    const int64_t n = std::min(chunk, target.size(0) - begin);
    const auto upstream = [&](const at::Tensor& t) {
      return t.defined() ? std::optional<at::Tensor>(rows_of(t, begin, n)) : std::nullopt;
    };
    const at::Tensor logits = products.logits(begin, n);
    rows.backward_(logits, rows_of(target, begin, n), row_statistics.narrow(1, begin, n).contiguous(),
                   upstream(grad_log_probs), upstream(grad_entropy));
    products.differentiate(begin, n, logits);
  }
  return products.finish();
}

}  // namespace mbperf
