#include "cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

namespace mbperf {
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr size_t kWorthIt = 2 * kHugePage;  // below, no aligned huge page may lie inside

}  // namespace

at::Tensor empty_on_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  const size_t bytes = tensor.nbytes();
  if (bytes >= kWorthIt) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
    // A hint: where it is refused the buffer is as good as any other.
    if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return tensor;
}

int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
    const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (reported > 0) return int64_t{reported};
#endif
    return int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace mbperf
