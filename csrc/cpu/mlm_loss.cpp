// The decoder of the masked language model and its cross-entropy, with the gradients computed on the way. Logits are formed
// transposed, a chunk of tokens at a time, as the panels of NR tokens that the products take as B: [panel][vocabulary][NR].
// So the softmax runs down the lanes, nothing is packed twice, and the weights, the large operand, are read where they lie.
#include "gemm.h"
#include "rows.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kStatRows = 256;  // x NR logits stay in L1
constexpr float kLowest = -3.4028235e38f;

// What the softmax of each token of a chunk needs, [tokens] each. Tokens that only fill the last panel have scale 0.
struct Softmax {
  float *max, *scale, *sum;
};

// max, sum of e^(logit - max) and sum of logits of each token, blocks of the vocabulary first so that the result depends
// neither on the number of threads nor on one long chain of additions.
inline void reduce_logits(const Executor& executor, const float* logits, int64_t vocabulary, int64_t tokens,
                          float* partial, const Softmax& out) {
  const int64_t blocks = ceil_div(vocabulary, kStatRows);
  parallel_tasks(executor, blocks, [&](int64_t block, int) {
    const int64_t begin = block * kStatRows, end = smaller(begin + kStatRows, vocabulary);
    for (int64_t t = 0; t < tokens; t += VLEN) {
      const float* column = logits + t / NR * NR * vocabulary + t % NR;
      vf most0 = splat(kLowest), most1 = most0, total0 = {}, total1 = {}, powers0 = {}, powers1 = {};
      int64_t v = begin;
      for (; v + 2 <= end; v += 2) {
        const vf a = load(column + v * NR), b = load(column + (v + 1) * NR);
        most0 = at_least(a, most0), most1 = at_least(b, most1);
        total0 += a, total1 += b;
      }
      if (v < end) most0 = at_least(load(column + v * NR), most0), total0 += load(column + v * NR);
      const vf most = at_least(most0, most1);
      for (v = begin; v + 2 <= end; v += 2) {
        powers0 += exp(load(column + v * NR) - most);
        powers1 += exp(load(column + (v + 1) * NR) - most);
      }
      if (v < end) powers0 += exp(load(column + v * NR) - most);
      float* p = partial + block * 3 * tokens + t;
      store(p, most);
      store(p + tokens, powers0 + powers1);
      store(p + 2 * tokens, total0 + total1);
    }
  });
  for (int64_t t = 0; t < tokens; t += VLEN) {
    vf most = splat(kLowest), powers = {}, total = {};
    for (int64_t b = 0; b < blocks; ++b) most = at_least(load(partial + b * 3 * tokens + t), most);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* p = partial + b * 3 * tokens + t;
      powers += load(p + tokens) * exp(load(p) - most);
      total += load(p + 2 * tokens);
    }
    store(out.max + t, most);
    store(out.scale + t, powers);
    store(out.sum + t, total);
  }
}

// Logits -> their gradients in place, and with them dweight (+)= dlogits^T h and dbias += column sums of dlogits.
template <class T>
struct DecoderGradient {
  int64_t vocabulary, columns, tokens;  // tokens fill whole panels
  const int64_t* labels;                // of the `labelled` first
  int64_t labelled;
  float on_label, everywhere;  // subtracted from the probability of the label, and of each word
  Softmax softmax;
  float* logits;
  PackedB h;  // [tokens, columns]
  float* dbias;
  float* sums;  // of the chunks before in fp32, null if dweight has them
  T* dweight;
  bool first, last;

  void gradient_of_logits(int64_t begin, int64_t rows) const {
    for (int64_t r = begin; r < begin + rows; ++r) {
      vf row_sum = {};
      for (int64_t t = 0; t < tokens; t += VLEN) {
        float* p = logits + t / NR * NR * vocabulary + r * NR + t % NR;
        const vf scale = load(softmax.scale + t);
        const vf d = exp(load(p) - load(softmax.max + t)) * scale - everywhere;
        const vf live = scale == 0.0f ? vf{} : d;
        store(p, live);
        row_sum += live;
      }
      dbias[r] += sum(row_sum);
    }
    for (int64_t t = 0; t < labelled; ++t) {
      const int64_t label = labels[t];
      if (label < begin || label >= begin + rows) continue;
      logits[t / NR * NR * vocabulary + label * NR + t % NR] -= on_label;
      dbias[label] -= on_label;
    }
  }

  void store_tile(const float* tile, int64_t begin, int64_t rows, int64_t j, int64_t cols) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (begin + r) * columns + j;
      for_columns(cols, [&](int64_t c, int64_t count) {
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

  void operator()(int64_t begin, int64_t rows) const {
    gradient_of_logits(begin, rows);
    float* tile = static_cast<float*>(scratch(kScratchTile, rows * NR * 4));
    for (int64_t q = 0; q < h.panels(); ++q) {
      int64_t j, cols;
      h.locate(q, &j, &cols);
      const int64_t width = panel_width(cols);
      const float* panel = h.data + q * tokens * NR;
      for (int64_t t = 0; t < tokens; t += NR)
        multiply_panel<false>(rows, NR, logits + t * vocabulary + begin * NR, NR, panel + t * width, width, tile, NR, t > 0);
      store_tile(tile, begin, rows, j, cols);
    }
  }
};

template <class T>
double mlm_loss_as(const Executor& executor, DType dtype, const MlmLossShape& shape, const T* h, const int64_t* labels,
                   const void* weight, const T* bias, T* dh, T* dweight, T* dbias, float* logits, float* dweight_sums) {
  const int64_t n = shape.columns, vocabulary = shape.vocabulary;
  int64_t labelled = 0;
  for (int64_t i = 0; i < shape.rows; ++i) labelled += labels[i] != shape.ignore_index;
  const int64_t chunk = mlm_loss_chunk(labelled, vocabulary), blocks = ceil_div(vocabulary, kStatRows);
  const bool gradients = dweight != nullptr;

  float* memory = static_cast<float*>(scratch(
      kScratchSums, (3 * chunk * (blocks + 1) + vocabulary + VLEN) * 4 + 2 * labelled * sizeof(int64_t)));
  int64_t* row_of = reinterpret_cast<int64_t*>(memory);  // [labelled]: where the token stands in h
  int64_t* label_of = row_of + labelled;
  float* stats = reinterpret_cast<float*>(label_of + labelled);
  const Softmax softmax{stats, stats + chunk, stats + 2 * chunk};
  float* partial = softmax.sum + chunk;
  float* dbias_sums = partial + 3 * chunk * blocks;
  for (int64_t i = 0, k = 0; i < shape.rows; ++i)
    if (labels[i] != shape.ignore_index) row_of[k] = i, label_of[k++] = labels[i];
  std::memset(dbias_sums, 0, vocabulary * 4);
  if (gradients && labelled < shape.rows) std::memset(dh, 0, shape.rows * n * sizeof(T));
  if (gradients && labelled == 0) std::memset(dweight, 0, vocabulary * n * sizeof(T));

  const float smoothing = static_cast<float>(shape.label_smoothing);
  double loss = 0;
  float* rows = static_cast<float*>(scratch(kScratchRows, chunk * n * 4));
  for (int64_t base = 0; base < labelled; base += chunk) {
    const int64_t m = smaller(chunk, labelled - base), tokens = ceil_div(m, NR) * NR;
    for (int64_t t = 0; t < tokens; ++t)
      for_columns(n, [&](int64_t c, int64_t count) {
        store_n(rows + t * n + c, t < m ? load_n(h + row_of[base + t] * n + c, count) : vf{}, count);
      });
    const PackedB columns = pack(executor, single({rows, 1, n, DType::kFloat32}, tokens), n, kScratchPackB);
    gemm(executor, single({weight, n, 1, dtype}, vocabulary), columns, nullptr,
         [&](const float* tile, int64_t ld, int64_t i, int64_t count, int64_t j, int64_t) {
           float* out = logits + j * vocabulary + i * NR;
           for (int64_t r = 0; r < count; ++r) {
             const float b = bias == nullptr ? 0.0f : to_float(bias[i + r]);
             store(out + r * NR, load(tile + r * ld) + b);
             store(out + r * NR + VLEN, load(tile + r * ld + VLEN) + b);
           }
         });
    reduce_logits(executor, logits, vocabulary, tokens, partial, softmax);
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

    const bool last = base + chunk >= labelled;
    const DecoderGradient<T> gradient{vocabulary,
                                      n,
                                      tokens,
                                      label_of + base,
                                      m,
                                      1.0f - smoothing,
                                      smoothing / static_cast<float>(vocabulary),
                                      softmax,
                                      logits,
                                      pack(executor, single({rows, n, 1, DType::kFloat32}, n), tokens, kScratchPackB2),
                                      dbias_sums,
                                      dweight_sums,
                                      dweight,
                                      base == 0,
                                      last};
    parallel_tasks(executor, ceil_div(vocabulary, kTaskRows), [&](int64_t task, int) {
      gradient(task * kTaskRows, smaller(kTaskRows, vocabulary - task * kTaskRows));
    });
    const PackedB dlogits{logits, vocabulary, 1, {0, tokens / NR}, {0}, {tokens}};
    gemm(executor, single({weight, 1, n, dtype}, n), dlogits, nullptr, StoreTransposed<float>{rows, n, nullptr});
    for (int64_t t = 0; t < m; ++t) store_as(dtype, rows + t * n, n, dh + row_of[base + t] * n);
  }
  if (gradients && dbias != nullptr) store_as(dtype, dbias_sums, vocabulary, dbias);
  return loss;
}

double mlm_loss(const Executor& executor, DType dtype, const MlmLossShape& shape, const void* h, const int64_t* labels,
                const void* weight, const void* bias, void* dh, void* dweight, void* dbias, float* logits,
                float* dweight_sums) {
  if (dtype == DType::kFloat32) {
    return mlm_loss_as(executor, dtype, shape, static_cast<const float*>(h), labels, weight,
                       static_cast<const float*>(bias), static_cast<float*>(dh), static_cast<float*>(dweight),
                       static_cast<float*>(dbias), logits, nullptr);
  }
  return mlm_loss_as(executor, dtype, shape, static_cast<const bf16*>(h), labels, weight, static_cast<const bf16*>(bias),
                     static_cast<bf16*>(dh), static_cast<bf16*>(dweight), static_cast<bf16*>(dbias), logits, dweight_sums);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
