// The thin entry in front of mbperf::kl_div_from_logits.
#include <ATen/core/dispatch/Dispatcher.h>

#include "python/bindings.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalDtype = std::optional<at::ScalarType>;
using KlDivSignature = Tensor(const Tensor&, const Tensor&, double, int64_t, OptionalDtype);

// torch.ops.mbperf.kl_div_from_logits without the parsing by schema.
Tensor kl_div_from_logits(const Tensor& student, const Tensor& teacher, double temperature,
                          int64_t reduction) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::kl_div_from_logits", "")
                             .typed<KlDivSignature>();
  const pybind11::gil_scoped_release no_gil;
  return op.call(student, teacher, temperature, reduction, std::nullopt);
}

}  // namespace

void bind_kl_div(pybind11::module_& m) { m.def("kl_div_from_logits", kl_div_from_logits); }

}  // namespace mbperf
