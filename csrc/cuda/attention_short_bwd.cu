// The backward of attention for sequences of at most 128 tokens, in one kernel: a block has a head of one sequence in
// shared memory. A warp takes 16 keys at a time and goes over the queries, for dk and dv; the gradients of the scores go
// to shared memory, from where they give dq. Scores and dropout masks are formed once, not twice as for longer sequences.
#include "cuda/attention.h"

namespace fastbert::cuda {
namespace {

constexpr int kWarps = 8;  // at most

// Queries that a warp has the scores of at a time: what the registers leave room for.
template <int D, bool BIAS>
constexpr int kQueriesOf = D == 128 && BIAS ? 16 : 32;

// Score gradients lie in tiles [rows, 64], a row for each key. Before them, the output has their place.
__host__ __device__ __forceinline__ int score_elements(int rows, int head_dim) {
  const int columns = (rows + 63) / 64 * 64;
  return rows * (columns > head_dim ? columns : head_dim);
}

template <class T, int D, bool BIAS>
__global__ void __launch_bounds__(kWarps* kWarp, 1) attention_short_bwd_kernel(AttentionBackward<T> a) {
  constexpr int kQueries = kQueriesOf<D, BIAS>, N = kQueries / 8;
  const AttentionShape& shape = a.shape;
  const int head = blockIdx.y, lane = threadIdx.x % kWarp;
  const Work work = short_work(shape);
  if (work.none()) return;
  const int64_t dout_stride = static_cast<int64_t>(shape.heads) * D, stride = 3 * dout_stride;
  const int64_t place = work.start * stride + head * D, dout_place = work.start * dout_stride + head * D;
  const float* const bias =
      BIAS ? shape.bias + work.sequence * shape.bias_strides[0] + head * shape.bias_strides[1] : nullptr;
  const DropoutMask dropout(shape.dropout);

  T* const memory = reinterpret_cast<T*>(shared_memory());
  const int most = short_rows(shape.max_seqlen), room = most * D, rows = short_rows(work.length);
  const Tile<T, D> queries{memory}, keys{memory + room}, values{memory + 2 * room}, douts{memory + 3 * room},
      outs{memory + 4 * room};
  const auto score_gradients = [&](int query) { return Tile<T, 64>{outs.data + query / 64 * most * 64}; };
  float* const lse = reinterpret_cast<float*>(outs.data + score_elements(most, D));
  float* const delta = lse + kShort;  // not `most`: one address serves both
  queries.fetch(a.qkv + place, stride, rows, work.length);
  keys.fetch(a.qkv + place + dout_stride, stride, rows, work.length);
  values.fetch(a.qkv + place + 2 * dout_stride, stride, rows, work.length);
  douts.fetch(a.dout + dout_place, dout_stride, rows, work.length);
  outs.fetch(a.out + dout_place, dout_stride, rows, work.length);
  commit_copies();
  for (int i = threadIdx.x; i < rows; i += blockDim.x)
    lse[i] = lse_for_backward(a.lse, head * shape.total + work.start + i, i < work.length);
  wait_for_copies<0>();
  __syncthreads();

  // delta = the sum over the head of dout out. A lane has eight of its elements.
  constexpr int kChunks = D / 8;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
    float x[8], y[8], sum = 0.0f;
    load<8>(douts.chunk(i / kChunks, i % kChunks), x);
    load<8>(outs.chunk(i / kChunks, i % kChunks), y);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
#pragma unroll
    for (int distance = kChunks / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (i % kChunks == 0) delta[i / kChunks] = sum;
  }
  __syncthreads();  // the output is not read any more

  const int first_own = threadIdx.x / kWarp * 16, own_step = blockDim.x / kWarp * 16;
#pragma unroll 1
  for (int own = first_own; own < work.length; own += own_step) {
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
#pragma unroll 1
    for (int query = 0; query < work.length; query += kQueries) {
      int row = own;
      recompute(row);
      const Tile<T, D> these{queries.data + query * D}, these_douts{douts.data + query * D};
      float p[N][4] = {}, kept[N][4], dp[N][4] = {};
      multiply_transposed<T, D>(p, keys, row, these);
      finish_scores<true, BIAS>(p, shape, bias, row, query, work.length);
      recompute(row);
      const uint32_t keep = keep_tile<true, N>(dropout, work.start, row, query, head);
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[n][i] = exp2_approx(p[n][i] - lse[query + lane % 4 * 2 + 8 * n + i % 2]);
          kept[n][i] = is_kept(keep, n, i) ? p[n][i] : 0.0f;
        }
      multiply_accumulators<T, D>(dv, kept, these_douts);
      multiply_transposed<T, D>(dp, values, row, these_douts);
      const float scale = dropout.active ? dropout.scale : 1.0f;
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float gradient = is_kept(keep, n, i) ? dp[n][i] * scale : 0.0f;
          p[n][i] *= gradient - delta[query + lane % 4 * 2 + 8 * n + i % 2];
          if (own + lane / 4 + i / 2 * 8 >= work.length) p[n][i] = 0.0f;  // no key: what was there may be infinite
        }
      if (BIAS && a.dscores != nullptr) {
        const int size = shape.max_seqlen;
        float* const to = a.dscores + (work.sequence * static_cast<int64_t>(shape.heads) + head) * (size * size);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int from = query + lane % 4 * 2 + 8 * n + i % 2, key = own + lane / 4 + i / 2 * 8;
            if (from < work.length && key < work.length) to[from * size + key] = p[n][i];
          }
      }
      const Tile<T, 64> to = score_gradients(query);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int chunk = query % 64 / 8 + n, key = own + lane / 4;
        reinterpret_cast<uint32_t*>(to.chunk(key, chunk))[lane % 4] = pack<T>(p[n][0], p[n][1]);
        reinterpret_cast<uint32_t*>(to.chunk(key + 8, chunk))[lane % 4] = pack<T>(p[n][2], p[n][3]);
      }
      multiply_accumulators<T, D>(dk, p, these);
    }
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dk[n][i] *= shape.scale;
        dv[n][i] *= dropout.active ? dropout.scale : 1.0f;
      }
    T* const to = a.dqkv + place + own * stride + dout_stride;
    __syncwarp();  // no lane reads these values any more
    write_rows<T, D>(dk, values, own, to, stride, work.length - own);
    __syncwarp();
    write_rows<T, D>(dv, values, own, to + dout_stride, stride, work.length - own);
  }
  __syncthreads();

#pragma unroll 1
  for (int own = first_own; own < work.length; own += own_step) {
    float dq[D / 8][4] = {};
    multiply_columns<T, D>(dq, score_gradients(own), own % 64, keys, work.length);
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[n][i] *= shape.scale;
    write_rows<T, D>(dq, queries, own, a.dqkv + place + own * stride, stride, work.length - own);
  }
}

}  // namespace

bool attention_short_bwd(const Queue& queue, const AttentionShape& shape, Format format, const void* dout,
                         const void* qkv, const void* out, const float* lse, void* dqkv, float* dscores) {
  const int rows = short_rows(shape.max_seqlen), head_dim = shape.head_dim;
  const int shared = (4 * rows * head_dim + score_elements(rows, head_dim)) * 2 + 2 * kShort * 4;
  const int warps = short_warps(queue, shape.max_seqlen, shared, kWarps);
  if (warps == 0) return false;
  with_kernel(format, shape, [&](auto type, auto size, auto has_bias) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    const AttentionBackward<T> a{static_cast<const T*>(dout), static_cast<const T*>(qkv), static_cast<const T*>(out),
                                 lse, nullptr, static_cast<T*>(dqkv), dscores, shape};
    launch(queue, "attention_bwd_cuda", attention_short_bwd_kernel<T, D, decltype(has_bias)::value>,
           dim3(shape.batch, shape.heads), warps * kWarp, shared, a);
  });
  return true;
}

}  // namespace fastbert::cuda
