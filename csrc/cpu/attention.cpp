// Attention over packed sequences, forward and backward, with the online softmax of FlashAttention (Dao et al. 2022): a
// block of queries meets a block of keys at a time, so that memory grows with the sequence and not with its square.
#include "gemm.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kKeys = 512;       // keys a block of scores holds: BERT's whole sequence, no rescaling needed
constexpr int64_t kForwardRows = 2 * MR;
constexpr int64_t kBackwardRows = 4 * MR;
constexpr float kLargeSum = 64.0f;   // log-sum-exps beyond it are too coarse for P = exp(score - log-sum-exp)

// One head of one sequence.
template <class T>
struct Head {
  const AttentionShape& shape;
  int64_t b, h, first, length;
  const T* qkv;

  Head(const AttentionShape& s, const void* data, int64_t batch, int64_t head)
      : shape(s), b(batch), h(head), first(s.cu_seqlens[batch]), length(s.cu_seqlens[batch + 1] - first),
        qkv(static_cast<const T*>(data) + first * 3 * s.heads * s.head_dim + head * s.head_dim) {}

  static constexpr DType dtype() { return sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16; }
  int64_t stride() const { return 3 * shape.heads * shape.head_dim; }
  // which: 0 query, 1 key, 2 value; element (token, dim).
  Matrix matrix(int which) const { return {qkv + which * shape.heads * shape.head_dim, stride(), 1, dtype()}; }
  const float* bias_row(int64_t query) const {
    return shape.bias == nullptr ? nullptr : shape.bias + bias_offset(query);
  }
  int64_t bias_offset(int64_t query) const {
    return b * shape.bias_strides[0] + h * shape.bias_strides[1] + query * shape.bias_strides[2];
  }
};

FASTBERT_INLINE Matrix transposed(const Matrix& m) { return {m.data, m.col_stride, m.row_stride, m.dtype}; }

// All panels of m [depth, n].
inline void pack_all(const Matrix& m, int64_t depth, int64_t n, float* out) {
  for (int64_t j = 0; j < n; j += NR) pack_panel(m, depth, j, smaller(NR, n - j), out + j * depth);
}

inline int64_t panel_floats(int64_t depth, int64_t n) { return panel_count(n) * NR * depth; }

// c [rows, n] (+)= A [rows, depth] panels [full_depth, n] from row k on.
template <bool Columns>
void multiply(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* panels, int64_t full_depth,
              int64_t k, int64_t n, float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += NR) {
    const int64_t width = panel_width(n - j);
    const float* panel = panels + j * full_depth + k * width;
    const Lines lines{a, stride, Columns ? MR : MR * stride};
    multiply_panel<Columns>(rows, depth, lines, panel, nullptr, width, c + j, ldc, add);
  }
}

// The same for queries and keys, whose scores are c. A chain of kChain products is added up by itself: the error of a sharp
// softmax is that of its scores.
constexpr int64_t kChain = 16;
inline void multiply_scores(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* panels, int64_t n,
                            float* c, int64_t ldc) {
  for (int64_t i = 0; i < depth; i += kChain)
    multiply<false>(rows, smaller(kChain, depth - i), a + i, stride, panels, depth, i, n, c, ldc, i > 0);
}

// out [rows][stride] = rows of m from `first` on, times factor, in fp32.
template <class T>
void scaled_rows(const Matrix& m, int64_t first, int64_t rows, int64_t depth, float factor, float* out, int64_t stride) {
  const T* src = static_cast<const T*>(m.data) + first * m.row_stride;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < depth; j += VLEN)
      store(out + r * stride + j, load_n(src + r * m.row_stride + j, depth - j) * factor);
}

// Adds the bias (null for none) to s[0 .. n), makes it minus infinity up to the next multiple of VLEN, and returns the
// largest.
FASTBERT_INLINE float add_bias(float* s, int64_t n, const float* bias) {
  const vf lowest = splat(-__builtin_inff());
  vf top = lowest;
  for (int64_t j = 0; j < n; j += VLEN) {
    vf x = load(s + j);
    if (bias != nullptr) x += load_n(bias + j, n - j);
    if (n - j < VLEN) x = iota() < static_cast<int32_t>(n - j) ? x : lowest;
    if (bias != nullptr || n - j < VLEN) store(s + j, x);
    top = at_least(top, x);
  }
  return max(top);
}

// Which weights of queries q, q + 1, ... and keys k .. k + n are kept, all bits or none: keep [rows][stride], stride a
// multiple of 4 VLEN. A call decides about two queries, 8 apart: a lane's word about neighbouring keys.
template <class T>
void draw_kept(const Head<T>& head, const Dropout& dropout, int64_t q, int64_t rows, int64_t k, int64_t n,
               int16_t* keep, int64_t stride) {
  typedef uint16_t Halves __attribute__((vector_size(VLEN * 4)));
  const Halves least = Halves{} + static_cast<uint16_t>(dropout.threshold >> 16);
  vu left, right;  // how the eights of keys alternate
  for (int i = 0; i < VLEN; ++i) {
    left[i] = i / 4 % 2 * VLEN + i / 8 * 4 + i % 4;
    right[i] = (i / 4 + VLEN / 4) % 2 * VLEN + (i / 4 + VLEN / 4) / 2 * 4 + i % 4;
  }
  vq even;
  for (int i = 0; i < VLEN / 2; ++i) even[i] = 2 * i;
  for (int64_t query = q; query < q + rows; ++query) {
    if (query % 16 >= 8 && query - 8 >= q) continue;  // came with that one
    const uint32_t c1 = static_cast<uint32_t>(head.first + query / 16 * 8 + query % 8);
    for (int64_t j = 0; j < n; j += 4 * VLEN) {
      const vq c0 = even + static_cast<uint32_t>((k + j) / 4);
      const PhiloxWords r = philox(dropout.seed, c0, c0 + 1, c1, static_cast<uint32_t>(head.h), kStreamAttention);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t row = query / 16 * 16 + query % 8 + 8 * half - q;
        if (row < 0 || row >= rows) continue;
        const vq words[2] = {lower_halves(r.a[half], r.b[half]), lower_halves(r.a[2 + half], r.b[2 + half])};
        const vu first = reinterpret_cast<vu>(reinterpret_cast<Halves>(words[0]) >= least);
        const vu second = reinterpret_cast<vu>(reinterpret_cast<Halves>(words[1]) >= least);
        float* out = reinterpret_cast<float*>(keep + row * stride + j);
        store(out, reinterpret_cast<vf>(__builtin_shuffle(first, second, left)));
        store(out + VLEN, reinterpret_cast<vf>(__builtin_shuffle(first, second, right)));
      }
    }
  }
}

// x where it is kept, else 0.
FASTBERT_INLINE vf kept(vf x, const int16_t* keep) {
  typedef int16_t Short __attribute__((vector_size(VLEN * 2), aligned(2), may_alias));
  const vi mask = __builtin_convertvector(*reinterpret_cast<const Short*>(keep), vi);
  return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & mask);
}

template <class T>
void forward_head(const Head<T>& head, int64_t query_begin, int64_t query_end, T* out, float* lse,
                  const Dropout& dropout) {
  const AttentionShape& shape = head.shape;
  const int64_t d = shape.head_dim, length = head.length, dp = ceil_div(d, NR) * NR;
  const int64_t block = smaller(ceil_div(length, 4 * VLEN) * 4 * VLEN, kKeys);
  const int64_t key_floats = panel_floats(d, length), value_floats = panel_floats(length, d);
  float* keys = static_cast<float*>(
      scratch(kScratchRows, 4 * (key_floats + value_floats + kForwardRows * (block + 2 * dp) + kForwardRows * block / 2)));
  float* values = keys + key_floats;
  float* scores = values + value_floats;
  float* result = scores + kForwardRows * block;
  float* queries = result + kForwardRows * dp;
  int16_t* keep = reinterpret_cast<int16_t*>(queries + kForwardRows * dp);
  pack_all(transposed(head.matrix(1)), d, length, keys);
  pack_all(head.matrix(2), length, d, values);

  for (int64_t q = query_begin; q < query_end; q += kForwardRows) {
    const int64_t rows = smaller(kForwardRows, query_end - q);
    scaled_rows<T>(head.matrix(0), q, rows, d, shape.scale, queries, dp);
    float top[kForwardRows], total[kForwardRows];
    for (int64_t r = 0; r < rows; ++r) top[r] = -__builtin_inff(), total[r] = 0.0f;
    for (int64_t k = 0; k < length; k += block) {
      const int64_t n = smaller(block, length - k);
      multiply_scores(rows, d, queries, dp, keys + k * d, n, scores, block);
      if (dropout.active) draw_kept(head, dropout, q, rows, k, n, keep, block);
      for (int64_t r = 0; r < rows; ++r) {
        float* s = scores + r * block;
        const float* bias = head.bias_row(q + r);
        const float high = add_bias(s, n, bias == nullptr ? nullptr : bias + k);
        if (high > top[r]) {
          const float shrink = k > 0 ? sum(exp(splat(top[r] - high))) / VLEN : 0.0f;
          for (int64_t j = 0; k > 0 && j < dp; j += VLEN) store(result + r * dp + j, load(result + r * dp + j) * shrink);
          total[r] *= shrink;
          top[r] = high;
        }
        // A row whose every score is minus infinity gives zeros.
        const float base = top[r] == -__builtin_inff() ? 0.0f : top[r];
        vf part = {};
        for (int64_t j = 0; j < n; j += VLEN) {
          const vf p = exp(load(s + j) - base);
          part += p;
          store(s + j, dropout.active ? kept(p, keep + r * block + j) : p);
        }
        total[r] += sum(part);
      }
      multiply<false>(rows, n, scores, block, values, length, k, d, result, dp, k > 0);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float inverse = total[r] == 0.0f ? 0.0f : (dropout.active ? dropout.scale : 1.0f) / total[r];
      T* o = out + ((head.first + q + r) * shape.heads + head.h) * d;
      for (int64_t j = 0; j < d; j += VLEN) store_n(o + j, load(result + r * dp + j) * inverse, d - j);
      if (lse != nullptr) lse[head.h * shape.total + head.first + q + r] = top[r] + __builtin_logf(total[r]);
    }
  }
}

template <class T>
void attention_fwd_as(const Executor& executor, const AttentionShape& shape, const void* qkv, T* out, float* lse) {
  const Dropout dropout = make_dropout(shape.dropout_p, shape.seed);
  // Few heads for many threads: split the queries as well.
  const int64_t heads = shape.batch * shape.heads;
  const int64_t wanted = ceil_div(3 * executor.workers, larger(heads, 1));
  const int64_t split = larger(1, smaller(wanted, shape.max_seqlen / (2 * kForwardRows)));
  parallel_tasks(executor, heads * split, [&](int64_t task, int) {
    const Head<T> head(shape, qkv, task / split / shape.heads, task / split % shape.heads);
    const int64_t share = ceil_div(ceil_div(head.length, split), kForwardRows) * kForwardRows;
    const int64_t begin = task % split * share, end = smaller(begin + share, head.length);
    if (begin < end) forward_head(head, begin, end, out, lse, dropout);
  });
}

void attention_fwd(const Executor& executor, DType dtype, const AttentionShape& shape, const void* qkv, void* out,
                   float* lse) {
  if (dtype == DType::kFloat32) {
    attention_fwd_as(executor, shape, qkv, static_cast<float*>(out), lse);
  } else {
    attention_fwd_as(executor, shape, qkv, static_cast<bf16*>(out), lse);
  }
}

template <class T>
void store_rows(const float* rows, int64_t count, int64_t ld, int64_t d, float factor, T* out, int64_t stride) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < d; j += VLEN) store_n(out + r * stride + j, load(rows + r * ld + j) * factor, d - j);
}

// Of a row's exponentials; a row whose every score is minus infinity has none, and no gradient.
FASTBERT_INLINE float inverse_sum(float total) { return total == 0.0f ? 1.0f : 1.0f / total; }

// The highest score of each row and the inverse sum of exp(score - highest), over all its keys, a block at a time.
template <class T>
void sum_again(const Head<T>& head, int64_t q, int64_t rows, const float* queries, int64_t ld, const float* keys,
               float* scores, int64_t block, float* top, float* inverse) {
  const float lowest = -__builtin_inff();
  float total[kBackwardRows] = {};
  for (int64_t r = 0; r < rows; ++r) top[r] = lowest;
  for (int64_t k = 0; k < head.length; k += block) {
    const int64_t n = smaller(block, head.length - k), d = head.shape.head_dim;
    multiply_scores(rows, d, queries, ld, keys + k * d, n, scores, block);
    for (int64_t r = 0; r < rows; ++r) {
      float* s = scores + r * block;
      const float* bias = head.bias_row(q + r);
      const float high = add_bias(s, n, bias == nullptr ? nullptr : bias + k);
      if (high > top[r]) {
        total[r] *= sum(exp(splat(top[r] - high))) / VLEN;
        top[r] = high;
      }
      if (top[r] == lowest) continue;
      vf part = {};
      for (int64_t j = 0; j < n; j += VLEN) part += exp(load(s + j) - top[r]);
      total[r] += sum(part);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (top[r] == lowest) top[r] = 0.0f;
    inverse[r] = inverse_sum(total[r]);
  }
}

template <class T>
void backward_head(const Head<T>& head, const T* dout, const T* out, const float* lse, T* dqkv, float* dbias,
                   float* dbias_rest, const Dropout& dropout) {
  const AttentionShape& shape = head.shape;
  const int64_t d = shape.head_dim, length = head.length, dp = ceil_div(d, NR) * NR, width = shape.heads * d;
  const int64_t block = smaller(ceil_div(length, 4 * VLEN) * 4 * VLEN, kKeys);
  constexpr int64_t kRows = kBackwardRows;
  const int64_t along_keys = panel_floats(d, length), along_dims = panel_floats(length, d);
  float* next = static_cast<float*>(scratch(
      kScratchRows, 4 * (2 * along_keys + along_dims + 2 * length * dp + kRows * (2 * block + 5 * dp) + kRows * block / 2)));
  const auto take = [&next](int64_t floats) { return (next += floats) - floats; };
  float *keys = take(along_keys), *values = take(along_keys), *key_rows = take(along_dims);
  float *dkeys = take(length * dp), *dvalues = take(length * dp);
  float *scores = take(kRows * block), *grads = take(kRows * block);
  float *queries = take(kRows * dp), *douts = take(kRows * dp), *dqueries = take(kRows * dp);
  float *query_panels = take(kRows * dp), *dout_panels = take(kRows * dp);
  int16_t* keep = reinterpret_cast<int16_t*>(take(kRows * block / 2));
  pack_all(transposed(head.matrix(1)), d, length, keys);
  pack_all(transposed(head.matrix(2)), d, length, values);
  pack_all(head.matrix(1), length, d, key_rows);
  std::memset(dkeys, 0, 2 * length * dp * 4);

  const int64_t place = head.first * width + head.h * d;
  const Matrix upstream{dout + place, width, 1, head.dtype()};
  const int64_t grad_place = head.first * 3 * width + head.h * d;
  for (int64_t q = 0; q < length; q += kRows) {
    const int64_t rows = smaller(kRows, length - q);
    scaled_rows<T>(head.matrix(0), q, rows, d, shape.scale, queries, dp);
    scaled_rows<T>(upstream, q, rows, d, 1.0f, douts, dp);
    pack_all({queries, dp, 1, DType::kFloat32}, rows, d, query_panels);
    pack_all({douts, dp, 1, DType::kFloat32}, rows, d, dout_panels);
    // P is exp(score - base) * normal. With all keys at hand both come from the scores: a log-sum-exp of large ones has lost
    // digits that P - delta would miss where P is near 1, and, where the lowest float forbids all keys, how many they are.
    float base[kRows], normal[kRows];
    bool coarse = false;
    for (int64_t r = 0; r < rows && block < length; ++r) {
      const float kept_sum = lse[head.h * shape.total + head.first + q + r];
      base[r] = kept_sum == -__builtin_inff() ? 0.0f : kept_sum, normal[r] = 1.0f;
      coarse = coarse || __builtin_fabsf(base[r]) > kLargeSum;
    }
    if (coarse) sum_again(head, q, rows, queries, dp, keys, scores, block, base, normal);
    for (int64_t k = 0; k < length; k += block) {
      const int64_t n = smaller(block, length - k);
      multiply_scores(rows, d, queries, dp, keys + k * d, n, scores, block);
      multiply<false>(rows, d, douts, dp, values + k * d, d, 0, n, grads, block, false);
      if (dropout.active) draw_kept(head, dropout, q, rows, k, n, keep, block);
      for (int64_t r = 0; r < rows; ++r) {
        float *s = scores + r * block, *g = grads + r * block;
        const int16_t* mask = keep + r * block;
        const float* bias = head.bias_row(q + r);
        const float high = add_bias(s, n, bias == nullptr ? nullptr : bias + k);
        if (block >= length) base[r] = high == -__builtin_inff() ? 0.0f : high;
        vf part = {}, whole = {};
        for (int64_t j = 0; j < n; j += VLEN) {
          const vf p = exp(load(s + j) - base[r]);
          const vf dp_dropped = dropout.active ? kept(load(g + j) * dropout.scale, mask + j) : load(g + j);
          whole += p;
          part += p * dp_dropped;
          store(s + j, p);
          store(g + j, dp_dropped);
        }
        // sum_j P_ij dP_ij = sum_d dO_id O_id. The first is the more exact one, but needs all keys at hand.
        float delta;
        if (block >= length) {
          normal[r] = inverse_sum(sum(whole));
          delta = sum(part) * normal[r];
        } else {
          const T* o = out + place + (q + r) * width;
          vf dot = {};
          for (int64_t j = 0; j < d; j += VLEN) dot += load_n(o + j, d - j) * load(douts + r * dp + j);
          delta = sum(dot);
        }
        const int64_t at = dbias == nullptr ? 0 : head.bias_offset(q + r) + k;
        for (int64_t j = 0; j < n; j += VLEN) {
          const vf p = load(s + j) * normal[r];
          const vf ds = p * (load(g + j) - delta);
          store(g + j, ds);
          store(s + j, dropout.active ? kept(p * dropout.scale, mask + j) : p);
          if (dbias == nullptr) continue;
          const vf before = load_n(dbias + at + j, n - j), after = before + ds;
          store_n(dbias + at + j, after, n - j);
          if (dbias_rest == nullptr) continue;
          const vf added = after - before, lost = (before - (after - added)) + (ds - added);
          store_n(dbias_rest + at + j, load_n(dbias_rest + at + j, n - j) + lost, n - j);
        }
      }
      multiply<false>(rows, n, grads, block, key_rows, length, k, d, dqueries, dp, k > 0);
      multiply<true>(n, rows, scores, block, dout_panels, rows, 0, d, dvalues + k * dp, dp, true);
      multiply<true>(n, rows, grads, block, query_panels, rows, 0, d, dkeys + k * dp, dp, true);
    }
    store_rows(dqueries, rows, dp, d, shape.scale, dqkv + grad_place + q * 3 * width, 3 * width);
  }
  store_rows(dkeys, length, dp, d, 1.0f, dqkv + grad_place + width, 3 * width);
  store_rows(dvalues, length, dp, d, 1.0f, dqkv + grad_place + 2 * width, 3 * width);
}

template <class T>
void attention_bwd_as(const Executor& executor, const AttentionShape& shape, const T* dout, const void* qkv,
                      const T* out, const float* lse, T* dqkv, float* dbias, float* dbias_rest) {
  const Dropout dropout = make_dropout(shape.dropout_p, shape.seed);
  // Heads that add to the same part of dbias belong to one task and take turns: no atomics, one order.
  const int64_t shared_batch = dbias != nullptr && shape.bias_strides[0] == 0 ? shape.batch : 1;
  const int64_t shared_heads = dbias != nullptr && shape.bias_strides[1] == 0 ? shape.heads : 1;
  const int64_t head_groups = shape.heads / shared_heads;
  parallel_tasks(executor, shape.batch / larger(shared_batch, 1) * head_groups, [&](int64_t task, int) {
    for (int64_t i = 0; i < shared_batch * shared_heads; ++i) {
      const int64_t b = task / head_groups * shared_batch + i / shared_heads;
      const int64_t h = task % head_groups * shared_heads + i % shared_heads;
      const Head<T> head(shape, qkv, b, h);
      if (head.length > 0) backward_head(head, dout, out, lse, dqkv, dbias, dbias_rest, dropout);
    }
  });
}

void attention_bwd(const Executor& executor, DType dtype, const AttentionShape& shape, const void* dout,
                   const void* qkv, const void* out, const float* lse, void* dqkv, float* dbias, float* dbias_rest) {
  if (dtype == DType::kFloat32) {
    attention_bwd_as(executor, shape, static_cast<const float*>(dout), qkv, static_cast<const float*>(out), lse,
                     static_cast<float*>(dqkv), dbias, dbias_rest);
  } else {
    attention_bwd_as(executor, shape, static_cast<const bf16*>(dout), qkv, static_cast<const bf16*>(out), lse,
                     static_cast<bf16*>(dqkv), dbias, dbias_rest);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
