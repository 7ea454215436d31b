// An assertion inside a kernel that NDEBUG does not take out: an index is checked before it is dereferenced,
// and a wrong one ends the launch with "device-side assert triggered". No torch inside.
#pragma once

#if defined(__CUDA_ARCH__)
#define MBPERF_KERNEL_ASSERT(condition) \
  (static_cast<bool>(condition) ? void(0) : __assert_fail(#condition, __FILE__, __LINE__, __func__))
#elif !defined(MBPERF_KERNEL_ASSERT)
#define MBPERF_KERNEL_ASSERT(condition) void(0)  // nvcc's host pass, which never runs a kernel's body
#endif
