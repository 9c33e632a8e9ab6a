// The backward of attention, but for attention_bwd_sm90.cu. One kernel goes over the keys for a block's queries and gives
// dq, the other over the queries for a block's keys and gives dk and dv: no sum is shared between blocks, so that the
// result repeats bit for bit. Both are one template, in which a block's own rows are queries or keys and the columns,
// which it goes over, the other.
#include "cuda/attention.h"

namespace fastbert::cuda {
namespace {

constexpr int kWarps = 4, kRows = 16 * kWarps;

// Of a tile that is gone over: what the registers leave room for.
template <int D, bool BIAS>
constexpr int kColumnsOf = D < 128 ? 64 : BIAS ? 16 : 32;

template <int D, bool BIAS>
constexpr int shared_bytes() {
  return (2 * kRows + 4 * kColumnsOf<D, BIAS>) * D * 2 + 4 * kColumnsOf<D, BIAS> * 4;
}

// KEYS: the block's rows are keys.
template <class T, int D, bool KEYS, bool BIAS>
__global__ void __launch_bounds__(kWarps* kWarp, 1) attention_bwd_kernel(AttentionBackward<T> a) {
  constexpr int kColumns = kColumnsOf<D, BIAS>, N = kColumns / 8;
  const AttentionShape& shape = a.shape;
  const int head = blockIdx.y, lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * 16;
  const Work work = find_work(shape, blockIdx.x, kRows);
  if (work.none()) return;
  const int64_t dout_stride = static_cast<int64_t>(shape.heads) * D, stride = 3 * dout_stride;
  const T* const query = a.qkv + work.start * stride + head * D;
  const T *const key = query + dout_stride, *const value = key + dout_stride;
  const T* const dout = a.dout + work.start * dout_stride + head * D;
  const float* const bias =
      BIAS ? shape.bias + work.sequence * shape.bias_strides[0] + head * shape.bias_strides[1] : nullptr;
  const int64_t statistics = head * shape.total + work.start;
  const DropoutMask dropout(shape.dropout);

  // Own rows of q and dout (of k and v), and the columns' k and v (q and dout), two tiles of each.
  T* const memory = reinterpret_cast<T*>(shared_memory());
  const Tile<T, D> own_scores{memory}, own_grads{memory + kRows * D};
  const auto column_scores = [&](int tile) { return Tile<T, D>{memory + (2 * kRows + tile % 2 * kColumns) * D}; };
  const auto column_grads = [&](int tile) { return Tile<T, D>{memory + (2 * kRows + (2 + tile % 2) * kColumns) * D}; };
  float* const column_statistics = reinterpret_cast<float*>(memory + (2 * kRows + 4 * kColumns) * D);
  const auto fetch = [&](int tile) {
    const int first = tile * kColumns, valid = work.length - first;
    column_scores(tile).fetch((KEYS ? query : key) + first * stride, stride, kColumns, valid);
    if (KEYS) {
      column_grads(tile).fetch(dout + first * dout_stride, dout_stride, kColumns, valid);
      float* const to = column_statistics + tile % 2 * 2 * kColumns;
      for (int i = threadIdx.x; i < kColumns; i += blockDim.x) {
        to[i] = lse_for_backward(a.lse, statistics + first + i, i < valid);
        to[kColumns + i] = i < valid ? a.delta[statistics + first + i] : 0.0f;
      }
    } else {
      column_grads(tile).fetch(value + first * stride, stride, kColumns, valid);
    }
    commit_copies();
  };
  const int valid = work.length - work.first;
  own_scores.fetch((KEYS ? key : query) + work.first * stride, stride, kRows, valid);
  if (KEYS) {
    own_grads.fetch(value + work.first * stride, stride, kRows, valid);
  } else {
    own_grads.fetch(dout + work.first * dout_stride, dout_stride, kRows, valid);
  }
  fetch(0);
  float row_lse[2], row_delta[2];
#pragma unroll
  for (int half = 0; half < 2 && !KEYS; ++half) {
    const int row = work.first + own + lane / 4 + half * 8;
    row_lse[half] = lse_for_backward(a.lse, statistics + row, row < work.length);
    row_delta[half] = row < work.length ? a.delta[statistics + row] : 0.0f;
  }

  float first_sum[D / 8][4] = {}, second_sum[KEYS ? D / 8 : 1][4] = {};  // dq, or dk and dv
  const int tiles = (work.length + kColumns - 1) / kColumns;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      fetch(tile + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    const int row = work.first + own + lane / 4, column = tile * kColumns + lane % 4 * 2;  // of this lane's element 0
    const float* const lse = column_statistics + tile % 2 * 2 * kColumns + lane % 4 * 2;
    const float* const delta = lse + kColumns;

    float p[N][4] = {};
    multiply_transposed<T, D>(p, own_scores, own, column_scores(tile));
    finish_scores<KEYS, BIAS>(p, shape, bias, work.first + own, tile * kColumns, work.length);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[n][i] = exp2_approx(p[n][i] - (KEYS ? lse[8 * n + i % 2] : row_lse[i / 2]));

    const uint32_t keep = keep_tile<KEYS, N>(dropout, work.start, work.first + own, tile * kColumns, head);
    if constexpr (KEYS) {
      float kept[N][4];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[n][i] = is_kept(keep, n, i) ? p[n][i] : 0.0f;
      multiply_accumulators<T, D>(second_sum, kept, column_grads(tile));
    }
    float dp[N][4] = {};
    multiply_transposed<T, D>(dp, own_grads, own, column_grads(tile));
    const float scale = dropout.active ? dropout.scale : 1.0f;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float kept = is_kept(keep, n, i) ? dp[n][i] * scale : 0.0f;
        p[n][i] *= kept - (KEYS ? delta[8 * n + i % 2] : row_delta[i / 2]);
      }
    if (!KEYS && BIAS && a.dscores != nullptr) {
      const int64_t size = shape.max_seqlen;
      float* const out = a.dscores + (work.sequence * static_cast<int64_t>(shape.heads) + head) * size * size;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = row + i / 2 * 8, c = column + 8 * n + i % 2;
          if (r < work.length && c < work.length) out[r * size + c] = p[n][i];
        }
    }
    multiply_accumulators<T, D>(first_sum, p, column_scores(tile));
    __syncthreads();  // the tile is free
  }

  const int first = work.first + own;
  T* const out = a.dqkv + (work.start + first) * stride + head * D;
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      first_sum[n][i] *= shape.scale;
      if constexpr (KEYS) second_sum[n][i] *= dropout.active ? dropout.scale : 1.0f;
    }
  write_rows<T, D>(first_sum, own_scores, own, KEYS ? out + dout_stride : out, stride, work.length - first);
  if constexpr (KEYS)
    write_rows<T, D>(second_sum, own_grads, own, out + 2 * dout_stride, stride, work.length - first);
}

constexpr int kDeltaThreads = 256;

// delta = the sum over a head of dout out, and zeros in dq if it is there. A thread has eight of its elements.
template <class T, int D>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(int64_t total, int heads, const T* dout, const T* out, float* delta, float* dq) {
  constexpr int kLanes = D / 8;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x, count = total * heads * kLanes;
  float sum = 0.0f;
  if (vector < count) {
    float a[8], b[8];
    load<8>(dout + vector * 8, a);
    load<8>(out + vector * 8, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
    if (dq != nullptr) {
      const float zeros[8] = {};
      store<8>(dq + vector * 8, zeros);
    }
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  const int64_t place = vector / kLanes;  // token, head
  if (vector < count && vector % kLanes == 0) delta[place % heads * total + place / heads] = sum;
}

// What a bias is broadcast over is summed in parts, and these in a fixed order.
constexpr int kBiasThreads = 256, kBiasParts = 8;

// Over the queries, for a bias without them: dscores [size, size] of each sequence and head becomes its first row. A block
// has 32 columns of one.
__global__ void __launch_bounds__(kBiasThreads) attention_dscores_kernel(AttentionShape shape, float* dscores) {
  const int64_t size = shape.max_seqlen;
  const int blocks = (shape.max_seqlen + kWarp - 1) / kWarp, matrix = blockIdx.x / blocks;
  const int part = threadIdx.x / kWarp, column = blockIdx.x % blocks * kWarp + threadIdx.x % kWarp;
  const int length = length_of(shape, matrix / shape.heads);
  float* const place = dscores + matrix * size * size + column;
  float sum = 0.0f;
  if (column < length)
    for (int query = part; query < length; query += kBiasParts) sum += place[query * size];
  sum = sum_parts(sum, kWarp);
  if (part == 0 && column < length) *place = sum;
}

// Over sequences and heads. A part of the block has one element of dbias to a thread, [sequences, heads, rows, columns].
__global__ void __launch_bounds__(kBiasThreads)
    attention_dbias_kernel(AttentionShape shape, int64_t sequences, int64_t heads, int64_t rows, int64_t columns,
                           int parts, const float* dscores, float* dbias) {
  const int width = kBiasThreads / parts, part = threadIdx.x / width;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * width + threadIdx.x % width;
  const int64_t column = at % columns, row = at / columns % rows, head = at / columns / rows % heads;
  const int64_t sequence = at / columns / rows / heads, size = shape.max_seqlen;
  const int over_heads = heads == 1 ? shape.heads : 1, count = over_heads * (sequences == 1 ? shape.batch : 1);
  const bool inside = at < sequences * heads * rows * columns;
  float sum = 0.0f;
  for (int i = part; inside && i < count; i += parts) {
    const int b = static_cast<int>(sequence) + i / over_heads, length = length_of(shape, b);
    const int64_t matrix = static_cast<int64_t>(b) * shape.heads + head + i % over_heads;
    if (column < length && row < length) sum += dscores[(matrix * size + row) * size + column];
  }
  sum = sum_parts(sum, width);
  if (part == 0 && inside) dbias[at] = sum;
}

}  // namespace

int64_t attention_bwd_workspace(const Queue& queue, const AttentionShape& shape, bool deterministic) {
#ifdef FASTBERT_SM90
  if (!deterministic && shape.bias == nullptr && shape.max_seqlen > kShort && compute_capability(queue) == 90)
    return shape.total * shape.heads * shape.head_dim;
#endif
  return 0;
}

void attention_bwd(const Queue& queue, const AttentionShape& shape, Format format, const void* dout, const void* qkv,
                   const void* out, const float* lse, void* dqkv, float* delta, float* dbias,
                   const int64_t* bias_shape, float* dscores, float* dq) {
  const char* const name = "attention_bwd_cuda";
  const auto blocks = [](int64_t items, int threads) {
    return dim3(static_cast<unsigned>((items + threads - 1) / threads));
  };
  if (shape.total > 0 && !attention_short_bwd(queue, shape, format, dout, qkv, out, lse, dqkv, dscores)) {
    with_kernel(format, shape, [&](auto type, auto size, auto has_bias) {
      using T = decltype(type);
      constexpr int D = decltype(size)::value;
      constexpr bool BIAS = decltype(has_bias)::value;
      const T *const dout_data = static_cast<const T*>(dout), *const out_data = static_cast<const T*>(out);
      launch(queue, name, attention_delta_kernel<T, D>, blocks(shape.total * shape.heads * D / 8, kDeltaThreads),
             kDeltaThreads, 0, shape.total, shape.heads, dout_data, out_data, delta, dq);
#ifdef FASTBERT_SM90
      if (dq != nullptr) return attention_bwd_sm90(queue, shape, format, dout, qkv, lse, delta, dqkv, dq);
#endif
      const AttentionBackward<T> a{
          dout_data, static_cast<const T*>(qkv), out_data, lse, delta, static_cast<T*>(dqkv), dscores, shape};
      const dim3 grid(count_tiles(shape.total, shape.batch, kRows), shape.heads);
      launch(queue, name, attention_bwd_kernel<T, D, true, BIAS>, grid, kWarps * kWarp, shared_bytes<D, BIAS>(), a);
      launch(queue, name, attention_bwd_kernel<T, D, false, BIAS>, grid, kWarps * kWarp, shared_bytes<D, BIAS>(), a);
    });
  }
  if (dbias != nullptr) {
    constexpr int kShared = kBiasThreads * 4;
    if (bias_shape[2] == 1) {
      const int64_t matrices = static_cast<int64_t>(shape.batch) * shape.heads;
      launch(queue, name, attention_dscores_kernel, blocks(matrices * ((shape.max_seqlen + kWarp - 1) / kWarp), 1),
             kBiasThreads, kShared, shape, dscores);
    }
    const int64_t elements = bias_shape[0] * bias_shape[1] * bias_shape[2] * bias_shape[3];
    const int64_t to_one = (bias_shape[0] == 1 ? shape.batch : 1) * (bias_shape[1] == 1 ? shape.heads : 1);
    const int parts = to_one < kBiasParts ? 1 : kBiasParts;
    launch(queue, name, attention_dbias_kernel, blocks(elements, kBiasThreads / parts), kBiasThreads, kShared, shape,
           bias_shape[0], bias_shape[1], bias_shape[2], bias_shape[3], parts, static_cast<const float*>(dscores), dbias);
  }
}

}  // namespace fastbert::cuda
