#include "cpu/memory.h"

#include <ATen/EmptyTensor.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(data, bytes) ((void)(data), (void)(bytes))
#endif

namespace mbperf {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kPage = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallest = size_t{128} << 10;  // below, malloc does not go to the kernel either
constexpr size_t kHuge = 2 * kHugePage;          // from here on rounding up to huge pages wastes little
// Row counts between 400 and 641, or 512 +- 60: half finds a block for 98 to 100 of 100 requests, three
// quarters for 52 to 62. A miss costs as much again as the gradient itself.
constexpr size_t kMostTimesWanted = 2;
constexpr size_t kKeptUnproven = size_t{256} << 20;
// A step that takes longer does not notice that 64 MB are cleared in 6 ms.
constexpr auto kIdle = std::chrono::seconds(10);

size_t round_up(size_t bytes, size_t page) { return (bytes + page - 1) / page * page; }

struct Block {
  char* data;
  size_t bytes;
  bool wanted_again;  // was asked for after one like it had been turned away, or has waited before
  Clock::time_point since{};
};

char* map(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : static_cast<char*>(data);
}

void unmap(const Block& block) {
  ASAN_UNPOISON_MEMORY_REGION(block.data, block.bytes);
  munmap(block.data, block.bytes);
}

// Fresh pages that begin at the edge of a huge page, or nullptr.
char* map_huge(size_t bytes) {
  char* const data = map(bytes + kHugePage);
  if (!data) return nullptr;
  const size_t before = round_up(size_t(data), kHugePage) - size_t(data);
  if (before > 0) munmap(data, before);
  munmap(data + before + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  // A hint: refused, the buffer is as good as any other.
  (void)madvise(data + before, bytes, MADV_HUGEPAGE);
#endif
  return data + before;
}

bool cache_enabled() {
  static const bool enabled = [] {
    const char* value = std::getenv("MBPERF_MEMORY_CACHE");
    const std::string asked = value ? value : "1";
    TORCH_CHECK_VALUE(asked == "0" || asked == "1", "mbperf: MBPERF_MEMORY_CACHE expects 0 or 1, got '",
                      asked, "'");
    return asked == "1";
  }();
  return enabled;
}

class BlockCache {
 public:
  // A block of at least that many bytes: one that waited, or fresh pages.
  Block take(size_t wanted) {
    const size_t bytes = round_up(wanted, wanted < kHuge ? kPage : kHugePage);
    const std::optional<Block> waiting = take_waiting(bytes);
    const Block block = waiting ? *waiting : fresh(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    ++(waiting ? hits_ : misses_);
    if (!waiting) missed_ = bytes;
    in_use_ += block.bytes;
    peak_ = std::max(peak_, in_use_);
    return block;
  }

  void put(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.bytes;
    const Clock::time_point now = Clock::now();
    give_back_idle(now);
    if (!cache_enabled()) return unmap(block);
    if (!block.wanted_again && kept_ + block.bytes > kKeptUnproven) {
      turned_away_ = now;
      return unmap(block);
    }
    ASAN_POISON_MEMORY_REGION(block.data, block.bytes);
#ifdef MADV_FREE
    // With huge pages 0.4 to 0.8 us a MB, a hundredth of filling the block; with small ones 12 to 29.
    if (block.bytes >= kHuge) (void)madvise(block.data, block.bytes, MADV_FREE);
#endif
    block.wanted_again = true;
    block.since = now;
    add(block);
    while (kept_ > peak_) unmap(remove(least_useful()));
  }

  // Called with every request that malloc serves.
  void notice_time() {
    if (!any_.load(std::memory_order_relaxed)) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    give_back_idle(Clock::now());
  }

  void give_back_all() {
    const std::lock_guard<std::mutex> lock(mutex_);
    clear();
  }

  MemoryStats stats() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {cache_enabled(), kept_, in_use_, peak_, hits_, misses_};
  }

  void before_fork() {
    mutex_.lock();  // a child that is forked while another thread holds it would wait forever
    clear();
  }
  void after_fork() { mutex_.unlock(); }

 private:
  using Blocks = std::vector<Block>;

  std::optional<Block> take_waiting(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    give_back_idle(Clock::now());
    const auto found = best_fit(bytes);
    if (found == blocks_.end()) return std::nullopt;
    const Block block = remove(found);
    ASAN_UNPOISON_MEMORY_REGION(block.data, block.bytes);
    return block;
  }

  Blocks::iterator best_fit(size_t bytes) {
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= kMostTimesWanted * bytes &&
          (best == blocks_.end() || block->bytes <= best->bytes))
        best = block;  // of equals the last to come: it may still be in a cache
    return best;
  }

  // Of the waiting blocks one that was too small for the last request that found none, where what was made
  // for that one serves in its place; else the one that has waited longest. By age alone, a loop over results
  // of 530 to 641 rows, each alive until the next is there, dropped a large block for a small one in every
  // step.
  Blocks::iterator least_useful() {
    const auto outgrown = std::find_if(blocks_.begin(), blocks_.end(), [this](const Block& block) {
      return block.bytes < missed_ && missed_ <= kMostTimesWanted * block.bytes;
    });
    return outgrown == blocks_.end() ? blocks_.begin() : outgrown;
  }

  Block fresh(size_t bytes) {
    const auto pages = bytes < kHuge ? map : map_huge;
    char* data = pages(bytes);
    if (!data) {
      give_back_all();  // under a limit on address space they stand in the way
      data = pages(bytes);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data, "mbperf: cannot allocate ", bytes, " bytes");
    return {data, bytes, was_turned_away()};
  }

  // Whether a block was given back so lately that this request may belong to the same loop.
  bool was_turned_away() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return Clock::now() - turned_away_ < kIdle;
  }

  void add(const Block& block) {
    blocks_.push_back(block);
    kept_ += block.bytes;
    any_.store(true, std::memory_order_relaxed);
  }

  Block remove(Blocks::iterator place) {
    const Block block = *place;
    blocks_.erase(place);
    kept_ -= block.bytes;
    any_.store(!blocks_.empty(), std::memory_order_relaxed);
    return block;
  }

  void give_back_idle(Clock::time_point now) {
    while (!blocks_.empty() && now - blocks_.front().since > kIdle) unmap(remove(blocks_.begin()));
  }

  void clear() {
    while (!blocks_.empty()) unmap(remove(blocks_.end() - 1));
  }

  std::mutex mutex_;
  Blocks blocks_;  // in the order of their release
  std::atomic<bool> any_{false};
  size_t kept_ = 0, in_use_ = 0, peak_ = 0, hits_ = 0, misses_ = 0;
  size_t missed_ = 0;  // bytes of the last request that found no block
  Clock::time_point turned_away_{};
};

BlockCache& cache() {
  static BlockCache* const blocks = [] {
    pthread_atfork([] { cache().before_fork(); }, [] { cache().after_fork(); }, [] { cache().after_fork(); });
    return new BlockCache;  // outlives every tensor
  }();
  return *blocks;
}

void release(void* context) {
  Block* const block = static_cast<Block*>(context);
  cache().put(*block);
  delete block;
}

struct RecyclingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    Block* const block = new Block(cache().take(bytes));
    return {block->data, block, release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  static RecyclingAllocator* const allocator = new RecyclingAllocator;
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  // Fresh small pages on every call would be several times slower than malloc's used ones.
  if (bytes < (cache_enabled() ? kSmallest : kHuge)) {
    cache().notice_time();
    return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format);
  }
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   format);
}

MemoryStats memory_stats() { return cache().stats(); }

void empty_memory_cache() { cache().give_back_all(); }

}  // namespace mbperf
