// The products of ffn: what their epilogues compute, and which there are. The products themselves are CUTLASS's.
#pragma once
#include <cmath>

#include "cuda/device.h"

namespace fastbert::cuda {

// Of a tile of the product. A tile has one row in the workspace of column sums, whose rows are padded to whole tiles.
constexpr int kFfnRows = 128, kFfnColumns = 128;

__host__ __device__ __forceinline__ int64_t ffn_tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

// The standard normal distribution's share below v, and bell: e^(-v^2 / 2). The share beyond |v| has the form of 7.1.26
// in Abramowitz and Stegun, Handbook of Mathematical Functions, with one term more, as in kernels/triton/ffn.py: an
// error of up to 5e-7, and of up to 7e-6 of itself. erff takes twice the instructions, for bits that 16-bit results do
// not have.
__device__ __forceinline__ float share_below(float v, float& bell) {
  const float t = reciprocal_approx(1.0f + 0.2875f * fabsf(v));
  bell = exp2_approx(-0.5f * kLog2E * v * v);
  float sum = -0.096323112f;
  sum = sum * t + 0.3221214f;
  sum = sum * t - 0.14439103f;
  sum = sum * t + 0.21260244f;
  sum = sum * t + 0.088711655f;
  sum = sum * t + 0.11727868f;
  const float beyond = sum * t * bell;
  return v < 0.0f ? beyond : 1.0f - beyond;
}

// v times the share below it.
__device__ __forceinline__ float gelu(float v) {
  float bell;
  return v * share_below(v, bell);
}

// The same, and its derivative: v times the density at v comes on top of the share.
__device__ __forceinline__ float gelu(float v, float* derivative) {
  constexpr float kDensity = 0.3989422804014327f;  // at 0
  float bell;
  const float below = share_below(v, bell);
  *derivative = below + v * bell * kDensity;
  return v * below;
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
