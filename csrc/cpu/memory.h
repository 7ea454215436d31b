// Large result buffers: on huge pages, and used again.
#pragma once

#include <ATen/core/Tensor.h>

namespace mbperf {

// at::empty for results that a loop makes in every step. The kernel's clearing of 64 MB of fresh pages takes
// as long as computing a gradient into them, so that the block of a freed tensor waits for the next request.
//
// - A request below 128 KB is malloc's. From 128 KB on a result has a block of its own, from 4 MB on with
// huge
//   pages.
// - A waiting block serves a request that needs at least half of it; of several the smallest does.
// - All waiting blocks together are at most as large as all blocks in use together ever were. Beyond that the
//   one that a later, larger one replaces goes, else the oldest.
// - Beyond 256 MB a block waits only where another one was asked for within 10 s of turning such a block
// away.
// - A block that no request has taken for 10 s is given back. No thread watches the clock: the next request
//   of any size, or the next release of a block, does.
// - A waiting block of 4 MB or more is marked MADV_FREE: the kernel takes its pages, and those that a smaller
//   result leaves untouched, before it swaps or kills, under a cgroup's limit as well. This needs no call.
// - A fork gives all waiting blocks back first, so that neither side copies pages nobody will read.
//
// MBPERF_MEMORY_CACHE=0 in the environment of the first call turns the waiting off, not the huge pages.
at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype,
                          at::MemoryFormat format = at::MemoryFormat::Contiguous);

struct MemoryStats {
  bool enabled;
  size_t kept_bytes, in_use_bytes, peak_in_use_bytes;
  size_t hits, misses;  // requests of 128 KB or more, served by a waiting block or not
};

MemoryStats memory_stats();

// Gives all waiting blocks back to the system.
void empty_memory_cache();

}  // namespace mbperf
