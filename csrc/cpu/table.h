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
             const void* pre, const void* w1, const void* w2, void* dx, void* dw1, void* db1, void* dw2, float* workspace);
void attention_fwd(const Executor&, DType, const AttentionShape&, const void* qkv, void* out, float* lse);
void attention_bwd(const Executor&, DType, const AttentionShape&, const void* dout, const void* qkv, const void* out,
                   const float* lse, void* dqkv, float* dbias);
double fma_rate(double seconds);

}  // namespace FASTBERT_ISA
}  // namespace fastbert
