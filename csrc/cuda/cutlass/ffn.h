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

// For compute capability 8.0: what a thread makes of its part of a tile, which is the same kFfnVector columns of several
// rows; kFfnThreadsToRow threads share a row. Of the rows some are fetched before they are visited, by their index.
constexpr int kFfnVector = 8, kFfnThreadsToRow = kFfnColumns / kFfnVector;

struct FfnPlace {
  int row, column, rows, inner;  // of the first element, and of the whole matrix

  __host__ __device__ __forceinline__ bool inside() const { return row < rows && column < inner; }
  __host__ __device__ __forceinline__ int64_t element() const { return static_cast<int64_t>(row) * inner + column; }
};

template <class T>
struct FfnForwardPart {
  using Operands = FfnForward;
  struct Shared {};

  __device__ __forceinline__ void fetch(const Operands&, int, const FfnPlace&) {}
  __device__ __forceinline__ void visit(const Operands& a, int, const FfnPlace& place,
                                        const float (&product)[kFfnVector]) {
    if (!place.inside()) return;
    float bias[kFfnVector], pre[kFfnVector], act[kFfnVector];
    load<kFfnVector>(static_cast<const T*>(a.b1) + place.column, bias);
    ffn_forward(product, bias, pre, act);
    if (a.pre != nullptr) store<kFfnVector>(static_cast<T*>(a.pre) + place.element(), pre);
    store<kFfnVector>(static_cast<T*>(a.act) + place.element(), act);
  }
  __device__ __forceinline__ void end(const Operands&, Shared*, int, int, int, int) {}
};

// ROWS: that are fetched at a time.
template <class T, int THREADS, int ROWS>
struct FfnBackwardPart {
  using Operands = FfnBackward;
  struct Shared {
    float sums[THREADS / kFfnThreadsToRow][kFfnColumns];
  };
  float sums[kFfnVector] = {};  // of dpre
  uint4 fetched[ROWS];          // of pre, while the product's elements change hands

  __device__ __forceinline__ void fetch(const Operands& a, int index, const FfnPlace& place) {
    if (place.inside())
      fetched[index] = *reinterpret_cast<const uint4*>(static_cast<const T*>(a.pre) + place.element());
  }
  __device__ __forceinline__ void visit(const Operands& a, int index, const FfnPlace& place,
                                        const float (&product)[kFfnVector]) {
    if (!place.inside()) return;
    float pre[kFfnVector], dpre[kFfnVector], act[kFfnVector];
    load<kFfnVector>(reinterpret_cast<const T*>(&fetched[index]), pre);
    ffn_backward(product, pre, dpre, act);
    store<kFfnVector>(static_cast<T*>(a.act) + place.element(), act);
    store<kFfnVector>(static_cast<T*>(a.dpre) + place.element(), dpre);
#pragma unroll
    for (int i = 0; i < kFfnVector; ++i) sums[i] += dpre[i];
  }
  __device__ __forceinline__ void end(const Operands& a, Shared* shared, int thread, int tile_row, int tile_column,
                                      int inner) {
    store<kFfnVector>(&shared->sums[thread / kFfnThreadsToRow][thread % kFfnThreadsToRow * kFfnVector], sums);
    __syncthreads();
    static_assert(THREADS == kFfnColumns);  // a column to each thread
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / kFfnThreadsToRow; ++i) total += shared->sums[i][thread];
    const int64_t stride = ffn_tiles(inner, kFfnColumns) * kFfnColumns;
    a.columns[tile_row * stride + tile_column * kFfnColumns + thread] = total;
  }
};

// For compute capability 9.0: adds up the columns of a tile, of which a warp group's threads have ELEMENTS of a subtile at
// a time, as wgmma leaves them: pairs in a row, 8 rows apart, 8 columns apart; `column` is the first.
constexpr int kFfnWarps = kFfnColumns / kWarp;  // of the warp group: a column to each thread
using FfnWarpSums = float[kFfnWarps][kFfnColumns];

template <int ELEMENTS>
struct FfnColumnSums {
  float own[ELEMENTS / 2];

  // first: of the subtiles of these columns.
  template <class VALUES>
  __device__ __forceinline__ void add(const VALUES& values, bool first) {
#pragma unroll
    for (int i = 0; i < ELEMENTS / 2; ++i) {
      const int upper = i / 2 * 4 + i % 2;
      const float sum = values[upper] + values[upper + 2];
      own[i] = first ? sum : own[i] + sum;
    }
  }
  // After the last of these subtiles. A warp together.
  __device__ __forceinline__ void share(FfnWarpSums& sums, int thread, int column) const {
#pragma unroll
    for (int i = 0; i < ELEMENTS / 2; ++i) {
      float sum = own[i];  // lanes four apart have the same columns
      sum += __shfl_xor_sync(0xffffffffu, sum, 4);
      sum += __shfl_xor_sync(0xffffffffu, sum, 8);
      sum += __shfl_xor_sync(0xffffffffu, sum, 16);
      if (thread % kWarp < 4) sums[thread / kWarp][column + i / 2 * 8 + i % 2] = sum;
    }
  }
};

// After all threads have shared theirs: of the column `thread`.
__device__ __forceinline__ float ffn_column_sum(const FfnWarpSums& sums, int thread) {
  static_assert(kFfnWarps == 4);
  return (sums[0][thread] + sums[1][thread]) + (sums[2][thread] + sums[3][thread]);
}

void ffn_sm80(const Queue&, const FfnShape&, Format, const FfnForward&);
void ffn_sm80(const Queue&, const FfnShape&, Format, const FfnBackward&);
void ffn_sm90(const Queue&, const FfnShape&, Format, const FfnForward&);
void ffn_sm90(const Queue&, const FfnShape&, Format, const FfnBackward&);

}  // namespace fastbert::cuda
