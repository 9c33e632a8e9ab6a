#include "runtime.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "huge_pages.h"

namespace fastbert {

extern const Kernels kernels_baseline;
#ifdef FASTBERT_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef FASTBERT_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef FASTBERT_HAVE_AVX512BF16
extern const Kernels kernels_avx512bf16;
#endif

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#if defined(FASTBERT_HAVE_AVX2) || defined(FASTBERT_HAVE_AVX512) || defined(FASTBERT_HAVE_AVX512BF16)
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("bmi2");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef FASTBERT_HAVE_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
#endif
#ifdef FASTBERT_HAVE_AVX512
  if (avx512) found.push_back(&kernels_avx512);
#endif
#ifdef FASTBERT_HAVE_AVX2
  if (avx2) found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_baseline);
  return found;
}

static const Kernels* choose() {
  static const char* const order[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  const auto rank = [](const std::string& name) {
    for (int i = 0; i < 4; ++i)
      if (name == order[i]) return i;
    return -1;
  };
  const char* limit = std::getenv("FASTBERT_CPU_ISA");
  const bool limited = limit != nullptr && *limit != '\0';
  if (limited && rank(limit) < 0)
    throw std::runtime_error("FASTBERT_CPU_ISA is '" + std::string(limit) +
                             "'; allowed are baseline, avx2, avx512 and avx512bf16");
  const std::vector<const Kernels*> found = supported_kernels();
  for (const Kernels* k : found)
    if (!limited || rank(k->isa) <= rank(limit)) return k;
  return found.back();
}

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

// When the library is loaded, not at the first kernel: PyTorch's threads may be in use before that.
static std::atomic<bool> forked{false};
[[maybe_unused]] static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

Executor executor() {
  const int workers = forked ? 1 : static_cast<int>(torch::stable::get_num_threads());
  return {workers, [](int n, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
            });
          }};
}

constexpr int64_t kKeptBytes = 64 << 20;

void* scratch(ScratchSlot slot, int64_t bytes) {
  struct Slot {
    void* data = nullptr;
    int64_t size = 0;
    ~Slot() { std::free(data); }
  };
  static thread_local Slot slots[kScratchSlots];
  Slot& s = slots[slot];
  // The states of one huge batch in inference go when a usual one comes.
  if (s.size < bytes || (slot == kScratchLayer && s.size > kKeptBytes && bytes <= kKeptBytes)) {
    std::free(s.data);
    s.size = (bytes + 4095) / 4096 * 4096;
    s.data = std::aligned_alloc(64, static_cast<size_t>(s.size));
    if (s.data == nullptr) {
      s.size = 0;
      throw std::bad_alloc();
    }
    prefer_huge_pages(s.data, s.size);
  }
  return s.data;
}

}  // namespace fastbert
