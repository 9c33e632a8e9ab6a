// The products of ffn: what their epilogues compute, and which there are. The products themselves are CUTLASS's.
#pragma once
#include <cmath>

#include "cuda/device.h"

namespace fastbert::cuda {

// Of a tile of the product. A tile has one row in the workspace of column sums, whose rows are padded to whole tiles.
constexpr int kFfnRows = 128, kFfnColumns = 128;

__host__ __device__ __forceinline__ int64_t ffn_tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

// The standard normal distribution's share below v.
__device__ __forceinline__ float share_below(float v) {
  return 0.5f * (1.0f + erff(v * 0.7071067811865476f));
}

__device__ __forceinline__ float gelu(float v) { return v * share_below(v); }

// gelu(v), and its derivative: v times the density at v comes on top of the share.
__device__ __forceinline__ float gelu(float v, float* derivative) {
  const float share = share_below(v);
  *derivative = share + v * (0.3989422804014327f * expf(-0.5f * v * v));
  return v * share;
}

// What the epilogues make of N neighbouring elements of a product.
template <int N>
__device__ __forceinline__ void ffn_forward(const float (&product)[N], const float (&bias)[N], float (&pre)[N],
                                            float (&act)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    pre[i] = product[i] + bias[i];
    act[i] = gelu(pre[i]);
  }
}
template <int N>
__device__ __forceinline__ void ffn_backward(const float (&product)[N], const float (&pre)[N], float (&dpre)[N],
                                             float (&act)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float derivative;
    act[i] = gelu(pre[i], &derivative);
    dpre[i] = product[i] * derivative;
  }
}

// The operands of a product, as in cuda/kernels.h. columns: [tiles of rows, tiles of columns * kFfnColumns], the sums of
// dpre over the rows of each tile.
struct FfnForward {
  const void *x, *w1, *b1;
  void *pre, *act;
};
struct FfnBackward {
  const void *dy, *w2, *pre;
  void *dpre, *act;
  float* columns;
};

void ffn_sm80(const Queue&, const FfnShape&, Format, const FfnForward&);
void ffn_sm80(const Queue&, const FfnShape&, Format, const FfnBackward&);
void ffn_sm90(const Queue&, const FfnShape&, Format, const FfnForward&);
void ffn_sm90(const Queue&, const FfnShape&, Format, const FfnBackward&);

}  // namespace fastbert::cuda
