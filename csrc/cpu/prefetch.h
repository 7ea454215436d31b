// Asking for a row of memory before it is needed: the rows of a shuffled batch lie anywhere, and when the
// processor's own prefetcher has found out where one is, the row is over.
#pragma once

#include <cstdint>

namespace mbperf {

// 64 rows of 3,136 bytes out of 157 MB: 13.5 us with two rows ahead, 19.9 us without; 5 % more where the rows
// are in the cache. Shorter rows overlap by themselves, longer ones are streams.
constexpr int64_t kRowsAhead = 2;
constexpr int64_t kLeastPrefetched = 512, kMostPrefetched = 8 * 1024;

inline bool worth_prefetching(int64_t row_bytes) {
  return row_bytes >= kLeastPrefetched && row_bytes <= kMostPrefetched;
}

inline void prefetch_row(const char* row, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  for (int64_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(row + at);
}

}  // namespace mbperf
