// The thin entries in front of mbperf::token_log_probs.
#include <ATen/core/dispatch/Dispatcher.h>

#include "python/bindings.h"

namespace mbperf {
namespace {

using at::Tensor;

template <class Result>
using TokenSignature = Result(const Tensor&, const Tensor&, double, c10::SymInt,
                              std::optional<at::ScalarType>);

// torch.ops.mbperf.token_log_probs without the parsing by schema.
Tensor token_log_probs(const Tensor& logits, const Tensor& target, double temperature, int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::token_log_probs", "")
                             .typed<TokenSignature<Tensor>>();
  const pybind11::gil_scoped_release no_gil;
  return op.call(logits, target, temperature, ignore_index, std::nullopt);
}

std::tuple<Tensor, Tensor> token_log_probs_with_entropy(const Tensor& logits, const Tensor& target,
                                                        double temperature, int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::token_log_probs_with_entropy", "")
                             .typed<TokenSignature<std::tuple<Tensor, Tensor>>>();
  const pybind11::gil_scoped_release no_gil;
  return op.call(logits, target, temperature, ignore_index, std::nullopt);
}

}  // namespace

void bind_token_log_probs(pybind11::module_& m) {
  m.def("token_log_probs", token_log_probs);
  m.def("token_log_probs_with_entropy", token_log_probs_with_entropy);
}

}  // namespace mbperf
