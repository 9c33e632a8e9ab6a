// What one instruction set offers: plain pointers in, plain pointers out, no PyTorch. csrc/ops.cpp checks arguments,
// allocates, and calls the table that cpuid chose.
#pragma once
#include <cstdint>

namespace fastbert {

enum class DType : int { kFloat32, kBFloat16 };

// Runs body(context, worker) for worker = 0 .. workers-1, perhaps at once, perhaps one after another: a body may not wait
// for another. Returns when all have.
struct Executor {
  int workers;
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);
};

// Memory of the calling thread that lives until its next request for the same slot; 64-byte aligned.
enum ScratchSlot { kScratchPackA, kScratchPackB, kScratchPackB2, kScratchTile, kScratchRows, kScratchSums, kScratchLogits,
                   kScratchLayer, kScratchSlots };
void* scratch(ScratchSlot slot, int64_t bytes);

// Element (i, j) at data + i * row_stride + j * col_stride, counted in elements.
struct Matrix {
  const void* data;
  int64_t row_stride, col_stride;
  DType dtype;
};

struct AttentionShape {
  int64_t batch, total, heads, head_dim, max_seqlen;
  const int32_t* cu_seqlens;  // [batch + 1]
  float scale;
  double dropout_p;
  uint64_t seed;
  const float* bias;          // null or additive, [batch|1, heads|1, rows|1, keys], strides in elements (0 = broadcast)
  int64_t bias_strides[3];
};

// A parameter of a row's length, or null.
struct Vector {
  const void* data;
  DType dtype;
};

// What layernorm and embedding work on; dropout (p > 0) draws by row and column.
struct RowsShape {
  int64_t rows, columns;
  double eps, dropout_p;
  uint64_t seed;
};

// A transformer layer without dropout: the attention's shape, and what the rest needs. Widths in elements.
struct LayerShape {
  AttentionShape attention;
  int64_t hidden, intermediate;
  double eps1, eps2;
};

// Its parameters.
struct LayerWeights {
  const void *qkv[3], *qkv_bias[3];  // [heads * head_dim, hidden]
  const void *out, *out_bias;        // [hidden, heads * head_dim]
  const void *norm1, *norm1_bias;
  const void *up, *up_bias;          // [intermediate, hidden]
  const void *down, *down_bias;      // [hidden, intermediate]
  const void *norm2, *norm2_bias;
};

struct MlmLossShape {
  int64_t rows, columns, vocabulary, ignore_index;
  double label_smoothing;
  int64_t labelled;  // how many labels are not ignore_index
};

// Rows whose logits are in memory at a time: at most 16 MiB of them, and a multiple of what any instruction set needs.
inline int64_t mlm_loss_chunk(int64_t rows, int64_t vocabulary) {
  constexpr int64_t kStep = 32, kLogits = 4 << 20;
  const int64_t most = kLogits / vocabulary / kStep * kStep, needed = (rows + kStep - 1) / kStep * kStep;
  return needed <= most ? needed : most > kStep ? most : kStep;
}

struct Kernels {
  const char* isa;

  // y [m, sum n_i] = x [m, k] w_i [n_i, k]^T + b_i, the outputs side by side. bias may be null, and so may its entries.
  void (*linear_fwd)(const Executor&, DType, int64_t m, int64_t k, const void* x, int count, const int64_t* n,
                     const void* const* weight, const void* const* bias, void* y);
  // Null outputs are not computed. dw [sum n_i, k], db [sum n_i].
  void (*linear_bwd)(const Executor&, DType, int64_t m, int64_t k, const void* dy, const void* x, int count,
                     const int64_t* n, const void* const* weight, void* dx, void* dw, void* db);
  // y [m, n2] = gelu(x [m, k] w1 [n1, k]^T + b1) w2 [n2, n1]^T; pre (null or [m, n1]) gets what went into GELU.
  void (*ffn_fwd)(const Executor&, DType, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* x, const void* w1,
                  const void* b1, const void* w2, void* y, void* pre);
  void (*ffn_bwd)(const Executor&, DType, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* dy, const void* x,
                  const void* pre, const void* w1, const void* w2, void* dx, void* dw1, void* db1, void* dw2,
                  float* dpre);  // Null outputs are not computed. dpre: room for m n1 floats

  // qkv [total, 3, heads, head_dim] -> out [total, heads * head_dim], lse (null or [heads, total])
  void (*attention_fwd)(const Executor&, DType, const AttentionShape&, const void* qkv, void* out, float* lse);
  // dbias (null or zeroed, shaped like bias) receives the bias gradient, dbias_rest (as dbias, or null) what rounding took
  // from it, where many queries, heads or sequences add to one number.
  void (*attention_bwd)(const Executor&, DType, const AttentionShape&, const void* dout, const void* qkv, const void* out,
                        const float* lse, void* dqkv, float* dbias, float* dbias_rest);
  double (*fma_rate)(double seconds);

  // y [rows, columns] = LayerNorm(dropout(x + x_bias) + residual) * weight + bias in fp32 if x or residual is, else bf16.
  // z (what is normalised, of y's type), mean and rstd [rows] are written unless null.
  void (*layernorm_fwd)(const Executor&, const RowsShape&, Vector x, Vector x_bias, Vector residual, Vector weight,
                        Vector bias, void* y, void* z, float* mean, float* rstd);
  // dx only with dropout, else it equals dz. dweight, dbias in weight's type; dx_bias may be null.
  void (*layernorm_bwd)(const Executor&, DType, const RowsShape&, const void* dy, const void* z, Vector weight,
                        const float* mean, const float* rstd, void* dz, void* dx, void* dweight, void* dbias,
                        float* dx_bias);

  // y [rows, columns] = dropout(LayerNorm(sum of tables[i][ids[i]])): word, position, token type. Ids are in range.
  // xhat (normalised rows) and rstd are written unless null.
  void (*embedding_fwd)(const Executor&, DType, const RowsShape&, const int64_t* const* ids, const void* const* tables,
                        Vector weight, Vector bias, void* y, void* xhat, float* rstd);
  // dtables[i] [sizes[i], columns]; row padding_idx of the first is 0. workspace: rows * columns floats.
  void (*embedding_bwd)(const Executor&, DType, const RowsShape&, const void* dy, const void* xhat, const float* rstd,
                        const int64_t* const* ids, Vector weight, const int64_t* sizes, int64_t padding_idx,
                        void* const* dtables, void* dweight, void* dbias, float* workspace);

  // The sum of the cross-entropies of h [rows, columns] weight [vocabulary, columns]^T + bias (or null), and those of its
  // gradients that are not null. Labels are in range or ignore_index. dweight_sums: as many floats as weight has if
  // dweight is bf16 and there is more than one chunk.
  double (*mlm_loss)(const Executor&, DType, const MlmLossShape&, const void* h, const int64_t* labels,
                     const void* weight, const void* bias, void* dh, void* dweight, void* dbias, float* dweight_sums);

  // y [total, hidden] = what `count` layers make of x [total, hidden]: what the single kernels give, digit for digit.
  void (*layers_fwd)(const Executor&, DType, const LayerShape&, int count, const LayerWeights*, const void* x, void* y);
};

}  // namespace fastbert
