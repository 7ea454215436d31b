// The functions by which each file of this folder adds to the Python module mbperf._C.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace mbperf {

void bind_collate(pybind11::module_& m);
void bind_cross_entropy(pybind11::module_& m);
void bind_kl_div(pybind11::module_& m);
void bind_linear_cross_entropy(pybind11::module_& m);
void bind_gather(pybind11::module_& m);
void bind_memory(pybind11::module_& m);
void bind_token_log_probs(pybind11::module_& m);

}  // namespace mbperf
