// The launches of gather, of collate and of the memory limit as C functions, for tests to call through
// ctypes.
#include <algorithm>

#include "cuda/collate/problem.h"
#include "cuda/gather/problem.h"
#include "cuda/roof/problem.h"

using namespace mbperf;
using namespace mbperf::cuda;

template <class In>
static int convert(int to, const PickedRows& p, int64_t row, const ChannelScale& how) {
  if (to == 0) return launch_convert<In, float>(p, row, how, nullptr);
  if (to == 1) return launch_convert<In, BFloat16>(p, row, how, nullptr);
  return launch_convert<In, Float16>(p, row, how, nullptr);
}

extern "C" {

int mbperf_pick(const PickedRows* p, int64_t row_bytes) { return launch_pick(*p, row_bytes, nullptr); }

// to: 0 float32, 1 bfloat16, 2 float16; from: 0 uint8, 1 float32.
int mbperf_convert(int from, int to, const PickedRows* p, int64_t row, const float* mean, const float* scale,
                   uint32_t channels, uint32_t run) {
  ChannelScale how{};
  std::copy_n(mean, channels, how.mean);
  std::copy_n(scale, channels, how.scale);
  how.channels = channels;
  how.run = run;
  return from == 0 ? convert<uint8_t>(to, *p, row, how) : convert<float>(to, *p, row, how);
}

int mbperf_stack(const char* const* rows, int64_t count, char* out, int64_t row_bytes) {
  return launch_stack(rows, count, out, row_bytes, nullptr);
}

int mbperf_roof(const Roof* roof) { return launch_roof(*roof, nullptr); }
}
