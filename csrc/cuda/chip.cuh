// The instructions that kernels use beyond CUDA C++: conversions, exponentials, clusters. Compiled by g++,
// the same names come from host_shim, which runs a kernel's threads one after the other on the CPU.
#pragma once

#include "cuda/cross_entropy/problem.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernel_assert.cuh"

namespace mbperf::cuda {

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
// Two numbers rounded to nearest even in one instruction, the first in the lower half.
__device__ __forceinline__ uint32_t pair_of_bfloat16(float a, float b) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(a, b));
}
__device__ __forceinline__ uint32_t pair_of_float16(float a, float b) {
  return bits_as<uint32_t>(__floats2half2_rn(a, b));
}

// One multiplication and one instruction of the special function unit, within 2 units in the last place near
// 0: expf would take twice the instructions, and at 2 bytes a logit these kernels are close to issue-bound.
__device__ __forceinline__ float exp_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ uint4 mbperf_shared_memory[];
  return reinterpret_cast<T*>(mbperf_shared_memory);
}

// Blocks of a cluster have consecutive blockIdx.x. Before compute capability 9.0 every block is alone; the
// launch asks for clusters only where this was compiled for 9.0 or later.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
template <class T>
__device__ __forceinline__ T* shared_memory_of(T* mine, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
}
#else
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ T* shared_memory_of(T* mine, unsigned) {
  return mine;
}
#endif

}  // namespace mbperf::cuda
#else
#include "cuda/host_shim/chip.h"
#endif

namespace mbperf::cuda {

// How a thread holds 16 bytes of logits S, and how it widens and rounds them.
template <class S>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int kSize = 4;
  static __device__ __forceinline__ float lowest() { return -INFINITY; }
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
  static __device__ __forceinline__ void unpack(uint4 raw, float (&v)[4]) {
    v[0] = bits_as<float>(raw.x);
    v[1] = bits_as<float>(raw.y);
    v[2] = bits_as<float>(raw.z);
    v[3] = bits_as<float>(raw.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&v)[4]) {
    return {bits_as<uint32_t>(v[0]), bits_as<uint32_t>(v[1]), bits_as<uint32_t>(v[2]),
            bits_as<uint32_t>(v[3])};
  }
};

template <>
struct Vector<double> {
  static constexpr int kSize = 2;
  static __device__ __forceinline__ double lowest() { return -INFINITY; }
  static __device__ __forceinline__ double widen(double x) { return x; }
  static __device__ __forceinline__ double narrow(double x) { return x; }
  static __device__ __forceinline__ void unpack(uint4 raw, double (&v)[2]) {
    v[0] = bits_as<double>(uint64_t(raw.y) << 32 | raw.x);
    v[1] = bits_as<double>(uint64_t(raw.w) << 32 | raw.z);
  }
  static __device__ __forceinline__ uint4 pack(const double (&v)[2]) {
    const uint64_t a = bits_as<uint64_t>(v[0]), b = bits_as<uint64_t>(v[1]);
    return {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)};
  }
};

template <>
struct Vector<BFloat16> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ BFloat16 lowest() { return {0xff80}; }
  static __device__ __forceinline__ float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
  static __device__ __forceinline__ BFloat16 narrow(float x) { return {uint16_t(pair_of_bfloat16(x, 0))}; }
  static __device__ __forceinline__ void unpack(uint4 raw, float (&v)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = bits_as<float>(words[i] << 16);
      v[2 * i + 1] = bits_as<float>(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return {pair_of_bfloat16(v[0], v[1]), pair_of_bfloat16(v[2], v[3]), pair_of_bfloat16(v[4], v[5]),
            pair_of_bfloat16(v[6], v[7])};
  }
};

template <>
struct Vector<Float16> {
  static constexpr int kSize = 8;
  static __device__ __forceinline__ Float16 lowest() { return {0xfc00}; }
  static __device__ __forceinline__ float widen(Float16 x) { return half_to_float(x.bits); }
  static __device__ __forceinline__ Float16 narrow(float x) { return {uint16_t(pair_of_float16(x, 0))}; }
  static __device__ __forceinline__ void unpack(uint4 raw, float (&v)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = half_to_float(uint16_t(words[i]));
      v[2 * i + 1] = half_to_float(uint16_t(words[i] >> 16));
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return {pair_of_float16(v[0], v[1]), pair_of_float16(v[2], v[3]), pair_of_float16(v[4], v[5]),
            pair_of_float16(v[6], v[7])};
  }
};

// Classes [first, first + kSize) of a row of n at x; those outside the row are `lowest` and never read.
template <class S>
__device__ __forceinline__ uint4 load_vector(const S* x, int64_t first, int64_t n) {
  constexpr int E = Vector<S>::kSize;
  if (first >= 0 && first + E <= n) return *reinterpret_cast<const uint4*>(x + first);
  struct Elements {
    S at[E];
  } part;
#pragma unroll
  for (int e = 0; e < E; ++e)
    part.at[e] = first + e >= 0 && first + e < n ? x[first + e] : Vector<S>::lowest();
  return bits_as<uint4>(part);
}

template <class S>
__device__ __forceinline__ void store_vector(S* x, int64_t first, int64_t n, uint4 raw) {
  constexpr int E = Vector<S>::kSize;
  if (first >= 0 && first + E <= n) {
    *reinterpret_cast<uint4*>(x + first) = raw;
    return;
  }
  struct Elements {
    S at[E];
  };
  const Elements part = bits_as<Elements>(raw);
#pragma unroll
  for (int e = 0; e < E; ++e)
    if (first + e >= 0 && first + e < n) x[first + e] = part.at[e];
}

}  // namespace mbperf::cuda
