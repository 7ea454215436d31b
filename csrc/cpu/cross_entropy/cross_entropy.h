// Which kernels of cross entropy serve a call on the CPU, for whoever measures them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace mbperf {

// Names of the paths that can serve these logits and targets forward and backward; the one taken stands
// first.
std::vector<std::string> cross_entropy_paths(const at::Tensor& input, const at::Tensor& target);

// Makes calls of this process take a path wherever it can serve them, or, with nothing, the fastest known.
void set_cross_entropy_path(const std::optional<std::string>& wanted);

}  // namespace mbperf
