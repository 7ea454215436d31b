// Rows of tensors (N, ...) picked by index (B,) -> (B, ...), converted and normalised in the same pass.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/index_select.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gather/picked_rows.h"
#include "cpu/gather/rows.h"
#include "cpu/simd/isa.h"
#include "dense_rows.h"

namespace mbperf {
namespace {

constexpr int64_t kGrainBytes = 128 * 1024;    // a thread's share of a copy: some 5 us from cold memory
constexpr int64_t kGrainElements = 32 * 1024;  // and of a conversion

void check_index(const at::Tensor& input, const at::Tensor& index) {
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong && index.dim() == 1,
                   "gather: expected a 1-D int64 index, got ", index.dim(), "-D ", index.scalar_type());
  const int64_t* const at = index.const_data_ptr<int64_t>();
  const auto outside = [n = input.size(0)](int64_t row) { return row < 0 || row >= n; };
  const int64_t* const wrong = std::find_if(at, at + index.numel(), outside);
  TORCH_CHECK_INDEX(wrong == at + index.numel(), "gather: index[", wrong - at, "] is ", *wrong,
                    ", expected 0 <= index < ", input.size(0), ", the rows of a tensor of shape ",
                    input.sizes());
}

// Rows of a few cache lines: one by one, as looking for neighbours would cost more than it saves. `bytes` is
// a constant where the compiler shall unroll the copy.
template <typename Bytes>
void copy_short(const PickedRows& rows, char* out, Bytes bytes) {
  constexpr int64_t kAhead = 16;
  at::parallel_for(0, rows.n, kGrainBytes / bytes, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (bytes >= 32 && k + kAhead < end) prefetch(rows.row(k + kAhead), bytes);
      std::memcpy(out + k * bytes, rows.row(k), size_t(bytes));
    }
  });
}

// Bytes [begin, end) of the result.
void copy_bytes(const PickedRows& rows, char* out, int64_t begin, int64_t end) {
  int64_t k = begin / rows.bytes;
  Ahead ahead(rows, k, at::divup(end, rows.bytes));
  for (int64_t at = begin; at < end;) {
    const int64_t next = k + rows.neighbours(k);
    const int64_t stop = std::min(end, next * rows.bytes);
    ahead.before(next - 1);
    std::memcpy(out + at, rows.row(k) + (at - k * rows.bytes), static_cast<size_t>(stop - at));
    at = stop;
    k = next;
  }
}

template <int64_t n>
using Constant = std::integral_constant<int64_t, n>;

void copy_picked(const PickedRows& rows, char* out) {
  switch (rows.bytes) {
    case 1:
      return copy_short(rows, out, Constant<1>());
    case 2:
      return copy_short(rows, out, Constant<2>());
    case 4:
      return copy_short(rows, out, Constant<4>());
    case 8:
      return copy_short(rows, out, Constant<8>());
    case 16:
      return copy_short(rows, out, Constant<16>());
    case 32:
      return copy_short(rows, out, Constant<32>());
    case 64:
      return copy_short(rows, out, Constant<64>());
  }
  if (rows.bytes <= 512) return copy_short(rows, out, rows.bytes);
  at::parallel_for(0, rows.n * rows.bytes, kGrainBytes,
                   [&](int64_t begin, int64_t end) { copy_bytes(rows, out, begin, end); });
}

template <typename In, typename Out>
void convert_picked(const at::Tensor& input, const at::Tensor& index, const at::Tensor& out,
                    const Normalise& how, ConvertRow<In, Out> convert) {
  const PickedRows rows(input, index);
  const int64_t elements = rows.bytes / int64_t{sizeof(In)};
  auto* const to = static_cast<Out*>(out.mutable_data_ptr());
  at::parallel_for(0, rows.n, std::max<int64_t>(1, kGrainElements / elements),
                   [&](int64_t begin, int64_t end) {
                     Ahead ahead(rows, begin, end);
                     for (int64_t k = begin; k < end; ++k) {
                       ahead.before(k);
                       convert(reinterpret_cast<const In*>(rows.row(k)), to + k * elements, elements, how);
                     }
                   });
}

// False where no kernel knows the pair of dtypes.
bool convert_fused(const at::Tensor& input, const at::Tensor& index, const at::Tensor& out,
                   const Normalise& how) {
  const ConvertKernels& kernels = instruction_set().convert;
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

// The values of all channels, kConvertBlock times over.
const float* repeated(std::vector<float>& into, const float* values, int64_t channels) {
  for (int64_t i = 0; i < kConvertBlock; ++i) into.insert(into.end(), values, values + channels);
  return into.data();
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
  at::assert_no_overlap(out, at);  // a row written over an index that was checked already
  if (out.numel() == 0) return out;
  const bool dense = same_dense_rows(input, out);
  if (dense && !mean && input.scalar_type() == out.scalar_type()) {
    copy_picked(PickedRows(input, at), static_cast<char*>(out.mutable_data_ptr()));
    return out;
  }
  if (dense) {
    const float zero = 0, one = 1;
    const int64_t channels = mean ? mean->numel() : 1;
    const int64_t run = channels > 1 ? out.stride(channel_dim) : c10::multiply_integers(out.sizes().slice(1));
    Normalise how{mean ? mean->const_data_ptr<float>() : &zero, scale ? scale->const_data_ptr<float>() : &one,
                  channels, run};
    std::vector<float> means, scales;
    if (how.interleaved()) {
      how.mean = repeated(means, how.mean, channels);
      how.scale = repeated(scales, how.scale, channels);
    }
    if (convert_fused(input, at, out, how)) return out;
  }
  at::Tensor rows = at::index_select(input, 0, at);
  if (mean) rows = normalised(std::move(rows), *mean, *scale, channel_dim);
  return out.copy_(rows);
}

TORCH_LIBRARY_IMPL(mbperf, CPU, m) { m.impl("gather_rows.out", gather_rows_out_cpu); }

}  // namespace
}  // namespace mbperf
