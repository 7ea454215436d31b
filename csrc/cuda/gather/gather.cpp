// Rows of tensors (N, ...) picked by index (B,) on the device -> (B, ...), converted in the same pass.
// Strided rows and dtypes that the kernels do not know take torch's own steps.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

#include "cuda/current_stream.h"
#include "cuda/gather/problem.h"
#include "dense_rows.h"

namespace mbperf::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_arguments(const Tensor& input, const Tensor& index, const Tensor& out) {
  TORCH_CHECK_VALUE(input.dim() > 0 && out.dim() == input.dim(), "gather: expected rows, got shape ",
                    input.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong && index.dim() == 1,
                   "gather: expected a 1-D int64 index, got ", index.dim(), "-D ", index.scalar_type());
  TORCH_CHECK_VALUE(out.is_cuda() && index.device() == out.device(), "gather: expected index and out on one ",
                    "GPU, got ", index.device(), " and ", out.device());
  TORCH_CHECK_VALUE(input.device() == out.device() || (input.is_cpu() && input.is_pinned()),
                    "gather: expected input on ", out.device(), " or in pinned host memory, got ",
                    input.device(), input.is_cpu() ? " (not pinned)" : "");
  TORCH_CHECK_INDEX(input.size(0) > 0 || index.numel() == 0, "gather: index has ", index.numel(),
                    " elements, input of shape ", input.sizes(), " has no rows");
}

// The address under which the GPU reads pinned memory, which must not be handed out again until it has.
const char* device_address(const Tensor& input) {
  const auto* const data = static_cast<const char*>(input.const_data_ptr());
  if (input.is_cuda()) return data;
  const c10::DataPtr& block = input.storage().data_ptr();
  at::getHostAllocator(at::kCUDA)->record_event(block.get(), block.get_context(),
                                                c10::cuda::getCurrentCUDAStream().unwrap());
  void* mapped = nullptr;
  C10_CUDA_CHECK(cudaHostGetDevicePointer(&mapped, block.get(), 0));
  return static_cast<const char*>(mapped) + (data - static_cast<const char*>(block.get()));
}

PickedRows picked_rows(const Tensor& input, const Tensor& index, const Tensor& out) {
  const auto size = static_cast<int64_t>(input.itemsize());
  return {device_address(input),           input.size(0), input.stride(0) * size,
          index.const_data_ptr<int64_t>(), index.numel(), static_cast<char*>(out.mutable_data_ptr())};
}

template <typename In>
bool convert_to(at::ScalarType dtype, const PickedRows& p, int64_t row, const ChannelScale& how) {
  if (dtype == at::kFloat) return check(launch_convert<In, float>(p, row, how, stream())), true;
  if (dtype == at::kBFloat16) return check(launch_convert<In, BFloat16>(p, row, how, stream())), true;
  if (dtype == at::kHalf) return check(launch_convert<In, Float16>(p, row, how, stream())), true;
  return false;
}

ChannelScale channel_scale(const OptionalTensor& mean, const OptionalTensor& scale, int64_t run) {
  TORCH_CHECK_VALUE(!mean || (mean->is_cpu() && scale && scale->is_cpu() && mean->is_contiguous() &&
                              scale->is_contiguous() && scale->numel() == mean->numel()),
                    "gather: expected mean and scale on the CPU, of one size");
  ChannelScale how{};
  how.channels = mean ? static_cast<uint32_t>(mean->numel()) : 1;
  how.run = static_cast<uint32_t>(run);
  for (uint32_t c = 0; c < how.channels; ++c) {
    how.mean[c] = mean ? mean->const_data_ptr<float>()[c] : 0.0f;
    how.scale[c] = scale ? scale->const_data_ptr<float>()[c] : 1.0f;
  }
  return how;
}

// False where no kernel knows the dtypes, the number of channels or the size of a row.
bool convert_fused(const Tensor& input, const Tensor& index, const OptionalTensor& mean,
                   const OptionalTensor& scale, int64_t channel_dim, const Tensor& out) {
  const int64_t row = c10::multiply_integers(out.sizes().slice(1)), channels = mean ? mean->numel() : 1;
  if (row > std::numeric_limits<int32_t>::max() || channels > kMostChannels) return false;
  const ChannelScale how = channel_scale(mean, scale, channels > 1 ? out.stride(channel_dim) : row);
  const PickedRows p = picked_rows(input, index, out);
  if (input.scalar_type() == at::kByte) return convert_to<uint8_t>(out.scalar_type(), p, row, how);
  if (input.scalar_type() == at::kFloat) return convert_to<float>(out.scalar_type(), p, row, how);
  return false;
}

Tensor along(const Tensor& values, const Tensor& rows, int64_t channel_dim) {
  c10::DimVector shape(static_cast<size_t>(rows.dim()), 1);
  if (values.numel() > 1) shape[static_cast<size_t>(channel_dim)] = values.numel();
  return values.to(rows.device()).view(shape);
}

void by_torch(const Tensor& input, const Tensor& index, const OptionalTensor& mean,
              const OptionalTensor& scale, int64_t channel_dim, const Tensor& out) {
  Tensor rows = at::index_select(input.to(out.device()), 0, index);
  if (mean) {
    rows = rows.to(rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
    rows = rows.sub_(along(*mean, rows, channel_dim)).mul_(along(*scale, rows, channel_dim));
  }
  out.copy_(rows);
}

// input (N, ...) on the GPU or pinned, index (B,) int64, mean and scale (1,) or (size(channel_dim),) float32
// on the CPU or absent, out (B, ...).
Tensor& gather_rows_out_cuda(const Tensor& input, const Tensor& index, const OptionalTensor& mean,
                             const OptionalTensor& scale, int64_t channel_dim, Tensor& out) {
  check_arguments(input, index, out);
  const c10::cuda::CUDAGuard guard(out.device());
  const Tensor at = index.contiguous();
  at::assert_no_overlap(out, input);
  if (out.numel() == 0) return out;
  if (same_dense_rows(input, out)) {
    if (!mean && input.scalar_type() == out.scalar_type()) {
      const int64_t row_bytes =
          c10::multiply_integers(out.sizes().slice(1)) * static_cast<int64_t>(out.itemsize());
      check(launch_pick(picked_rows(input, at, out), row_bytes, stream()));
      return out;
    }
    if (convert_fused(input, at, mean, scale, channel_dim, out)) return out;
  }
  by_torch(input, at, mean, scale, channel_dim, out);
  return out;
}

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) { m.impl("gather_rows.out", gather_rows_out_cuda); }

}  // namespace
}  // namespace mbperf::cuda
