// Whole transformer layers for inference: the kernels of the single operations, one after another, in memory that stays.
#include "parallel.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

// y may be x.
static void layer_fwd(const Executor& executor, DType dtype, const LayerShape& shape, const LayerWeights& w,
                      const void* x, void* y) {
  const AttentionShape& attention = shape.attention;
  const int64_t m = attention.total, hidden = shape.hidden, inner = attention.heads * attention.head_dim;
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t rows = m * hidden * element, wide = 3 * m * larger(inner, hidden) * element;
  // qkv [m, 3, heads, head_dim] gives way to three matrices [m, hidden] once attention has read it.
  char* qkv = static_cast<char*>(scratch(kScratchLayer, wide + m * inner * element));
  char *mixed = qkv + wide, *projected = qkv, *middle = qkv + rows, *out = qkv + 2 * rows;

  const int64_t widths[] = {inner, inner, inner};
  linear_fwd(executor, dtype, m, hidden, x, 3, widths, w.qkv, w.qkv_bias, qkv);
  attention_fwd(executor, dtype, attention, qkv, mixed, nullptr);
  linear_fwd(executor, dtype, m, inner, mixed, 1, &hidden, &w.out, nullptr, projected);
  layernorm_fwd(executor, {m, hidden, shape.eps1, 0.0, 0}, {projected, dtype}, {w.out_bias, dtype}, {x, dtype},
                {w.norm1, dtype}, {w.norm1_bias, dtype}, middle, nullptr, nullptr, nullptr);
  ffn_fwd(executor, dtype, m, hidden, shape.intermediate, hidden, middle, w.up, w.up_bias, w.down, out, nullptr);
  layernorm_fwd(executor, {m, hidden, shape.eps2, 0.0, 0}, {out, dtype}, {w.down_bias, dtype}, {middle, dtype},
                {w.norm2, dtype}, {w.norm2_bias, dtype}, y, nullptr, nullptr, nullptr);
}

void layers_fwd(const Executor& executor, DType dtype, const LayerShape& shape, int count, const LayerWeights* weights,
                const void* x, void* y) {
  for (int i = 0; i < count; ++i) layer_fwd(executor, dtype, shape, weights[i], i == 0 ? x : y, y);
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
