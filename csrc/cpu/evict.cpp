// Takes lines of memory out of every cache, so that whoever reads them next waits for memory, whatever the
// caches hold. Source: Intel SDM vol. 2A, CLFLUSH and CLFLUSHOPT: from all levels, of every core.
// A line takes 0.6 to 2.5 ns on Zen 4; reading 64 MiB, twice its last cache, takes 2 ms, as much as evicting
// 100 MB, and the caches of other machines are up to 36 times larger.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#include <immintrin.h>
#endif

namespace mbperf {
namespace {

struct Range {
  uintptr_t begin, end;  // of addresses
};

// From the first to the last element, with what strides leave out between them.
Range range_of(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * tensor.element_size())};
}

#if defined(__x86_64__)
constexpr uintptr_t kLine = 64;

bool has_clflushopt() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 23 & 1);
}

__attribute__((target("clflushopt"))) void evict_unordered(Range range) {
  for (uintptr_t at = range.begin & -kLine; at < range.end; at += kLine)
    _mm_clflushopt(reinterpret_cast<void*>(at));
}

void evict_in_order(Range range) {
  for (uintptr_t at = range.begin & -kLine; at < range.end; at += kLine)
    _mm_clflush(reinterpret_cast<const void*>(at));
}

// Returns whether the processor has an instruction for it; without one nothing happens.
bool evict_cpu(at::TensorList tensors) {
  static const auto evict = has_clflushopt() ? evict_unordered : evict_in_order;
  for (const at::Tensor& tensor : tensors) evict(range_of(tensor));
  _mm_mfence();  // no later read may overtake
  return true;
}
#else
bool evict_cpu(at::TensorList) { return false; }
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(mbperf, m) { m.def("evict(Tensor[] tensors) -> bool"); }

// An empty list has no backend to choose by.
TORCH_LIBRARY_IMPL(mbperf, CompositeExplicitAutograd, m) { m.impl("evict", evict_cpu); }

}  // namespace mbperf
