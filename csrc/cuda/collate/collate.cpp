// Samples on the GPU (...) -> one batch (N, ...), by one kernel over a table of their pointers, where
// torch.stack launches one for every 128 of them. Samples that differ, or are laid out otherwise, go there.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cuda/collate/problem.h"
#include "cuda/current_stream.h"

namespace mbperf::cuda {
namespace {

using at::Tensor;

bool is_dense(const Tensor& sample) {
  return sample.layout() == at::kStrided && !sample.is_conj() && !sample.is_neg() && sample.is_contiguous() &&
         (sample.dim() < 4 || sample.suggest_memory_format() == at::MemoryFormat::Contiguous);
}

bool stacks_by_table(at::TensorList samples) {
  const Tensor& first = samples[0];
  if (!first.is_cuda() || first.numel() == 0) return false;
  return std::all_of(samples.begin(), samples.end(), [&](const Tensor& sample) {
    return sample.device() == first.device() && sample.scalar_type() == first.scalar_type() &&
           sample.sizes() == first.sizes() && is_dense(sample);
  });
}

// samples: N tensors of shape (...), without a graph to keep.
Tensor stack_cuda(at::TensorList samples) {
  TORCH_CHECK_VALUE(!samples.empty(), "collate: the batch is empty; at least one sample was expected");
  if (!stacks_by_table(samples)) return at::stack(samples);
  const c10::cuda::CUDAGuard guard(samples[0].device());
  c10::DimVector sizes(samples[0].sizes());
  sizes.insert(sizes.begin(), static_cast<int64_t>(samples.size()));
  Tensor out = at::empty(sizes, samples[0].options());
  std::vector<const char*> rows;
  for (const Tensor& sample : samples) rows.push_back(static_cast<const char*>(sample.const_data_ptr()));
  const int64_t row_bytes = samples[0].numel() * static_cast<int64_t>(out.itemsize());
  check(launch_stack(rows.data(), static_cast<int64_t>(rows.size()),
                     static_cast<char*>(out.mutable_data_ptr()), row_bytes, stream()));
  return out;
}

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) { m.impl("stack", stack_cuda); }

}  // namespace
}  // namespace mbperf::cuda
