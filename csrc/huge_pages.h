// Large memory that will be written whole: the faults on its 4 KiB pages can cost more than the writing.
#pragma once
#include <sys/mman.h>

#include <cstdint>

namespace fastbert {

// Asks for huge pages, also for the two at the ends, of which other data have a part: weight gradients of a few megabytes lie
// in the allocator's heap, which is given back and faulted in anew at every step. Advice: without them nothing changes but
// the time.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < static_cast<int64_t>(kPage / 2)) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory), end = start + static_cast<uintptr_t>(bytes);
  const uintptr_t first = start / kPage * kPage, last = (end + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastbert
