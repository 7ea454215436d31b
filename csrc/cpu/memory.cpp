#include "cpu/memory.h"

#include <ATen/EmptyTensor.h>
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <vector>

namespace mbperf {
namespace {

constexpr size_t kPage = size_t{4} << 10;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSmallest = size_t{128} << 10;  // below, malloc does not go to the kernel either
constexpr size_t kHuge = 2 * kHugePage;          // from here on rounding up to huge pages wastes little
constexpr size_t kMostWaiting = 4;               // a loop holds one gradient and a few batches
// Beyond this many waiting bytes the kernel may take a block back whenever it needs memory. Not below: saying
// so costs 7 us a MB here, a seventh of what it takes to fill the block.
constexpr size_t kKept = size_t{256} << 20;

struct Block {
  void* data;
  size_t bytes;
};

size_t page_size(size_t bytes) { return bytes < kHuge ? kPage : kHugePage; }

class WaitingBlocks {
 public:
  // A block of exactly that many bytes, or nullptr.
  void* take(size_t bytes) {
    // Only tried: in a child forked while another thread held the lock it would never be released.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (size_t i = blocks_.size(); i-- > 0;)
      if (blocks_[i].bytes == bytes) {
        void* data = blocks_[i].data;
        blocks_.erase(blocks_.begin() + ptrdiff_t(i));
        return data;
      }
    return nullptr;
  }

  void put(Block block) {
    void* oldest = nullptr;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock) return std::free(block.data);
      blocks_.push_back(block);
      if (blocks_.size() > kMostWaiting) {
        oldest = blocks_.front().data;
        blocks_.erase(blocks_.begin());
      }
#ifdef MADV_FREE
      size_t waiting = 0;
      for (const Block& b : blocks_) waiting += b.bytes;
      if (waiting > kKept) (void)madvise(block.data, block.bytes, MADV_FREE);
#endif
    }
    std::free(oldest);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;  // oldest first
};

WaitingBlocks& waiting_blocks() {
  static WaitingBlocks* blocks = new WaitingBlocks;  // outlives every tensor
  return *blocks;
}

void release(void* context) {
  Block* block = static_cast<Block*>(context);
  waiting_blocks().put(*block);
  delete block;
}

struct RecyclingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t wanted) override {
    const size_t page = page_size(wanted), bytes = (wanted + page - 1) / page * page;
    void* data = waiting_blocks().take(bytes);
    if (!data) data = fresh(bytes);
    return {data, new Block{data, bytes}, release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void* fresh(size_t bytes) {
    void* data = std::aligned_alloc(page_size(bytes), bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data, "mbperf: cannot allocate ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
    // A hint: refused, the buffer is as good as any other.
    if (bytes >= kHuge) (void)madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }
};

}  // namespace

at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  static RecyclingAllocator* const allocator = new RecyclingAllocator;
  int64_t elements = 1;
  for (const int64_t size : sizes) elements *= size;
  if (size_t(elements) * c10::elementSize(dtype) < kSmallest)
    return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format);
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   format);
}

}  // namespace mbperf
