// The kernels of one instruction set, by the names that table.cpp puts into its table.
#pragma once
#include "kernels.h"

namespace fastbert {
namespace FASTBERT_ISA {

void linear_fwd(const Executor&, DType, int64_t m, int64_t k, const void* x, int count, const int64_t* n,
                const void* const* weight, const void* const* bias, void* y);
void linear_bwd(const Executor&, DType, int64_t m, int64_t k, const void* dy, const void* x, int count, const int64_t* n,
                const void* const* weight, void* dx, void* dw, void* db);
void ffn_fwd(const Executor&, DType, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* x, const void* w1,
             const void* b1, const void* w2, void* y, void* pre);
void ffn_bwd(const Executor&, DType, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* dy, const void* x,
             const void* pre, const void* w1, const void* w2, void* dx, void* dw1, void* db1, void* dw2, float* dpre);
void attention_fwd(const Executor&, DType, const AttentionShape&, const void* qkv, void* out, float* lse);
void attention_bwd(const Executor&, DType, const AttentionShape&, const void* dout, const void* qkv, const void* out,
                   const float* lse, void* dqkv, float* dbias, float* dbias_rest);
double fma_rate(double seconds);
void layernorm_fwd(const Executor&, const RowsShape&, Vector x, Vector x_bias, Vector residual, Vector weight, Vector bias,
                   void* y, void* z, float* mean, float* rstd);
void layernorm_bwd(const Executor&, DType, const RowsShape&, const void* dy, const void* z, Vector weight,
                   const float* mean, const float* rstd, void* dz, void* dx, void* dweight, void* dbias, float* dx_bias);
void embedding_fwd(const Executor&, DType, const RowsShape&, const int64_t* const* ids, const void* const* tables,
                   Vector weight, Vector bias, void* y, void* xhat, float* rstd);
void embedding_bwd(const Executor&, DType, const RowsShape&, const void* dy, const void* xhat, const float* rstd,
                   const int64_t* const* ids, Vector weight, const int64_t* sizes, int64_t padding_idx,
                   void* const* dtables, void* dweight, void* dbias, float* workspace);
double mlm_loss(const Executor&, DType, const MlmLossShape&, const void* h, const int64_t* labels, const void* weight,
                const void* bias, void* dh, void* dweight, void* dbias, float* dweight_sums);
void layers_fwd(const Executor&, DType, const LayerShape&, int count, const LayerWeights*, const void* x, void* y);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
