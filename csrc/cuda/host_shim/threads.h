// A kernel's threads on the CPU: a fiber each, switched where CUDA lets threads wait for one another. Blocks
// run one after the other, those of a cluster together. Threads that do not meet, shared memory that is not
// there and lanes that are not asked are failures here, where a chip may let them pass.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace mbperf::host_shim {

struct Index {
  unsigned x, y, z;
};

struct Launch {
  unsigned blocks, threads_x, threads_y;
  size_t shared_bytes;
  unsigned cluster;
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct alignas(16) Slot {
  unsigned char bytes[16];
};

struct Warp {
  Barrier barrier[32];  // by the first lane of a mask
  Slot slot[2][32];     // two, so that a fast lane's next value does not meet a slow lane's reading
};

struct Block {
  Index index;
  std::vector<Slot> shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  Index thread;
  Block* block;
  unsigned linear, shuffles = 0, cluster_token = 0;
  bool started = false, done = false;
  ucontext_t start;
  jmp_buf state;
};

// Runs every thread of every block; 0, or 1 after a failure that last_error() tells.
int run(const Launch& launch, const std::function<void()>& kernel);

// Threads run upwards (0), downwards (1) or from the middle outwards (2): a result that depends on it shows a
// race.
void set_order(int order);
const char* last_error();

[[noreturn]] void fail(const std::string& what);

Fiber& self();
const Launch& launched();
void* shared_memory();
void* shared_memory_of(void* mine, unsigned rank);
unsigned cluster_rank();
void wait_for_block();
void wait_for_lanes(unsigned mask);
void cluster_arrive();
void cluster_wait();
// The value that `lane` of the caller's warp brings to the same call.
Slot exchanged(unsigned mask, const Slot& mine, unsigned lane);

}  // namespace mbperf::host_shim
