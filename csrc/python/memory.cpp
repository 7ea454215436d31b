// The functions by which mbperf.memory reads and steers the recycled blocks.
#include "cpu/memory.h"

#include "python/bindings.h"

namespace mbperf {
namespace {

// In the order of mbperf.memory.MemoryStats.
auto stats() {
  const MemoryStats s = memory_stats();
  return std::make_tuple(s.enabled, s.kept_bytes, s.in_use_bytes, s.peak_in_use_bytes, s.hits, s.misses);
}

}  // namespace

void bind_memory(pybind11::module_& m) {
  m.def("memory_stats", stats);
  m.def("empty_memory_cache", empty_memory_cache);
}

}  // namespace mbperf
