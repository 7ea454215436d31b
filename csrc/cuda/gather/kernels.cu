// The launches of gather: the widest vectors that the rows and their addresses allow.
#include "cuda/gather/kernels.cuh"

#include <algorithm>

namespace mbperf::cuda {
namespace {

// The addresses of the rows or'ed together: the lowest bit that is set bounds the vectors.
uint64_t start_bits(const PickedRows& p) {
  return reinterpret_cast<uint64_t>(p.input) | uint64_t(p.row_stride_bytes);
}

template <typename In, typename Out, int kWidth>
int launch_convert_by(const PickedRows& p, int64_t row, const ChannelScale& how, Stream stream) {
  const bool fits = start_bits(p) % (sizeof(In) * kWidth) == 0 && row % kWidth == 0 &&
                    reinterpret_cast<uint64_t>(p.out) % (sizeof(Out) * kWidth) == 0;
  if constexpr (kWidth > 1) {
    if (!fits) return launch_convert_by<In, Out, kWidth / 2>(p, row, how, stream);
  }
  const RowGrid grid = row_grid(p.picked, row / kWidth);
  return launch(convert_rows_kernel<In, Out, kWidth>, grid.grid(), stream, p, row, grid, how);
}

}  // namespace

int launch_pick(const PickedRows& p, int64_t row_bytes, Stream stream) {
  const uint64_t bits = start_bits(p) | reinterpret_cast<uint64_t>(p.out) | uint64_t(row_bytes);
  return with_vector(vector_bytes(bits), [&](auto vector) {
    using Vector = decltype(vector);
    const RowGrid grid = row_grid(p.picked, row_bytes / int64_t(sizeof(Vector)));
    return launch(pick_rows_kernel<Vector>, grid.grid(), stream, p, row_bytes, grid);
  });
}

template <typename In, typename Out>
int launch_convert(const PickedRows& p, int64_t row, const ChannelScale& how, Stream stream) {
  return launch_convert_by<In, Out, 16 / int(std::max(sizeof(In), sizeof(Out)))>(p, row, how, stream);
}

template int launch_convert<uint8_t, float>(const PickedRows&, int64_t, const ChannelScale&, Stream);
template int launch_convert<uint8_t, BFloat16>(const PickedRows&, int64_t, const ChannelScale&, Stream);
template int launch_convert<uint8_t, Float16>(const PickedRows&, int64_t, const ChannelScale&, Stream);
template int launch_convert<float, float>(const PickedRows&, int64_t, const ChannelScale&, Stream);
template int launch_convert<float, BFloat16>(const PickedRows&, int64_t, const ChannelScale&, Stream);
template int launch_convert<float, Float16>(const PickedRows&, int64_t, const ChannelScale&, Stream);

}  // namespace mbperf::cuda
