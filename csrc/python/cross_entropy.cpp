// The thin entry in front of mbperf::cross_entropy, and the choice of row kernels.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>

#include "cpu/cross_entropy/cross_entropy.h"
#include "cpu/simd/isa.h"
#include "python/bindings.h"

namespace mbperf {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
template <class Result>
using LossSignature = Result(const Tensor&, const Tensor&, const OptionalTensor&, int64_t, c10::SymInt,
                             double, std::optional<at::ScalarType>, double, std::optional<double>);

// torch.ops.mbperf.cross_entropy without the parsing by schema: about 1 us less a call.
Tensor cross_entropy(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::cross_entropy", "")
                             .typed<LossSignature<Tensor>>();
  const pybind11::gil_scoped_release no_gil;
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing, std::nullopt, 0.0,
                 std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_with_stats(const Tensor& input, const Tensor& target,
                                                                    const OptionalTensor& weight,
                                                                    int64_t reduction, int64_t ignore_index,
                                                                    double label_smoothing) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mbperf::cross_entropy_with_stats", "")
                             .typed<LossSignature<std::tuple<Tensor, Tensor, Tensor, Tensor>>>();
  const pybind11::gil_scoped_release no_gil;
  return op.call(input, target, weight, reduction, ignore_index, label_smoothing, std::nullopt, 0.0,
                 std::nullopt);
}

// How many threads an at::parallel_for really uses: 1 where this file was built without OpenMP.
int64_t parallel_threads() {
  std::atomic<int64_t> chunks{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++chunks; });
  return chunks;
}

}  // namespace

void bind_cross_entropy(pybind11::module_& m) {
  m.def("cross_entropy", cross_entropy);
  m.def("cross_entropy_with_stats", cross_entropy_with_stats);
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
  m.def("instruction_sets", instruction_sets);
  m.def("set_instruction_set", set_instruction_set);
  m.def("cross_entropy_paths", cross_entropy_paths);
  m.def("set_cross_entropy_path", set_cross_entropy_path);
  m.def("parallel_threads", parallel_threads);
}

}  // namespace mbperf
