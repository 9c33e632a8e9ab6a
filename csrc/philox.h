// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), scalar form, usable on host and device.
// The vector forms in cpu/ and the ones in Triton must produce these very numbers.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTBERT_HOST_DEVICE __host__ __device__
#else
#define FASTBERT_HOST_DEVICE
#endif

namespace fastbert {

// Fourth counter word: which family of elements a stream belongs to, so that no two share numbers.
enum PhiloxStream : uint32_t { kStreamAttention = 0, kStreamRows = 1 };

struct Philox4 {
  uint32_t word[4];
};

FASTBERT_HOST_DEVICE inline Philox4 philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0), c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The halves of a call's words serve eight elements (fastbert/ops/philox.py says which), the lower half of a word first. An
// element is kept when its half, as the upper half of a word, is at least this; p in [0, 1].
FASTBERT_HOST_DEVICE inline uint32_t dropout_threshold(double p) {
  const uint32_t t = static_cast<uint32_t>(p * 65536.0 + 0.5);
  return (t < 65535u ? t : 65535u) << 16;
}
// Both halves of a word at once: bits 15 and 31, kept or not; of the others, nothing is said. Each half is compared by
// subtracting all of its bits but the uppermost, which nothing is borrowed from, and then by the uppermost bits.
FASTBERT_HOST_DEVICE inline uint32_t kept_halves(uint32_t word, uint32_t threshold) {
  const uint32_t least = threshold | threshold >> 16, top = 0x80008000u;
  const uint32_t rest = (word | top) - (least & ~top);
  return (word & rest) | (word & ~least) | (rest & ~least);
}
FASTBERT_HOST_DEVICE inline bool keeps_lower(uint32_t word, uint32_t threshold) { return word << 16 >= threshold; }
FASTBERT_HOST_DEVICE inline bool keeps_upper(uint32_t word, uint32_t threshold) { return word >= threshold; }

// What a kept element is multiplied by.
FASTBERT_HOST_DEVICE inline float dropout_scale(double p) { return p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p)); }

}  // namespace fastbert
