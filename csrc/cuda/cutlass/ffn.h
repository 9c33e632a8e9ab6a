// The products of ffn: what their epilogues compute, and which there are. The products themselves are CUTLASS's.
#pragma once
#include <cmath>

#include "cuda/device.h"

namespace fastbert::cuda {

// Of a tile of the product. A tile has one row in the workspace of column sums, whose rows are padded to whole tiles.
constexpr int kFfnRows = 128, kFfnColumns = 128;

__host__ __device__ __forceinline__ int64_t ffn_tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

// The standard normal distribution's share beyond |v|, and bell: e^(-v^2 / 2). The approximation of the error function is
// Abramowitz and Stegun's 7.1.26, of an absolute error of at most 1.5e-7: erff takes twice as many instructions, for
// bits that 16-bit results do not have.
__device__ __forceinline__ float share_beyond(float v, float& bell) {
  constexpr float kSqrtHalf = 0.7071067811865476f;
  const float t = reciprocal_approx(1.0f + 0.3275911f * kSqrtHalf * fabsf(v));
  bell = exp2_approx(-0.5f * kLog2E * v * v);
  float sum = 0.5f * 1.061405429f;
  sum = sum * t - 0.5f * 1.453152027f;
  sum = sum * t + 0.5f * 1.421413741f;
  sum = sum * t - 0.5f * 0.284496736f;
  sum = sum * t + 0.5f * 0.254829592f;
  return sum * t * bell;
}

// v times the share below it.
__device__ __forceinline__ float gelu(float v) {
  float bell;
  return fmaxf(v, 0.0f) - fabsf(v) * share_beyond(v, bell);
}

// The same, and its derivative: v times the density at v comes on top of the share.
__device__ __forceinline__ float gelu(float v, float* derivative) {
  constexpr float kDensity = 0.3989422804014327f;  // at 0
  float bell;
  const float beyond = share_beyond(v, bell), below_negative = beyond - fabsf(v) * bell * kDensity;
  *derivative = v < 0.0f ? below_negative : 1.0f - below_negative;
  return fmaxf(v, 0.0f) - fabsf(v) * beyond;
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
