// Attention over packed sequences of at most 128 tokens, forward. A block has a head of one sequence in shared memory;
// a warp takes 16 queries at a time and has their scores with all keys in registers, so that the softmax is over in one
// pass. After the one barrier no warp waits for another.
#include "cuda/attention.h"

namespace fastbert::cuda {
namespace {

constexpr int kKeys = 32, kParts = kShort / kKeys;  // keys to a part, which is left out where the sequence has none

// Head sizes below 128 leave room for three blocks of four warps, in registers as in shared memory.
template <int D>
constexpr int kWarpsOf = D == 128 ? 8 : 4;

template <class T, int D, bool BIAS>
__global__ void __launch_bounds__(kWarpsOf<D>* kWarp, D == 128 ? 1 : 3) attention_short_fwd_kernel(AttentionForward<T> a) {
  const AttentionShape& shape = a.shape;
  const int head = blockIdx.y, lane = threadIdx.x % kWarp;
  const Work work = short_work(shape);
  if (work.none()) return;
  const int64_t stride = 3 * static_cast<int64_t>(shape.heads) * D, out_stride = static_cast<int64_t>(shape.heads) * D;
  const T* const query = a.qkv + work.start * stride + head * D;
  const float* const bias =
      BIAS ? shape.bias + work.sequence * shape.bias_strides[0] + head * shape.bias_strides[1] : nullptr;
  const DropoutMask dropout(shape.dropout);

  T* const memory = reinterpret_cast<T*>(shared_memory());
  const int room = short_rows(shape.max_seqlen) * D, rows = short_rows(work.length);
  const Tile<T, D> queries{memory}, keys{memory + room}, values{memory + 2 * room};
  queries.fetch(query, stride, rows, work.length);
  keys.fetch(query + out_stride, stride, rows, work.length);
  values.fetch(query + 2 * out_stride, stride, rows, work.length);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

#pragma unroll 1
  for (int own = threadIdx.x / kWarp * 16; own < work.length; own += blockDim.x / kWarp * 16) {
    float x[kParts][kKeys / 8][4];
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = part * kKeys;
      if (first >= work.length) continue;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[part][n][i] = 0.0f;
      multiply_transposed<T, D>(x[part], queries, own, Tile<T, D>{keys.data + first * D});
      finish_scores<false, BIAS>(x[part], shape, bias, own, first, work.length);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], x[part][n][i]);
    }
    float base[2];  // where every key is forbidden, 0: what is below it is 0 all the same
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffffu, top[half], 2));
      base[half] = top[half] == -INFINITY ? 0.0f : top[half];
    }
    float result[D / 8][4] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int first = part * kKeys;
      if (first >= work.length) continue;
      const uint32_t keep = keep_tile<false, kKeys / 8>(dropout, work.start, own, first, head);
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = exp2_approx(x[part][n][i] - base[i / 2]);
          total[i / 2] += p;
          x[part][n][i] = is_kept(keep, n, i) ? p : 0.0f;
        }
      multiply_accumulators<T, D>(result, x[part], Tile<T, D>{values.data + first * D});
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
      const float factor = total[half] == 0.0f ? 0.0f : (dropout.active ? dropout.scale : 1.0f) / total[half];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) result[n][2 * half] *= factor, result[n][2 * half + 1] *= factor;
      const int row = own + lane / 4 + half * 8;
      if (lane % 4 == 0 && row < work.length)
        a.lse[head * shape.total + work.start + row] = top[half] * kLn2 + logf(total[half]);
    }
    __syncwarp();  // no lane reads these queries any more
    write_rows<T, D>(result, queries, own, a.out + (work.start + own) * out_stride + head * D, out_stride,
                     work.length - own);
  }
}

}  // namespace

bool attention_short_fwd(const Queue& queue, const AttentionShape& shape, Format format, const void* qkv, void* out,
                         float* lse) {
  bool fits = false;
  with_kernel(format, shape, [&](auto type, auto size, auto has_bias) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    const int shared = 3 * short_rows(shape.max_seqlen) * D * 2;
    const int warps = short_warps(queue, shape.max_seqlen, shared, kWarpsOf<D>);
    if (warps == 0) return;
    const AttentionForward<T> a{static_cast<const T*>(qkv), static_cast<T*>(out), lse, shape};
    launch(queue, "attention_fwd_cuda", attention_short_fwd_kernel<T, D, decltype(has_bias)::value>,
           dim3(shape.batch, shape.heads), warps * kWarp, shared, a);
    fits = true;
  });
  return fits;
}

}  // namespace fastbert::cuda
