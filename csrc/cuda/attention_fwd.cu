// Attention over packed sequences, forward: the online softmax of FlashAttention (Dao et al. 2022) on mma.sync. A warp has
// 16 queries; tiles of 64 keys and values arrive by cp.async while those before them are worked on.
#include "cuda/attention.h"

namespace fastbert::cuda {
namespace {

constexpr int kKeys = 64;  // to a tile
constexpr int kWarps = 4, kRows = 16 * kWarps;

template <class T, int D, bool BIAS>
__global__ void __launch_bounds__(kWarps* kWarp, 1) attention_fwd_kernel(AttentionForward<T> a) {
  const AttentionShape& shape = a.shape;
  const int head = blockIdx.y, lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * 16;
  const Work work = find_work(shape, blockIdx.x, kRows);
  if (work.none()) return;
  const int64_t stride = 3 * static_cast<int64_t>(shape.heads) * D;
  const T* const query = a.qkv + work.start * stride + head * D;
  const T *const key = query + shape.heads * D, *const value = key + shape.heads * D;
  const float* const bias =
      BIAS ? shape.bias + work.sequence * shape.bias_strides[0] + head * shape.bias_strides[1] : nullptr;
  const DropoutMask dropout(shape.dropout);

  T* const memory = reinterpret_cast<T*>(shared_memory());
  const Tile<T, D> queries{memory};
  const auto keys = [&](int tile) { return Tile<T, D>{memory + (kRows + tile % 2 * kKeys) * D}; };
  const auto values = [&](int tile) { return Tile<T, D>{memory + (kRows + (2 + tile % 2) * kKeys) * D}; };
  const auto fetch = [&](int tile) {
    const int first = tile * kKeys;
    keys(tile).fetch(key + first * stride, stride, kKeys, work.length - first);
    values(tile).fetch(value + first * stride, stride, kKeys, work.length - first);
    commit_copies();
  };
  queries.fetch(query + work.first * stride, stride, kRows, work.length - work.first);
  fetch(0);

  float result[D / 8][4] = {};
  OnlineSoftmax softmax;
  const int tiles = (work.length + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    float x[kKeys / 8][4] = {};
    multiply_transposed<T, D>(x, queries, own, keys(tile));
    finish_scores<false, BIAS>(x, shape, bias, work.first + own, tile * kKeys, work.length);
    float shrink[2];
    softmax.weigh(x, 1.0f, shrink);
    multiply_rows(result, shrink);
    if (dropout.active) {
      const uint32_t keep =
          keep_tile<false, kKeys / 8>(dropout, work.start, work.first + own, tile * kKeys, head);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = is_kept(keep, n, i) ? x[n][i] : 0.0f;
    }
    multiply_accumulators<T, D>(result, x, values(tile));
    __syncthreads();  // the tile is free
  }

  float by[2], lse[2];
  softmax.finish(1.0f, dropout.active ? dropout.scale : 1.0f, by, lse);
  multiply_rows(result, by);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = work.first + own + lane / 4 + half * 8;
    if (lane % 4 == 0 && row < work.length) a.lse[head * shape.total + work.start + row] = lse[half];
  }
  const int64_t out_stride = static_cast<int64_t>(shape.heads) * D;
  const int first = work.first + own;
  write_rows<T, D>(result, queries, own, a.out + (work.start + first) * out_stride + head * D, out_stride,
                   work.length - first);
}

}  // namespace

void attention_fwd(const Queue& queue, const AttentionShape& shape, Format format, const void* qkv, void* out,
                   float* lse) {
  if (shape.total == 0 || attention_short_fwd(queue, shape, format, qkv, out, lse)) return;
#ifdef FASTBERT_SM90
  if (compute_capability(queue) == 90) return attention_fwd_sm90(queue, shape, format, qkv, out, lse);
#endif
  with_kernel(format, shape, [&](auto type, auto size, auto has_bias) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    const AttentionForward<T> a{static_cast<const T*>(qkv), static_cast<T*>(out), lse, shape};
    launch(queue, "attention_fwd_cuda", attention_fwd_kernel<T, D, decltype(has_bias)::value>,
           dim3(count_tiles(shape.total, shape.batch, kRows), shape.heads), kWarps * kWarp,
           (kRows + 4 * kKeys) * D * 2, a);
  });
}

}  // namespace fastbert::cuda
