// Rows of tensors (N, ...) picked by index (B,) -> (B, ...), converted and normalised in the same pass.
#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/collate.h"
#include "cpu/gather_rows.h"
#include "cpu/isa.h"
#include "dense_rows.h"

namespace mbperf {
namespace {

constexpr int64_t kGrainElements = 128 * 1024;  // a thread's share: some 20 us

const ConvertKernels& convert_kernels() {
  const std::string name = row_kernels().name;
#if defined(__x86_64__)
  if (name == "avx512") return kConvertAvx512;
  if (name == "avx2") return kConvertAvx2;
#endif
  return kConvertBaseline;
}

void check_index(const at::Tensor& input, const at::Tensor& index) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong && index.dim() == 1,
                   "gather: expected a 1-D int64 index, got ", index.dim(), "-D ", index.scalar_type());
  const int64_t* const at = index.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < index.numel(); ++k)
    TORCH_CHECK_INDEX(at[k] >= 0 && at[k] < input.size(0), "gather: index[", k, "] is ", at[k],
                      ", expected 0 <= index < ", input.size(0), ", the rows of a tensor of shape ",
                      input.sizes());
}

void copy_picked(const at::Tensor& input, const at::Tensor& index, const at::Tensor& out) {
  const int64_t* const at = index.const_data_ptr<int64_t>();
  const auto* const base = static_cast<const char*>(input.const_data_ptr());
  const auto size = static_cast<int64_t>(input.itemsize());
  std::vector<const char*> rows(static_cast<size_t>(index.numel()));
  for (size_t k = 0; k < rows.size(); ++k) rows[k] = base + at[k] * input.stride(0) * size;
  const int64_t row_bytes = c10::multiply_integers(out.sizes().slice(1)) * size;
  copy_rows({RowCopy{static_cast<char*>(out.mutable_data_ptr()), rows.data(), index.numel(), row_bytes}});
}

template <typename In, typename Out>
void convert_picked(const at::Tensor& input, const at::Tensor& index, const at::Tensor& out,
                    const Normalise& how, ConvertRow<In, Out> convert) {
  const int64_t row = c10::multiply_integers(out.sizes().slice(1));
  const int64_t stride = input.stride(0);
  const int64_t* const at = index.const_data_ptr<int64_t>();
  const auto* const in = static_cast<const In*>(input.const_data_ptr());
  auto* const to = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, row));
  at::parallel_for(0, index.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) convert(in + at[k] * stride, to + k * row, row, how);
  });
}

// False where no kernel knows the pair of dtypes.
bool convert_fused(const at::Tensor& input, const at::Tensor& index, const at::Tensor& out,
                   const Normalise& how) {
  const ConvertKernels& kernels = convert_kernels();
  const auto run = [&](auto u8, auto f32) {
    if (input.scalar_type() == at::kByte) return convert_picked(input, index, out, how, u8), true;
    if (input.scalar_type() == at::kFloat) return convert_picked(input, index, out, how, f32), true;
    return false;
  };
  if (out.scalar_type() == at::kFloat) return run(kernels.u8_f32, kernels.f32_f32);
  if (out.scalar_type() == at::kBFloat16) return run(kernels.u8_bf16, kernels.f32_bf16);
  if (out.scalar_type() == at::kHalf) return run(kernels.u8_fp16, kernels.f32_fp16);
  return false;
}

at::Tensor along(const at::Tensor& values, const at::Tensor& rows, int64_t channel_dim) {
  c10::DimVector shape(static_cast<size_t>(rows.dim()), 1);
  if (values.numel() > 1) shape[static_cast<size_t>(channel_dim)] = values.numel();
  return values.view(shape);
}

at::Tensor normalised(at::Tensor rows, const at::Tensor& mean, const at::Tensor& scale, int64_t channel_dim) {
  const auto compute = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  rows = rows.to(compute);
  return rows.sub_(along(mean, rows, channel_dim)).mul_(along(scale, rows, channel_dim));
}

// input (N, ...), index (B,) int64, mean and scale (1,) or (size(channel_dim),) float32 or absent, out (B,
// ...).
at::Tensor& gather_rows_out_cpu(const at::Tensor& input, const at::Tensor& index,
                                const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& scale,
                                int64_t channel_dim, at::Tensor& out) {
  TORCH_CHECK_VALUE(input.dim() > 0 && out.dim() == input.dim(), "gather: expected rows, got shape ",
                    input.sizes());
  const at::Tensor at = index.contiguous();
  check_index(input, at);
  at::assert_no_overlap(out, input);
  if (out.numel() == 0) return out;
  const bool dense = same_dense_rows(input, out);
  if (dense && !mean && input.scalar_type() == out.scalar_type()) {
    copy_picked(input, at, out);
    return out;
  }
  if (dense) {
    const float zero = 0, one = 1;
    const int64_t channels = mean ? mean->numel() : 1;
    const int64_t run = channels > 1 ? out.stride(channel_dim) : c10::multiply_integers(out.sizes().slice(1));
    const Normalise how{mean ? mean->const_data_ptr<float>() : &zero,
                        scale ? scale->const_data_ptr<float>() : &one, channels, run};
    if (convert_fused(input, at, out, how)) return out;
  }
  at::Tensor rows = at::index_select(input, 0, at);
  if (mean) rows = normalised(std::move(rows), *mean, *scale, channel_dim);
  return out.copy_(rows);
}

TORCH_LIBRARY_IMPL(mbperf, CPU, m) { m.impl("gather_rows.out", gather_rows_out_cpu); }

}  // namespace
}  // namespace mbperf
