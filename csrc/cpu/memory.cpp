#include "cpu/memory.h"

#include <ATen/EmptyTensor.h>
#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <vector>

namespace mbperf {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLarge = 2 * kHugePage;  // smaller buffers are the business of malloc
constexpr size_t kMostWaiting = 4;        // a loop holds one gradient and a few batches

struct Block {
  void* data;
  size_t bytes;
};

size_t in_huge_pages(size_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

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
#ifdef MADV_FREE
      (void)madvise(block.data, block.bytes, MADV_FREE);
#endif
      blocks_.push_back(block);
      if (blocks_.size() > kMostWaiting) {
        oldest = blocks_.front().data;
        blocks_.erase(blocks_.begin());
      }
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
    const size_t bytes = in_huge_pages(wanted);
    void* data = waiting_blocks().take(bytes);
    if (!data) data = fresh(bytes);
    return {data, new Block{data, bytes}, release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void* fresh(size_t bytes) {
    void* data = std::aligned_alloc(kHugePage, bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data, "mbperf: cannot allocate ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
    (void)madvise(data, bytes, MADV_HUGEPAGE);  // a hint: refused, the buffer is as good as any other
#endif
    return data;
  }
};

}  // namespace

at::Tensor empty_recycled(at::IntArrayRef sizes, at::ScalarType dtype) {
  static RecyclingAllocator* const allocator = new RecyclingAllocator;
  int64_t elements = 1;
  for (const int64_t size : sizes) elements *= size;
  if (size_t(elements) * c10::elementSize(dtype) < kLarge) return at::empty(sizes, dtype);
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype,
                                   std::nullopt);
}

}  // namespace mbperf
