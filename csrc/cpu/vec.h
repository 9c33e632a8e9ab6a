// The vector type every CPU kernel is written over: VLEN floats, in the compiler's own vector extension, so that one
// source serves each instruction set. Everything lives in a namespace named after the ISA: two builds of one inline
// function must never be merged by the linker, or a machine without AVX-512 would run the AVX-512 one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "../philox.h"

#ifndef FASTBERT_ISA
#define FASTBERT_ISA baseline
#endif

#if defined(__AVX512F__)
#define FASTBERT_VLEN 16
#define FASTBERT_VREGS 32
#elif defined(__AVX2__)
#define FASTBERT_VLEN 8
#define FASTBERT_VREGS 16
#elif defined(__aarch64__)
#define FASTBERT_VLEN 4
#define FASTBERT_VREGS 32
#else
#define FASTBERT_VLEN 4
#define FASTBERT_VREGS 16
#endif

#define FASTBERT_INLINE inline __attribute__((always_inline))

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int VLEN = FASTBERT_VLEN;

typedef float vf __attribute__((vector_size(VLEN * 4)));
typedef int32_t vi __attribute__((vector_size(VLEN * 4)));
typedef uint32_t vu __attribute__((vector_size(VLEN * 4)));
typedef uint16_t vh __attribute__((vector_size(VLEN * 2)));
typedef float vf_unaligned __attribute__((vector_size(VLEN * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(VLEN * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

FASTBERT_INLINE vf splat(float x) { return vf{} + x; }
FASTBERT_INLINE vu splat_u(uint32_t x) { return vu{} + x; }

// Lane numbers 0, 1, 2, ...
FASTBERT_INLINE vi iota() {
  vi v;
  for (int i = 0; i < VLEN; ++i) v[i] = i;
  return v;
}

// Both keep a NaN in `x` (the comparison is false), so that bad input stays visible.
FASTBERT_INLINE vf at_least(vf x, vf low) { return x < low ? low : x; }
FASTBERT_INLINE vf at_most(vf x, vf high) { return x > high ? high : x; }

FASTBERT_INLINE float to_float(float x) { return x; }
FASTBERT_INLINE float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

FASTBERT_INLINE void from_float(float x, float* out) { *out = x; }
FASTBERT_INLINE void from_float(float x, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out->bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u
                                                                    : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

FASTBERT_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
FASTBERT_INLINE vf load(const bf16* p) {
  const vh h = *reinterpret_cast<const vh_unaligned*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
}

FASTBERT_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
FASTBERT_INLINE void store(bf16* p, vf v) {
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu bits = v == v ? rounded : ((u >> 16) | 0x40u);
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
}

// The first n of VLEN elements; the rest of the vector is zero, the rest of memory untouched.
template <class T>
FASTBERT_INLINE vf load_n(const T* p, int64_t n) {
  if (n >= VLEN) return load(p);
  T part[VLEN] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class T>
FASTBERT_INLINE void store_n(T* p, vf v, int64_t n) {
  if (n >= VLEN) return store(p, v);
  T part[VLEN];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// Lanes i and i ^ w change places.
FASTBERT_INLINE vf swap_lanes(vf v, int w) { return __builtin_shuffle(v, iota() ^ w); }

FASTBERT_INLINE float sum(vf v) {
#pragma GCC unroll 4
  for (int w = VLEN / 2; w > 0; w /= 2) v += swap_lanes(v, w);
  return v[0];
}
FASTBERT_INLINE float max(vf v) {
#pragma GCC unroll 4
  for (int w = VLEN / 2; w > 0; w /= 2) {
    const vf other = swap_lanes(v, w);
    v = v < other ? other : v;
  }
  return v[0];
}

// e^x to about one unit in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, minimax polynomial of degree 6 for e^r.
FASTBERT_INLINE vf exp(vf x) {
  const vf bounded = at_most(at_least(x, splat(-104.0f)), splat(89.0f));
  const vf shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const vf n = shifted - 12582912.0f;
  const vf r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
  vf p = splat(1.3814466e-3f);
  p = p * r + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, so that results below the smallest normal number come out right and above the largest infinite.
  const vi e = reinterpret_cast<vi>(shifted) - 0x4B400000;
  const vi half = e >> 1;
  const vf f0 = reinterpret_cast<vf>((half + 127) << 23), f1 = reinterpret_cast<vf>((e - half + 127) << 23);
  return p * f0 * f1;
}

// Exact GELU x Phi(x) and its parts. Phi(-|x|) = e^(-x^2/2) g(1 / (1 + 0.3 |x|)), g a polynomial fitted for smallest relative
// error on |x| <= 6 (4e-8): no cancellation on the negative side, and the exponential also serves the derivative.
struct NormalCdf {
  vf cdf;      // Phi(x)
  vf density;  // phi(x)
};

FASTBERT_INLINE NormalCdf normal_cdf(vf x) {
  const vf e = exp(x * x * -0.5f);
  const vf z = 1.0f / (1.0f + 0.3f * (x < 0.0f ? -x : x));
  vf g = splat(3.6097374e-2f);
  g = g * z - 1.5811959e-1f;
  g = g * z + 2.0603971e-1f;
  g = g * z - 5.1073913e-2f;
  g = g * z + 1.2550478e-1f;
  g = g * z + 1.0155070e-1f;
  g = g * z + 1.2032826e-1f;
  g = g * z + 1.1967269e-1f;
  const vf tail = g * z * e;
  return {x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

FASTBERT_INLINE vf gelu(vf x) { return x * normal_cdf(x).cdf; }
FASTBERT_INLINE vf gelu_grad(vf x) {
  const NormalCdf n = normal_cdf(x);
  return n.cdf + x * n.density;
}

// A quarter of an element each: word w of lane i belongs to counter c0 + i. Four vectors, one per word.
struct PhiloxWords {
  vu word[4];
};

FASTBERT_INLINE void mul_wide(vu a, uint32_t m, vu* hi, vu* lo) {
  typedef uint64_t vq __attribute__((vector_size(VLEN * 4)));
  const vq wide = reinterpret_cast<vq>(a);
  const vq even = (wide & 0xffffffffull) * static_cast<uint64_t>(m), odd = (wide >> 32) * static_cast<uint64_t>(m);
  *hi = reinterpret_cast<vu>((even >> 32) | (odd & 0xffffffff00000000ull));
  *lo = reinterpret_cast<vu>((even & 0xffffffffull) | (odd << 32));
}

FASTBERT_INLINE PhiloxWords philox(uint64_t seed, uint32_t first, uint32_t c1_, uint32_t c2_, uint32_t c3_) {
  vu c0 = reinterpret_cast<vu>(iota()) + first, c1 = splat_u(c1_), c2 = splat_u(c2_), c3 = splat_u(c3_);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu hi0, lo0, hi1, lo1;
    mul_wide(c0, 0xD2511F53u, &hi0, &lo0);
    mul_wide(c2, 0xCD9E8D57u, &hi1, &lo1);
    const vu n0 = hi1 ^ c1 ^ k0, n2 = hi0 ^ c3 ^ k1;
    c1 = lo1, c3 = lo0, c0 = n0, c2 = n2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Dropout factors (0 or 1 / (1 - p)) of elements first .. first + n of a row, first a multiple of 4: out[0 .. n), where
// n rounded up to a multiple of 4 * VLEN must fit.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  bool active;

  void factors(float* out, int64_t first, int64_t n, uint32_t c1, uint32_t c2, uint32_t c3) const {
    for (int64_t j = 0; j < n; j += 4 * VLEN) {
      const PhiloxWords r = philox(seed, static_cast<uint32_t>((first + j) >> 2), c1, c2, c3);
      uint32_t words[4][VLEN];
      std::memcpy(words, &r, sizeof(words));
      for (int lane = 0; lane < VLEN; ++lane)
        for (int w = 0; w < 4; ++w) out[j + lane * 4 + w] = words[w][lane] >= threshold ? scale : 0.0f;
    }
  }
};

FASTBERT_INLINE Dropout make_dropout(double p, uint64_t seed) {
  return {seed, dropout_threshold(p), p >= 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p)), p > 0.0};
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
