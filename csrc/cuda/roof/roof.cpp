// torch.ops.mbperf.roof for CUDA tensors: the bytes of an operation, moved and nothing else.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "cuda/current_stream.h"
#include "cuda/roof/problem.h"

namespace mbperf::cuda {
namespace {

constexpr int64_t kVector = 16;  // bytes

// Reads all of src and writes all of dst, up to 15 bytes at their ends; the kind of store is the chip's
// choice.
int64_t roof_cuda(const at::Tensor& src, at::Tensor& dst, bool) {
  TORCH_CHECK(src.scalar_type() == at::kByte && src.is_contiguous() && dst.scalar_type() == at::kByte &&
                  dst.is_contiguous() && src.device() == dst.device(),
              "roof: expected contiguous uint8 tensors on one GPU, got ", src.scalar_type(), " on ",
              src.device(), " and ", dst.scalar_type(), " on ", dst.device());
  const c10::cuda::CUDAGuard guard(src.device());
  const auto* const from = src.const_data_ptr();
  auto* const to = dst.mutable_data_ptr();
  TORCH_CHECK((reinterpret_cast<uint64_t>(from) | reinterpret_cast<uint64_t>(to)) % kVector == 0,
              "roof: expected tensors that start at a multiple of 16 bytes");
  const Roof roof{static_cast<const Bytes16*>(from), static_cast<Bytes16*>(to), src.numel() / kVector,
                  dst.numel() / kVector, dst.numel() >= 4 ? static_cast<uint32_t*>(to) : nullptr};
  check(launch_roof(roof, stream()));
  return 0;
}

TORCH_LIBRARY_IMPL(mbperf, CUDA, m) { m.impl("roof", roof_cuda); }

}  // namespace
}  // namespace mbperf::cuda
