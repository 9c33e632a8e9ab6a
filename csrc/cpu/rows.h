// What the kernels that normalise rows share: loops over the columns of a row, LayerNorm's statistics, its backward.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

// Elements that make it worth waking another thread, and at least as many in a task.
constexpr int64_t kTaskElements = 32 << 10;

// Columns of a row buffer: dropout factors come in groups of 4 VLEN.
FASTBERT_INLINE int64_t padded_columns(int64_t n) { return ceil_div(n, 4 * VLEN) * 4 * VLEN; }

// f(c, count) for each vector of a row of n: count is VLEN, known to the compiler, for all but an incomplete last one.
template <class F>
FASTBERT_INLINE void for_columns(int64_t n, const F& f) {
  int64_t c = 0;
  for (; c + VLEN <= n; c += VLEN) f(c, VLEN);
  if (c < n) f(c, n - c);
}

constexpr int64_t kChain = 64;  // vectors added up before they join the others: a longer chain loses digits

// The sum of what f(c, count) returns; two accumulators, because one would wait for each addition.
template <class F>
FASTBERT_INLINE float sum_columns(int64_t n, const F& f) {
  vf total = {}, s0 = {}, s1 = {};
  int64_t c = 0;
  while (c + 2 * VLEN <= n) {
    const int64_t end = smaller(n, c + kChain * VLEN);
    for (; c + 2 * VLEN <= end; c += 2 * VLEN) s0 += f(c, VLEN), s1 += f(c + VLEN, VLEN);
    total += s0 + s1, s0 = s1 = vf{};
  }
  for_columns(n - c, [&](int64_t d, int64_t count) FASTBERT_INLINED { s0 += f(c + d, count); });
  return sum(total + s0);
}

FASTBERT_INLINE vf first_lanes(vf v, int64_t n) {
  return n >= VLEN ? v : (iota() < static_cast<int32_t>(n) ? v : vf{});
}

// A parameter in fp32: where it lies, or converted into `room`. Null stays null.
inline const float* as_float(const Vector& v, int64_t n, float* room) {
  if (v.dtype == DType::kFloat32 || v.data == nullptr) return static_cast<const float*>(v.data);
  const bf16* from = static_cast<const bf16*>(v.data);
  for_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED { store_n(room + c, load_n(from + c, count), count); });
  return room;
}

struct Statistics {
  float mean, rstd;  // rstd: 1 / standard deviation
};

// Of a row in fp32 whose sum is known. The variance is taken from the centred values, so that nothing cancels, and so is
// the rest of the mean, whose rounding would make a constant row steep.
FASTBERT_INLINE Statistics statistics(const float* row, int64_t n, float total, double eps) {
  const float mean = total / static_cast<float>(n);
  vf rest = {};
  const float squares = sum_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
    const vf d = first_lanes(load(row + c) - mean, count);
    rest += d;
    return d * d;
  });
  const double offset = sum(rest) / static_cast<double>(n), variance = squares / static_cast<double>(n) - offset * offset;
  return {mean + static_cast<float>(offset), static_cast<float>(1.0 / __builtin_sqrt((variance > 0.0 ? variance : 0.0) + eps))};
}

// Backward of dropout_after(LayerNorm(z)) (embedding) or of LayerNorm(z) with z = dropout(x) + ... (layernorm).
enum class DropoutAt { kNowhere, kAfter, kBefore };

template <class T, class Out>
struct NormBackward {
  int64_t rows, columns;
  const T* dy;
  const T* z;         // normalised already if mean is null
  const float* mean;  // [rows] or null
  const float* rstd;  // [rows]
  const float* weight;
  Dropout dropout;
  Out* dz;
  Out* dx;  // gradient before the dropout that came before, else null
  bool dx_bias;  // whether the column sums of dx (of dz without dropout before) are wanted

  // Column sums of a block of rows, one below another: dweight, dbias and perhaps dx_bias.
  int64_t sums() const { return dx_bias ? 3 : 2; }
};

// Everything is copied to locals: what a store might alias would be loaded again for every vector. One row at a time:
// several are more streams than hardware prefetchers follow, two gain 15 % in cache and lose 30 % out of it.
template <DropoutAt At, class T, class Out>
void norm_backward_row(const NormBackward<T, Out>& a, int64_t row, float* factors, float* sums) {
  const int64_t n = a.columns, padded = padded_columns(n);
  const T *const dy = a.dy + row * n, *const z = a.z + row * n;
  Out *const dz = a.dz + row * n, *const dx = At == DropoutAt::kBefore ? a.dx + row * n : nullptr;
  const float* const weight = a.weight;
  const bool dx_bias = a.dx_bias;
  const float rstd = a.rstd[row];
  const float mean = a.mean == nullptr ? 0.0f : a.mean[row], scale = a.mean == nullptr ? 1.0f : rstd;
  if constexpr (At != DropoutAt::kNowhere)
    a.dropout.factors(factors, 0, n, static_cast<uint32_t>(row), 0, kStreamRows);
  vf g0 = {}, g1 = {}, gx0 = {}, gx1 = {}, g_total = {}, gx_total = {};
  const auto add = [&](int64_t c, int64_t count, vf* g, vf* gx) FASTBERT_INLINED {
    vf v = load_n(dy + c, count);
    if constexpr (At == DropoutAt::kAfter) v *= load(factors + c);
    v *= load_n(weight + c, count);
    *g += v;
    *gx += v * (load_n(z + c, count) - mean);
  };
  int64_t c = 0;
  while (c + 2 * VLEN <= n) {
    const int64_t end = smaller(n, c + kChain * VLEN);
    for (; c + 2 * VLEN <= end; c += 2 * VLEN) add(c, VLEN, &g0, &gx0), add(c + VLEN, VLEN, &g1, &gx1);
    g_total += g0 + g1, gx_total += gx0 + gx1, g0 = g1 = gx0 = gx1 = vf{};
  }
  for_columns(n - c, [&](int64_t d, int64_t count) FASTBERT_INLINED { add(c + d, count, &g0, &gx0); });
  const float mean_g = sum(g_total + g0) / static_cast<float>(n);
  const float mean_gx = sum(gx_total + gx0) * scale / static_cast<float>(n);
  for_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
    vf g = load_n(dy + c, count);
    if constexpr (At == DropoutAt::kAfter) g *= load(factors + c);
    const vf x = (load_n(z + c, count) - mean) * scale;
    vf d = (g * load_n(weight + c, count) - mean_g - x * mean_gx) * rstd;
    store_n(dz + c, d, count);
    if constexpr (At == DropoutAt::kBefore) {
      d *= load(factors + c);
      store_n(dx + c, d, count);
    }
    // Lanes beyond the last column gather what nobody reads.
    store(sums + c, load(sums + c) + g * x);
    store(sums + padded + c, load(sums + padded + c) + g);
    if (dx_bias) store(sums + 2 * padded + c, load(sums + 2 * padded + c) + d);
  });
}

// Rows that one set of column sums covers: by the shape alone, so that the sums are the same for any number of threads,
// and few, because fp32 loses digits in a long chain of additions.
FASTBERT_INLINE int64_t rows_per_block(int64_t rows) { return larger(32, ceil_div(rows, 1024)); }

// Computes dz, dx and returns the column sums [sums()][padded_columns], in memory of the caller's kScratchSums.
template <DropoutAt At, class T, class Out>
float* norm_backward(const Executor& executor, const NormBackward<T, Out>& a) {
  const int64_t padded = padded_columns(a.columns), width = a.sums() * padded;
  const int64_t block = rows_per_block(a.rows), blocks = ceil_div(a.rows, block);
  float* sums = static_cast<float*>(scratch(kScratchSums, larger(blocks, 1) * width * 4));
  std::memset(sums, 0, larger(blocks, 1) * width * 4);
  const int64_t blocks_per_task = larger(1, kTaskElements / (block * a.columns));
  parallel_tasks(executor, ceil_div(blocks, blocks_per_task), [&](int64_t task, int) {
    float* factors = static_cast<float*>(scratch(kScratchRows, padded * 4));
    for (int64_t b = task * blocks_per_task; b < smaller((task + 1) * blocks_per_task, blocks); ++b)
      for (int64_t row = b * block; row < smaller((b + 1) * block, a.rows); ++row)
        norm_backward_row<At>(a, row, factors, sums + b * width);
  });
  // Over the blocks in their order, 16 and then those.
  const int64_t slice = larger(ceil_div(kTaskElements, larger(blocks, 1)), VLEN) / VLEN * VLEN;
  parallel_tasks(executor, blocks > 1 ? ceil_div(width, slice) : 0, [&](int64_t task, int) {
    for (int64_t c = task * slice; c < smaller((task + 1) * slice, width); c += VLEN) {
      vf total = {};
      for (int64_t b = 0; b < blocks;) {
        const int64_t end = smaller(b + 16, blocks);
        vf part = {};
        for (; b < end; ++b) part += load(sums + b * width + c);
        total += part;
      }
      store(sums + c, total);
    }
  });
  return sums;
}

// Writes n fp32 values in the type that is asked for.
inline void store_as(DType dtype, const float* from, int64_t n, void* out) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out, from, n * 4);
  } else {
    bf16* to = static_cast<bf16*>(out);
    for_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED { store_n(to + c, load_n(from + c, count), count); });
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
