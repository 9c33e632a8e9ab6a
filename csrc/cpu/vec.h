// The vector type every CPU kernel is written over: VLEN floats, in the compiler's own vector extension, so that one
// source serves each instruction set. Everything lives in a namespace named after the ISA: two builds of one inline
// function must never be merged by the linker, or a machine without AVX-512 would run the AVX-512 one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header wherever it is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
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
// For lambdas of inner loops: one that stays a call keeps what it captures, accumulators too, in memory.
#define FASTBERT_INLINED __attribute__((always_inline))

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

// Not vf{} + x: that addition is really done, since it turns -0 into +0.
#if defined(__AVX512F__)
FASTBERT_INLINE vf splat(float x) { return _mm512_set1_ps(x); }
#elif defined(__AVX2__)
FASTBERT_INLINE vf splat(float x) { return _mm256_set1_ps(x); }
#else
FASTBERT_INLINE vf splat(float x) { return vf{x, x, x, x}; }
#endif
FASTBERT_INLINE vu splat_u(uint32_t x) { return vu{} + x; }

// Lane numbers 0, 1, 2, ...
FASTBERT_INLINE vi iota() {
  vi v;
  for (int i = 0; i < VLEN; ++i) v[i] = i;
  return v;
}

// Both keep a NaN in `x`, so that bad input stays visible: x86 gives the second operand if either is a NaN.
#if defined(__AVX512F__)
FASTBERT_INLINE vf at_least(vf x, vf low) { return _mm512_max_ps(low, x); }
FASTBERT_INLINE vf at_most(vf x, vf high) { return _mm512_min_ps(high, x); }
#elif defined(__AVX2__)
FASTBERT_INLINE vf at_least(vf x, vf low) { return _mm256_max_ps(low, x); }
FASTBERT_INLINE vf at_most(vf x, vf high) { return _mm256_min_ps(high, x); }
#else
FASTBERT_INLINE vf at_least(vf x, vf low) { return x < low ? low : x; }
FASTBERT_INLINE vf at_most(vf x, vf high) { return x > high ? high : x; }
#endif

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
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(v);
  std::memcpy(p, &h, sizeof(h));
#else
  const vu u = reinterpret_cast<vu>(v);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu bits = v == v ? rounded : ((u >> 16) | 0x40u);
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(bits, vh);
#endif
}

// As storing in a T and loading again leaves it.
template <class T>
FASTBERT_INLINE vf rounded(vf v) {
  T stored[VLEN];
  store(stored, v);
  return load(stored);
}
template <>
FASTBERT_INLINE vf rounded<float>(vf v) {
  return v;
}

// sum += a * b for loops that need every register: where GCC 12 may choose which of the three is overwritten, sums
// change their registers from step to step, and some are copied or spilled.
#if defined(__AVX512F__)
FASTBERT_INLINE void add_product(vf& sum, vf a, vf b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
#else
FASTBERT_INLINE void add_product(vf& sum, vf a, vf b) { sum += a * b; }
#endif

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
#if defined(__AVX512F__)
FASTBERT_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
template <>
FASTBERT_INLINE vf load_n(const float* p, int64_t n) {
  return n >= VLEN ? load(p) : _mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <>
FASTBERT_INLINE void store_n(float* p, vf v, int64_t n) {
  n >= VLEN ? store(p, v) : _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
#elif defined(__AVX2__)
template <>
FASTBERT_INLINE vf load_n(const float* p, int64_t n) {
  if (n >= VLEN) return load(p);
  const __m256i count = _mm256_set1_epi32(static_cast<int32_t>(n));
  return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
#endif

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

// e^x for x <= 88, to about one unit in the last place; exactly 0 below -87.3, where results leave the normal numbers and
// arithmetic becomes slow. x = n ln 2 + r, |r| <= ln 2 / 2, minimax polynomial of degree 6 for e^r.
FASTBERT_INLINE vf exp(vf x) {
  const vf low = splat(-87.3f);
#if defined(__AVX512F__)
  const vf n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf bounded = at_least(x, low);
  const vf shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const vf n = shifted - 12582912.0f;
#endif
  const vf r = x - n * 0.693145752f - n * 1.42860677e-6f;
  vf p = splat(1.3814466e-3f);
  p = p * r + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 0.5f;
  p = p * r * r + (r + 1.0f);
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), p, n);
#else
  const vf power = reinterpret_cast<vf>((reinterpret_cast<vi>(shifted) - (0x4B400000 - 127)) << 23);
  return x < low ? vf{} : p * power;
#endif
}

// Exact GELU x Phi(x) and its parts. Up to |x| = 1.5, Phi(x) = 1/2 + x p(x^2). Beyond, Phi(-|x|) = e^(-x^2/2) g(1 / (1 + 0.3 |x|)):
// no cancellation on the negative side, and the exponential also serves the derivative. Both polynomials are fitted for the
// smallest relative error (3e-9 of Phi, and 4e-8 on 1.5 < |x| <= 6).
struct NormalCdf {
  vf cdf;      // Phi(x)
  vf density;  // phi(x)
};

FASTBERT_INLINE NormalCdf normal_cdf(vf x) {
  const vf square = x * x, size = x < 0.0f ? -x : x;
  const vf e = exp(square * -0.5f);
  vf p = splat(3.9959130e-7f);
  p = p * square - 8.6298796e-6f;
  p = p * square + 1.1410449e-4f;
  p = p * square - 1.1861430e-3f;
  p = p * square + 9.9730100e-3f;
  p = p * square - 6.6490270e-2f;
  p = p * square + 3.9894226e-1f;
  const vf z = 1.0f / (1.0f + 0.3f * size);
  vf g = splat(3.6097374e-2f);
  g = g * z - 1.5811959e-1f;
  g = g * z + 2.0603971e-1f;
  g = g * z - 5.1073913e-2f;
  g = g * z + 1.2550478e-1f;
  g = g * z + 1.0155070e-1f;
  g = g * z + 1.2032826e-1f;
  g = g * z + 1.1967269e-1f;
  const vf tail = g * z * e;
  return {size < 1.5f ? 0.5f + x * p : x < 0.0f ? tail : 1.0f - tail, e * 0.39894228f};
}

FASTBERT_INLINE vf gelu(vf x) { return x * normal_cdf(x).cdf; }
FASTBERT_INLINE vf gelu_grad(vf x) {
  const NormalCdf n = normal_cdf(x);
  return n.cdf + x * n.density;
}

// 32 x 32 -> 64 bits in each 64-bit lane, whatever stands in the upper halves.
typedef uint64_t vq __attribute__((vector_size(VLEN * 4)));
FASTBERT_INLINE vq multiply_low(vq a, vq b) {
#if defined(__AVX512F__)
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

// The four words of VLEN counters: those of vector a, then those of b, in the lower halves of lanes; what the upper halves
// hold does not matter.
struct PhiloxWords {
  vq a[4], b[4];
};

// One counter per 64-bit lane, so that no product has to be put together from halves. Two such chains hide the latency.
FASTBERT_INLINE PhiloxWords philox(uint64_t seed, vq a0, vq b0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const vq m0 = vq{} + 0xD2511F53ull, m1 = vq{} + 0xCD9E8D57ull;
  vq a1 = vq{} + c1, a2 = vq{} + c2, a3 = vq{} + c3;
  vq b1 = a1, b2 = a2, b3 = a3;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const vq key0 = vq{} + k0, key1 = vq{} + k1;
    const vq p0 = multiply_low(a0, m0), p1 = multiply_low(a2, m1), q0 = multiply_low(b0, m0), q1 = multiply_low(b2, m1);
    a0 = (p1 >> 32) ^ a1 ^ key0, a2 = (p0 >> 32) ^ a3 ^ key1, a1 = p1, a3 = p0;
    b0 = (q1 >> 32) ^ b1 ^ key0, b2 = (q0 >> 32) ^ b3 ^ key1, b1 = q1, b3 = q0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{a0, a1, a2, a3}, {b0, b1, b2, b3}};
}

// The lower halves of two vectors, in turn.
FASTBERT_INLINE vq lower_halves(vq even, vq odd) { return (even & (vq{} + 0xffffffffull)) | (odd << 32); }

// Dropout factors (0 or 1 / (1 - p)) of elements first .. first + n of a row, first a multiple of 8: out[0 .. n), where
// n rounded up to a multiple of 4 * VLEN must fit.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  bool active;

  __attribute__((noinline)) void factors(float* out, int64_t first, int64_t n, uint32_t c1, uint32_t c2,
                                         uint32_t c3) const {
    constexpr int kLanes = VLEN / 2;
    vu left, right;  // how the factors of lower and upper halves alternate
    for (int i = 0; i < VLEN; ++i) left[i] = i / 2 + i % 2 * VLEN, right[i] = left[i] + VLEN / 2;
    // In this order, interleaving within 128 bits gives the words of a counter after those of the one before it.
    vq counter, even, odd;
    for (int i = 0; i < kLanes; ++i) {
      counter[i] = i / 2 + i % 2 * (kLanes / 2);
      even[i] = i / 2 * 2 + i % 2 * kLanes, odd[i] = even[i] + 1;
    }
    for (int64_t j = 0; j < n; j += 8 * VLEN) {
      const vq a0 = counter + static_cast<uint32_t>((first + j) >> 3);
      const PhiloxWords r = philox(seed, a0, a0 + kLanes, c1, c2, c3);
      const vq a01 = lower_halves(r.a[0], r.a[1]), a23 = lower_halves(r.a[2], r.a[3]);
      const vq b01 = lower_halves(r.b[0], r.b[1]), b23 = lower_halves(r.b[2], r.b[3]);
      const vq words[4] = {__builtin_shuffle(a01, a23, even), __builtin_shuffle(a01, a23, odd),
                           __builtin_shuffle(b01, b23, even), __builtin_shuffle(b01, b23, odd)};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i == 2 && j + 4 * VLEN >= n) break;
        const vu word = reinterpret_cast<vu>(words[i]);
        const vf lower = word << 16 >= threshold ? splat(scale) : vf{};
        const vf upper = word >= threshold ? splat(scale) : vf{};
        store(out + j + 2 * i * VLEN, __builtin_shuffle(lower, upper, left));
        store(out + j + (2 * i + 1) * VLEN, __builtin_shuffle(lower, upper, right));
      }
    }
  }
};

FASTBERT_INLINE Dropout make_dropout(double p, uint64_t seed) {
  return {seed, dropout_threshold(p), dropout_scale(p), p > 0.0};
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
