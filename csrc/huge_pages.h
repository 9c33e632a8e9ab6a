// Large memory that will be written whole: the faults on its 4 KiB pages can cost more than the writing.
#pragma once
#include <sys/mman.h>

#include <cstdint>

namespace fastbert {

// Asks for huge pages where some fit. Advice: without them nothing changes but the time.
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < static_cast<int64_t>(2 * kPage)) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory), end = start + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastbert
