// Samples on the GPU (...) -> one batch (N, ...), by one kernel over a table of their pointers, where
// torch.stack launches one for every 128 of them. Samples that differ, or are laid out otherwise, go there.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda/collate_kernels.cuh"

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

template <typename Vector, int kPointers>
void launch_stack(at::TensorList samples, char* out, int64_t row_bytes) {
  RowTable<kPointers> table{};
  for (size_t k = 0; k < samples.size(); ++k)
    table.row[k] = static_cast<const char*>(samples[k].const_data_ptr());
  const auto count = static_cast<int64_t>(samples.size());
  const RowGrid grid = row_grid(count, row_bytes / static_cast<int64_t>(sizeof(Vector)));
  stack_rows_kernel<Vector, kPointers><<<dim3(grid.row_blocks, grid.pieces), dim3(grid.lanes, grid.rows), 0,
                                         c10::cuda::getCurrentCUDAStream()>>>(table, count, out, row_bytes);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Vector>
void stack_by(at::TensorList samples, char* out, int64_t row_bytes) {
  if (samples.size() <= kSmallTable) return launch_stack<Vector, kSmallTable>(samples, out, row_bytes);
  for (size_t begin = 0; begin < samples.size(); begin += kLargeTable) {
    const size_t count = std::min<size_t>(kLargeTable, samples.size() - begin);
    launch_stack<Vector, kLargeTable>(samples.slice(begin, count),
                                      out + static_cast<int64_t>(begin) * row_bytes, row_bytes);
  }
}

void stack_rows(at::TensorList samples, const Tensor& out) {
  const int64_t row_bytes = samples[0].numel() * static_cast<int64_t>(out.itemsize());
  auto* const to = static_cast<char*>(out.mutable_data_ptr());
  uint64_t bits = reinterpret_cast<uint64_t>(to) | static_cast<uint64_t>(row_bytes);
  for (const Tensor& sample : samples) bits |= reinterpret_cast<uint64_t>(sample.const_data_ptr());
  switch (vector_bytes(bits)) {
    case 16:
      return stack_by<Bytes16>(samples, to, row_bytes);
    case 8:
      return stack_by<uint64_t>(samples, to, row_bytes);
    case 4:
      return stack_by<uint32_t>(samples, to, row_bytes);
    case 2:
      return stack_by<uint16_t>(samples, to, row_bytes);
    default:
      return stack_by<uint8_t>(samples, to, row_bytes);
  }
}

// samples: N tensors of shape (...), without a graph to keep.
Tensor stack_cuda(at::TensorList samples) {
  TORCH_CHECK_VALUE(!samples.empty(), "collate: the batch is empty; at least one sample was expected");
  if (!stacks_by_table(samples)) return at::stack(samples);
  const c10::cuda::CUDAGuard guard(samples[0].device());
  c10::DimVector sizes(samples[0].sizes());
  sizes.insert(sizes.begin(), static_cast<int64_t>(samples.size()));
  Tensor out = at::empty(sizes, samples[0].options());
  stack_rows(samples, out);
  return out;
}

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) { m.impl("stack", stack_cuda); }

}  // namespace
}  // namespace mbperf::cuda
