// What csrc/cuda offers: plain pointers into device memory in, plain pointers out, no PyTorch. cuda/ops.cpp checks
// arguments and allocates. Everything is queued on the stream; nothing waits, so that all of it can be captured into a
// CUDA graph. Errors are thrown as std::runtime_error.
#pragma once
#include <cstdint>

namespace fastbert::cuda {

enum class Format : int { kFloat32, kBFloat16, kFloat16 };

// Where to run.
struct Queue {
  int device;
  void* stream;  // cudaStream_t
};

// A vector [columns], or null.
struct Parameter {
  const void* data;
  Format format;
};

struct Dropout {
  const int64_t* seed;  // [1] in device memory; null if not active
  uint32_t threshold;
  float scale;
  bool active;
};

struct LayerNormShape {
  int64_t rows;
  int columns;
  Dropout dropout;
};

// y = LayerNorm(dropout(x + x_bias) + residual). x, residual (or null), y, z (or null): [rows, columns]; y and z in the
// wider of the formats of x and residual. mean, rstd (or null): [rows].
void layernorm_fwd(const Queue&, const LayerNormShape&, float eps, Parameter x, Parameter x_bias, Parameter residual,
                   Parameter weight, Parameter bias, void* y, void* z, float* mean, float* rstd);

// Sets of column sums that layernorm_bwd leaves in its workspace: [sets, 3, columns] floats.
int layernorm_bwd_sets(const Queue&, const LayerNormShape&);

// dy, z, dz, dx (null without dropout): [rows, columns] in one format. dweight, dbias: [columns] in weight's format.
// dx_bias (or null): [columns].
void layernorm_bwd(const Queue&, const LayerNormShape&, Format format, const void* dy, const void* z, Parameter weight,
                   const float* mean, const float* rstd, void* dz, void* dx, void* dweight, void* dbias, float* dx_bias,
                   float* workspace);

struct AttentionShape {
  int64_t total;
  int batch, heads, head_dim, max_seqlen;  // head_dim: 32, 64 or 128
  const int32_t* cu_seqlens;               // [batch + 1], in device memory
  float scale;
  Dropout dropout;
  const float* bias;        // null or additive, [batch|1, heads|1, rows|1, keys]
  int64_t bias_strides[3];  // in elements, 0 where it is broadcast
};

// qkv [total, 3, heads, head_dim] -> out [total, heads, head_dim], lse [heads, total]. 16-bit formats only; qkv and out
// lie on multiples of 16 bytes.
void attention_fwd(const Queue&, const AttentionShape&, Format format, const void* qkv, void* out, float* lse);

// Elements of attention_bwd's workspace dq: 0 where a kernel runs that has no use for it, and always if the result is to
// repeat bit for bit.
int64_t attention_bwd_workspace(const Queue&, const AttentionShape&, bool deterministic);

// dqkv as qkv. delta: workspace [heads, total]. dq: workspace, null if it has no elements. dbias (or null) as bias, whose
// dimensions are bias_shape; then dscores is a workspace [batch, heads, max_seqlen, max_seqlen].
void attention_bwd(const Queue&, const AttentionShape&, Format format, const void* dout, const void* qkv,
                   const void* out, const float* lse, void* dqkv, float* delta, float* dbias,
                   const int64_t* bias_shape, float* dscores, float* dq);

// A product [rows, depth] [depth, inner] of ffn, with its activation in the epilogue.
struct FfnShape {
  int rows, depth, inner;  // depth and inner are multiples of 8
};

// act = gelu(x w1^T + b1), pre (or null) what gelu is applied to: [rows, inner]. x [rows, depth], w1 [inner, depth],
// b1 [inner]. 16-bit formats only; every matrix lies on a multiple of 16 bytes.
void ffn_fwd(const Queue&, const FfnShape&, Format format, const void* x, const void* w1, const void* b1, void* pre,
             void* act);

// Elements of the workspace of ffn_bwd.
int64_t ffn_bwd_workspace(const FfnShape&);

// dpre = (dy w2) gelu'(pre), act = gelu(pre): [rows, inner]. db1 [inner] (or null) sums dpre over the rows, always in one
// order.
// dy [rows, depth], w2 [depth, inner].
void ffn_bwd(const Queue&, const FfnShape&, Format format, const void* dy, const void* w2, const void* pre, void* dpre,
             void* act, void* db1, float* workspace);

}  // namespace fastbert::cuda
