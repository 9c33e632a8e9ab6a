// The decoder of the masked language model and its cross-entropy, with the gradients computed on the way. Logits are
// formed transposed, a chunk of tokens at a time, in panels of NR tokens: [panel][vocabulary][NR]. So the softmax runs
// down the lanes, and the weights, the large operand of all three products, are read where they lie.
#include "gemm.h"
#include "rows.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr float kLowest = -3.4028235e38f;
constexpr int kStats = 3;

// Rows begin .. begin + rows of the weights in fp32.
template <class T>
const float* lines_of(const T* weight, int64_t columns, int64_t begin, int64_t rows) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return weight + begin * columns;
  } else {
    float* out = static_cast<float*>(scratch(kScratchPackA, rows * columns * 4));
    for_columns(rows * columns, [&](int64_t c, int64_t count) FASTBERT_INLINED {
      store_n(out + c, load_n(weight + begin * columns + c, count), count);
    });
    return out;
  }
}

// Maximum, sum of e^(logit - maximum) and sum of logits down VLEN columns of `rows` lines of NR.
struct Stats {
  vf max, powers, sum;
};

inline Stats column_stats(const float* column, int64_t rows) {
  vf max0 = splat(kLowest), max1 = max0, sum0 = {}, sum1 = {}, powers0 = {}, powers1 = {};
  int64_t r = 0;
  for (; r + 2 <= rows; r += 2) {
    const vf a = load(column + r * NR), b = load(column + (r + 1) * NR);
    max0 = at_least(a, max0), max1 = at_least(b, max1);
    sum0 += a, sum1 += b;
  }
  if (r < rows) max0 = at_least(load(column + r * NR), max0), sum0 += load(column + r * NR);
  const vf max = at_least(max0, max1);
  for (r = 0; r + 2 <= rows; r += 2) {
    powers0 += exp(load(column + r * NR) - max);
    powers1 += exp(load(column + (r + 1) * NR) - max);
  }
  if (r < rows) powers0 += exp(load(column + r * NR) - max);
  return {max, powers0 + powers1, sum0 + sum1};
}

template <class T>
struct DecoderLogits {
  int64_t vocabulary, columns, tokens;  // tokens fill whole panels
  const T *weight, *bias;
  const float* h;  // packed, [panel of tokens][columns][NR]
  float* logits;
  float* stats;  // [block of the vocabulary][kStats][tokens]

  void operator()(int64_t block) const {
    const int64_t begin = block * kTaskRows, rows = smaller(kTaskRows, vocabulary - begin);
    const float* w = lines_of(weight, columns, begin, rows);
    for (int64_t t = 0; t < tokens; t += NR) {
      float* out = logits + t * vocabulary + begin * NR;
      const Lines lines{w, columns, MR * columns, t == 0};
      multiply_panel<false>(rows, columns, lines, h + t * columns, nullptr, NR, out, NR, false);
      for (int64_t r = 0; bias != nullptr && r < rows; ++r) {
        const vf b = splat(to_float(bias[begin + r]));
        for (int64_t c = 0; c < NR; c += VLEN) store(out + r * NR + c, load(out + r * NR + c) + b);
      }
      for (int64_t c = 0; c < NR; c += VLEN) {
        const Stats s = column_stats(out + c, rows);
        float* to = stats + block * kStats * tokens + t + c;
        store(to, s.max), store(to + tokens, s.powers), store(to + 2 * tokens, s.sum);
      }
    }
  }
};

// What the softmax of each token of a chunk needs, [tokens] each. Tokens that only fill the last panel have scale 0.
struct Softmax {
  float *max, *scale, *sum;
};

// Sums per block of the vocabulary, then over the blocks: neither the number of threads nor one long chain of additions
// shows in the result. Leaves the sum of powers in scale.
inline void reduce_stats(const float* stats, int64_t blocks, int64_t tokens, const Softmax& out) {
  for (int64_t t = 0; t < tokens; t += VLEN) {
    vf max = splat(kLowest), powers = {}, total = {};
    for (int64_t b = 0; b < blocks; ++b) max = at_least(load(stats + b * kStats * tokens + t), max);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* s = stats + b * kStats * tokens + t;
      powers += load(s + tokens) * exp(load(s) - max);
      total += load(s + 2 * tokens);
    }
    store(out.max + t, max), store(out.scale + t, powers), store(out.sum + t, total);
  }
}

// Gradients of logits, weights and tokens, a block of the vocabulary at a time: dlogits exist for that block only.
// Each of kParts parts of the vocabulary sums dh^T of its blocks apart: a fixed number, for a fixed order of additions.
constexpr int64_t kParts = 16;

template <class T>
struct DecoderGradient {
  int64_t vocabulary, columns, tokens;  // tokens fill whole panels
  const int64_t* labels;                // of the `labelled` first
  int64_t labelled;
  float on_label, everywhere;  // subtracted from the probability of the label, and of each word
  Softmax softmax;
  const float* logits;
  PackedB h;  // [tokens, columns]
  const T* weight;
  float* dh;  // [kParts][panel of tokens][columns][NR], or null
  float* dbias;
  float* sums;  // dweight of the chunks before in fp32, null if dweight itself has it
  T* dweight;  // or null
  bool first, last;

  // d as rows [rows][tokens] and as panels [tokens / NR][rows][NR].
  void gradient_of_logits(int64_t begin, int64_t rows, float* d, float* panels) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < tokens; t += VLEN) {
        const vf logit = load(logits + t / NR * NR * vocabulary + (begin + r) * NR + t % NR);
        const vf scale = load(softmax.scale + t);
        const vf v = scale == 0.0f ? vf{} : exp(logit - load(softmax.max + t)) * scale - everywhere;
        store(d + r * tokens + t, v);
        store(panels + t / NR * NR * rows + r * NR + t % NR, v);
      }
    for (int64_t t = 0; t < labelled; ++t) {
      const int64_t r = labels[t] - begin;
      if (r < 0 || r >= rows) continue;
      d[r * tokens + t] -= on_label;
      panels[t / NR * NR * rows + r * NR + t % NR] -= on_label;
    }
    // Of what is left: from the sum of a frequent word, its labels taken off one by one would be rounded all one way.
    for (int64_t r = 0; r < rows; ++r) {
      vf total = {};
      for (int64_t t = 0; t < tokens; t += VLEN) total += load(d + r * tokens + t);
      dbias[begin + r] += sum(total);
    }
  }

  void store_tile(const float* tile, int64_t begin, int64_t rows, int64_t j, int64_t cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (begin + r) * columns + j;
      for_columns(cols, [&](int64_t c, int64_t count) FASTBERT_INLINED {
        vf d = load(tile + r * NR + c);
        if (!first) d += sums != nullptr ? load_n(sums + at + c, count) : load_n(dweight + at + c, count);
        if (sums != nullptr && !last) {
          store_n(sums + at + c, d, count);
        } else {
          store_n(dweight + at + c, d, count);
        }
      });
    }
  }

  void block(int64_t begin, int64_t rows, float* dh_part, bool add) const {
    float* tile = static_cast<float*>(scratch(kScratchTile, rows * (NR + 2 * tokens) * 4));
    float *d = tile + rows * NR, *panels = d + rows * tokens;
    gradient_of_logits(begin, rows, d, panels);
    for (int64_t q = 0; dweight != nullptr && q < h.panels(); ++q) {
      int64_t j, cols;
      h.locate(q, &j, &cols);
      const float* panel = h.data + q * tokens * NR;
      const Lines lines{d, tokens, MR * tokens};
      multiply_panel<false>(rows, tokens, lines, panel, nullptr, panel_width(cols), tile, NR, false);
      store_tile(tile, begin, rows, j, cols);
    }
    if (dh_part == nullptr) return;
    const float* w = lines_of(weight, columns, begin, rows);
    for (int64_t t = 0; t < tokens; t += NR)
      multiply_panel<true>(columns, rows, Lines{w, columns, MR}, panels + t * rows, panels + (t + NR) * rows, NR,
                           dh_part + t * columns, NR, add);
  }

  void part(int64_t p) const {
    float* dh_part = dh == nullptr ? nullptr : dh + p * columns * tokens;
    const int64_t blocks = ceil_div(vocabulary, kTaskRows);
    const int64_t begin = blocks * p / kParts, end = blocks * (p + 1) / kParts;
    if (begin == end && dh != nullptr) std::memset(dh_part, 0, columns * tokens * 4);
    for (int64_t b = begin; b < end; ++b)
      block(b * kTaskRows, smaller(kTaskRows, vocabulary - b * kTaskRows), dh_part, b > begin);
  }
};

// out [tokens, columns] = the parts of dh^T added up.
inline void reduce_parts(const Executor& executor, const float* dh, int64_t columns, int64_t tokens, float* out) {
  parallel_tasks(executor, tokens / NR * ceil_div(columns, VLEN), [&](int64_t task, int) {
    const int64_t t = task % (tokens / NR) * NR, c = task / (tokens / NR) * VLEN;
    const int64_t count = smaller(columns - c, VLEN);
    float tile[VLEN * NR];
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < NR; j += VLEN) {
        vf total = {};
        for (int64_t p = 0; p < kParts; ++p) total += load(dh + (p * tokens + t) * columns + (c + i) * NR + j);
        store(tile + i * NR + j, total);
      }
    StoreTransposed<float>{out, columns, nullptr}(tile, NR, c, count, t, NR);
  });
}

template <class T>
double mlm_loss_as(const Executor& executor, DType dtype, const MlmLossShape& shape, const T* h, const int64_t* labels,
                   const void* weight, const T* bias, T* dh, T* dweight, T* dbias, float* dweight_sums) {
  const int64_t n = shape.columns, vocabulary = shape.vocabulary, labelled = shape.labelled;
  const int64_t chunk = mlm_loss_chunk(labelled, vocabulary), blocks = ceil_div(vocabulary, kTaskRows);
  const bool gradients = dh != nullptr || dweight != nullptr || dbias != nullptr;

  float* memory = static_cast<float*>(scratch(
      kScratchSums, (3 * chunk + kStats * chunk * blocks + vocabulary) * 4 + 2 * labelled * sizeof(int64_t)));
  int64_t* row_of = reinterpret_cast<int64_t*>(memory);  // [labelled]: where the token stands in h
  int64_t* label_of = row_of + labelled;
  float* floats = reinterpret_cast<float*>(label_of + labelled);
  const Softmax softmax{floats, floats + chunk, floats + 2 * chunk};
  float* stats = floats + 3 * chunk;
  float* dbias_sums = stats + kStats * chunk * blocks;
  for (int64_t i = 0, k = 0; i < shape.rows; ++i)
    if (labels[i] != shape.ignore_index) row_of[k] = i, label_of[k++] = labels[i];
  std::memset(dbias_sums, 0, vocabulary * 4);
  if (dh != nullptr && labelled < shape.rows) std::memset(dh, 0, shape.rows * n * sizeof(T));
  if (dweight != nullptr && labelled == 0) std::memset(dweight, 0, vocabulary * n * sizeof(T));

  const float smoothing = static_cast<float>(shape.label_smoothing);
  double loss = 0;
  float* rows = static_cast<float*>(scratch(kScratchRows, chunk * n * 4));
  float* logits = static_cast<float*>(scratch(kScratchLogits, chunk * vocabulary * 4));
  for (int64_t base = 0; base < labelled; base += chunk) {
    const int64_t m = smaller(chunk, labelled - base), tokens = ceil_div(m, NR) * NR;
    for (int64_t t = 0; t < tokens; ++t)
      for_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
        store_n(rows + t * n + c, t < m ? load_n(h + row_of[base + t] * n + c, count) : vf{}, count);
      });
    const PackedB columns = pack(executor, single({rows, 1, n, DType::kFloat32}, tokens), n, kScratchPackB);
    const DecoderLogits<T> block_of_logits{vocabulary,   n,      tokens, static_cast<const T*>(weight), bias,
                                           columns.data, logits, stats};
    parallel_tasks(executor, blocks, [&](int64_t block, int) { block_of_logits(block); });
    reduce_stats(stats, blocks, tokens, softmax);
    for (int64_t t = 0; t < tokens; ++t) {
      if (t < m) {
        const double label_logit = logits[t / NR * NR * vocabulary + label_of[base + t] * NR + t % NR];
        const double log_sum = softmax.max[t] + __builtin_log(softmax.scale[t]);
        loss += log_sum - label_logit;
        if (smoothing != 0.0f)
          loss += shape.label_smoothing * (label_logit - softmax.sum[t] / static_cast<double>(vocabulary));
      }
      softmax.scale[t] = t < m ? 1.0f / softmax.scale[t] : 0.0f;
    }
    if (!gradients) continue;

    PackedB packed{};
    if (dweight != nullptr)
      packed = pack(executor, single({rows, n, 1, DType::kFloat32}, n), tokens, kScratchPackB2);
    float* parts = dh == nullptr ? nullptr : static_cast<float*>(scratch(kScratchPackB, kParts * n * tokens * 4));
    const DecoderGradient<T> gradient{vocabulary, n, tokens, label_of + base, m, 1.0f - smoothing,
                                      smoothing / static_cast<float>(vocabulary), softmax, logits, packed,
                                      static_cast<const T*>(weight), parts, dbias_sums, dweight_sums, dweight,
                                      base == 0, base + chunk >= labelled};
    parallel_tasks(executor, kParts, [&](int64_t p, int) { gradient.part(p); });
    if (dh == nullptr) continue;
    reduce_parts(executor, parts, n, tokens, rows);
    for (int64_t t = 0; t < m; ++t) store_as(dtype, rows + t * n, n, dh + row_of[base + t] * n);
  }
  if (dbias != nullptr) store_as(dtype, dbias_sums, vocabulary, dbias);
  return loss;
}

double mlm_loss(const Executor& executor, DType dtype, const MlmLossShape& shape, const void* h, const int64_t* labels,
                const void* weight, const void* bias, void* dh, void* dweight, void* dbias, float* dweight_sums) {
  if (dtype == DType::kFloat32) {
    return mlm_loss_as(executor, dtype, shape, static_cast<const float*>(h), labels, weight,
                       static_cast<const float*>(bias), static_cast<float*>(dh), static_cast<float*>(dweight),
                       static_cast<float*>(dbias), nullptr);
  }
  return mlm_loss_as(executor, dtype, shape, static_cast<const bf16*>(h), labels, weight,
                     static_cast<const bf16*>(bias), static_cast<bf16*>(dh), static_cast<bf16*>(dweight),
                     static_cast<bf16*>(dbias), dweight_sums);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
