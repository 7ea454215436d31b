// The thin entry in front of mbperf::linear_cross_entropy.
#include <ATen/core/dispatch/Dispatcher.h>

#include "python/bindings.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using LinearSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                               const OptionalTensor&, int64_t, std::optional<c10::SymInt>, double,
                               std::optional<at::ScalarType>, double, std::optional<double>,
                               std::optional<int64_t>, std::optional<int64_t>);

// torch.ops.mbperf.linear_cross_entropy without the parsing by schema.
Tensor linear_cross_entropy(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                            const OptionalTensor& linear_bias, const OptionalTensor& weight,
                            int64_t reduction, std::optional<int64_t> ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::linear_cross_entropy", "")
                             .typed<LinearSignature>();
  const pybind11::gil_scoped_release no_gil;
  const auto ignored = ignore_index ? std::optional<c10::SymInt>(*ignore_index) : std::nullopt;
  return op.call(input, linear_weight, target, linear_bias, weight, reduction, ignored, label_smoothing,
                 std::nullopt, 0.0, std::nullopt, std::nullopt, std::nullopt);
}

}  // namespace

void bind_linear_cross_entropy(pybind11::module_& m) { m.def("linear_cross_entropy", linear_cross_entropy); }

}  // namespace mbperf
