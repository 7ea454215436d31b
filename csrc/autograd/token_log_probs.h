// What log-probabilities of logits and of hidden states share: the settings of a call, the same functions in
// torch's own operators.
#pragma once

#include "autograd/fallback.h"

namespace mbperf {

struct TokenSettings {
  double temperature;
  c10::SymInt ignore_index;
  OptionalDtype out_dtype;
  bool wants_entropy;
};

struct LogProbs {
  Tensor log_probs, entropy, row_statistics;  // entropy is undefined where it is not wanted
};

// Differentiable any number of times, in every mode; without row_statistics.
LogProbs token_log_probs_by_torch(const Tensor& logits, const Tensor& target, const TokenSettings& s);

// Raises for a temperature or an out_dtype that `function` does not take.
void check_token_settings(const char* function, const TokenSettings& s);

}  // namespace mbperf
