// See threads.h. A fiber starts by setcontext and is switched by setjmp, which saves no signal mask: the
// system call that swapcontext makes would be most of the time.
#include "cuda/host_shim/threads.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace mbperf::host_shim {
namespace {

constexpr size_t kStackBytes = size_t{64} << 10;
constexpr unsigned kWarpLanes = 32;
constexpr unsigned char kPoison = 0xff;  // NaN in every dtype: shared memory starts undefined
constexpr size_t kGuardSlots = 4;

struct Machine {
  Launch launch{};
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;  // of the cluster that is running
  Barrier cluster;
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<char[]>> stacks;
  Fiber* current = nullptr;
  uint64_t progress = 0;  // arrivals and ends: a round without any is a deadlock
  jmp_buf scheduler;
  int order = 0;
  std::string error;
};

Machine machine;

void yield() {
  if (_setjmp(machine.current->state) == 0) _longjmp(machine.scheduler, 1);
}

unsigned arrive(Barrier& barrier, unsigned expected) {
  ++machine.progress;
  const unsigned token = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return token;
}

void wait(const Barrier& barrier, unsigned token) {
  while (barrier.generation == token) yield();
}

unsigned threads_a_block() { return machine.launch.threads_x * machine.launch.threads_y; }

void fiber_main() {
  (*machine.kernel)();
  machine.current->done = true;
  ++machine.progress;
  _longjmp(machine.scheduler, 1);
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void prepare_block(unsigned rank, unsigned index) {
  Block& block = machine.blocks[rank];
  block.index = {index, 0, 0};
  block.barrier = {};
  const size_t slots = (machine.launch.shared_bytes + sizeof(Slot) - 1) / sizeof(Slot) + kGuardSlots;
  block.shared.resize(slots);
  std::memset(block.shared.data(), kPoison, slots * sizeof(Slot));
  block.warps.assign((threads_a_block() + kWarpLanes - 1) / kWarpLanes, Warp{});
  for (unsigned t = 0; t < threads_a_block(); ++t) {
    Fiber& fiber = machine.fibers[rank * threads_a_block() + t];
    fiber.thread = {t % machine.launch.threads_x, t / machine.launch.threads_x, 0};
    fiber.block = &block;
    fiber.linear = t;
    fiber.shuffles = fiber.cluster_token = 0;
    fiber.started = fiber.done = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack = {machine.stacks[rank * threads_a_block() + t].get(), 0, kStackBytes};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
}

std::vector<Fiber*> running_order() {
  std::vector<Fiber*> order;
  for (Fiber& fiber : machine.fibers) order.push_back(&fiber);
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order == 2) std::rotate(order.begin(), order.begin() + long(order.size() / 2), order.end());
  return order;
}

bool guards_are_whole() {
  const size_t bytes = machine.launch.shared_bytes;
  for (const Block& block : machine.blocks) {
    const auto* const p = reinterpret_cast<const unsigned char*>(block.shared.data());
    for (size_t i = bytes; i < block.shared.size() * sizeof(Slot); ++i)
      if (p[i] != kPoison) return false;
  }
  return true;
}

void run_cluster() {
  const std::vector<Fiber*> order = running_order();
  for (size_t left = order.size(); left > 0;) {
    const uint64_t before = machine.progress;
    for (Fiber* fiber : order) {
      if (fiber->done) continue;
      resume(*fiber);
      if (!machine.error.empty()) return;
      left -= fiber->done;
    }
    if (machine.progress == before) {
      machine.error = "deadlock: threads wait at a barrier that others never reach";
      return;
    }
  }
  if (!guards_are_whole()) machine.error = "shared memory was written beyond what the launch asked for";
}

}  // namespace

int run(const Launch& launch, const std::function<void()>& kernel) {
  machine.launch = launch;
  machine.kernel = &kernel;
  machine.error.clear();
  if (launch.blocks == 0 || launch.blocks % launch.cluster != 0 || threads_a_block() > 1024) {
    machine.error = "a launch that no chip takes";
    return 1;
  }
  machine.blocks.resize(launch.cluster);
  machine.fibers.resize(size_t{launch.cluster} * threads_a_block());
  while (machine.stacks.size() < machine.fibers.size())
    machine.stacks.emplace_back(new char[kStackBytes]);  // untouched pages cost nothing
  for (unsigned first = 0; first < launch.blocks && machine.error.empty(); first += launch.cluster) {
    machine.cluster = {};
    for (unsigned rank = 0; rank < launch.cluster; ++rank) prepare_block(rank, first + rank);
    run_cluster();
  }
  return machine.error.empty() ? 0 : 1;
}

void set_order(int order) { machine.order = order; }
const char* last_error() { return machine.error.c_str(); }

void fail(const std::string& what) {
  machine.error = what;
  _longjmp(machine.scheduler, 1);
}

Fiber& self() { return *machine.current; }
const Launch& launched() { return machine.launch; }
void* shared_memory() { return self().block->shared.data(); }
unsigned cluster_rank() { return unsigned(self().block - machine.blocks.data()); }

void* shared_memory_of(void* mine, unsigned rank) {
  const auto offset = static_cast<char*>(mine) - static_cast<char*>(shared_memory());
  return reinterpret_cast<char*>(machine.blocks[rank].shared.data()) + offset;
}

void wait_for_block() { wait(self().block->barrier, arrive(self().block->barrier, threads_a_block())); }

void wait_for_lanes(unsigned mask) {
  const unsigned lane = self().linear % kWarpLanes;
  if (!(mask >> lane & 1)) fail("a lane waits for a mask that it is not in");
  Barrier& barrier = self().block->warps[self().linear / kWarpLanes].barrier[__builtin_ctz(mask)];
  wait(barrier, arrive(barrier, unsigned(__builtin_popcount(mask))));
}

void cluster_arrive() { self().cluster_token = arrive(machine.cluster, unsigned(machine.fibers.size())); }

void cluster_wait() { wait(machine.cluster, self().cluster_token); }

Slot exchanged(unsigned mask, const Slot& mine, unsigned lane) {
  Slot* const slots = self().block->warps[self().linear / kWarpLanes].slot[self().shuffles++ % 2];
  if (lane >= kWarpLanes || !(mask >> lane & 1)) fail("a shuffle asks a lane outside its mask");
  slots[self().linear % kWarpLanes] = mine;
  wait_for_lanes(mask);
  return slots[lane];
}

}  // namespace mbperf::host_shim
