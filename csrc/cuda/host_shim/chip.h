// CUDA C++ as far as the kernels use it, for g++: what chip.cuh takes from the chip, and the names of the
// language itself.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/host_shim/threads.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::mbperf::host_shim::self().thread)
#define blockIdx (::mbperf::host_shim::self().block->index)
#define blockDim                                                         \
  (::mbperf::host_shim::Index{::mbperf::host_shim::launched().threads_x, \
                              ::mbperf::host_shim::launched().threads_y, 1})
#define gridDim (::mbperf::host_shim::Index{::mbperf::host_shim::launched().blocks, 1, 1})

#define MBPERF_KERNEL_ASSERT(condition) \
  (static_cast<bool>(condition) ? void(0) : ::mbperf::host_shim::fail("assertion failed: " #condition))

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline void __syncthreads() { mbperf::host_shim::wait_for_block(); }
inline void __syncwarp(unsigned mask) { mbperf::host_shim::wait_for_lanes(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  mbperf::host_shim::Slot slot{};
  std::memcpy(&slot, &value, sizeof value);
  slot = mbperf::host_shim::exchanged(mask, slot, mbperf::host_shim::self().linear % 32 ^ unsigned(step));
  std::memcpy(&value, &slot, sizeof value);
  return value;
}

namespace mbperf::cuda {

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
  return bits_as<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

// Rounds to nearest even; NaN as CUDA writes it.
inline uint16_t float_to_half(float x) {
  const auto sign = uint16_t(bits_as<uint32_t>(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | uint16_t(std::nearbyint(size * 0x1p24f));
  const uint32_t bits = bits_as<uint32_t>(size);
  return sign | uint16_t((bits - (uint32_t{112} << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t pair_of_bfloat16(float a, float b) {
  return float_to_bfloat16(a) | uint32_t(float_to_bfloat16(b)) << 16;
}
inline uint32_t pair_of_float16(float a, float b) {
  return float_to_half(a) | uint32_t(float_to_half(b)) << 16;
}

// As on the chip: one rounded product, results below the smallest normal number are 0.
inline float exp_of(float x) {
  const float y = std::exp2(x * 1.4426950408889634f);
  return y < 0x1p-126f ? 0.0f : y;
}
inline double exp_of(double x) { return std::exp(x); }
inline float log_of(float x) { return std::log(x); }
inline double log_of(double x) { return std::log(x); }

template <class T>
T* shared_memory() {
  return static_cast<T*>(host_shim::shared_memory());
}
inline unsigned cluster_size() { return host_shim::launched().cluster; }
inline unsigned cluster_rank() { return host_shim::cluster_rank(); }
inline void cluster_arrive() { host_shim::cluster_arrive(); }
inline void cluster_wait() { host_shim::cluster_wait(); }
template <class T>
T* shared_memory_of(T* mine, unsigned rank) {
  return static_cast<T*>(host_shim::shared_memory_of(mine, rank));
}

}  // namespace mbperf::cuda
