// What the forward and the backward of attention share: where a block works, the bias, the dropout mask.
#pragma once
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace fastbert::cuda {

// One head of one sequence, and the first of the rows that a block has of it.
struct Work {
  int sequence, start, length, first;

  __device__ __forceinline__ bool none() const { return first < 0 || first >= length; }
};

// Where a sequence starts. Offsets that point beyond all tokens, and sequences longer than was promised, are cut, so that
// no other memory is touched.
__device__ __forceinline__ int start_of(const AttentionShape& shape, int sequence) {
  return max(0, min(shape.cu_seqlens[sequence], static_cast<int>(shape.total)));
}

__device__ __forceinline__ int length_of(const AttentionShape& shape, int sequence) {
  return max(0, min(start_of(shape, sequence + 1) - start_of(shape, sequence), shape.max_seqlen));
}

// Tiles of `rows` rows of all sequences, without knowing the lengths when the grid is made: tile v belongs to the last
// sequence whose number start / rows + sequence is not above v. A sequence gets a tile more than it needs at most, which
// none() tells. Each warp searches for itself, 32 sequences at a time.
__device__ __forceinline__ Work find_work(const AttentionShape& shape, int tile, int rows) {
  const int lane = threadIdx.x % kWarp;
  int low = 0, count = shape.batch;
  while (count > 1) {
    const int step = (count + kWarp - 1) / kWarp, at = low + lane * step;
    const bool before = lane * step < count && shape.cu_seqlens[at] / rows + at <= tile;
    const int last = max(__popc(__ballot_sync(0xffffffffu, before)) - 1, 0);
    low += last * step;
    count = count - last * step < step ? count - last * step : step;
  }
  const int start = start_of(shape, low);
  return {low, start, length_of(shape, low), (tile - start / rows - low) * rows};
}

__host__ __device__ inline int count_tiles(int64_t total, int batch, int rows) { return static_cast<int>(total / rows) + batch; }

// A bias of the lowest float forbids a key. Where it forbids all of a row, they share the weight alike (as in PyTorch), and
// of so large a number the log-sum-exp could not tell how many they are; of this one, in units of log2, it can.
constexpr float kLowest = -65536.0f;

// The scores x [16, 8 N] in units of log2, with scale and bias; minus infinity where there is no column. row, column: of
// element 0, in the sequence. KEYS: rows are keys and columns queries. Rows beyond the length stay as they are. With a
// bias, what is finite is no lower than kLowest.
template <bool KEYS, bool BIAS, int N>
__device__ __forceinline__ void finish_scores(float (&x)[N][4], const AttentionShape& shape, const float* bias, int row,
                                              int column, int length) {
  const int lane = threadIdx.x % kWarp;
  const float scale = shape.scale * kLog2E;
  row += lane / 4, column += lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2 * 8, c = column + 8 * n + i % 2;
      x[n][i] *= scale;
      if (BIAS && r < length && c < length) {
        const float added = bias[(KEYS ? c : r) * shape.bias_strides[2] + (KEYS ? r : c)];
        x[n][i] += (added < 2.0f * kLowest ? 2.0f * kLowest : added) * kLog2E;  // or it might become minus infinity here
        if (x[n][i] < kLowest) x[n][i] = added == -INFINITY ? -INFINITY : kLowest;
      }
      if (c >= length) x[n][i] = -INFINITY;
    }
}

// The softmax of a warp's 16 rows over columns that come tile after tile. A lane has rows lane / 4 and lane / 4 + 8.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY};  // the highest score so far
  float total[2] = {};                    // the sum of this lane's weights so far

  // Turns scores into weights, 2 to the power of scale (score - top); scale is positive. What came of earlier weights is
  // to be multiplied by `shrink`, row by row.
  template <int N>
  __device__ __forceinline__ void weigh(float (&x)[N][4], float scale, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = top[half];
#pragma unroll
      for (int n = 0; n < N; ++n) high = fmaxf(high, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
      const float base = high == -INFINITY ? 0.0f : high * scale;  // no key yet: everything below is 0
      shrink[half] = exp2_approx(top[half] * scale - base);
      top[half] = high;
      total[half] *= shrink[half];
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          x[n][i] = exp2_approx(x[n][i] * scale - base);
          total[half] += x[n][i];
        }
    }
  }

  // After the last tile: what the weighted sums are to be multiplied by (and by `factor`), and the log-sum-exp.
  __device__ __forceinline__ void finish(float scale, float factor, float (&by)[2], float (&lse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
      total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
      by[half] = total[half] == 0.0f ? 0.0f : factor / total[half];
      lse[half] = top[half] * scale * kLn2 + logf(total[half]);
    }
  }
};

template <int N>
__device__ __forceinline__ void multiply_rows(float (&x)[N][4], const float (&by)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] *= by[i / 2];
}

// Which elements of C [16, 8 N] of a lane are kept: bit 2 n + i / 2 + 16 (i % 2) for element i of the n-th eight columns,
// so that they take one register and the draws need not be unrolled, and two that are packed have bits 16 apart.
// KEYS: rows are keys and columns are queries, not the other way round. own: the first row, column: the first column, both
// multiples of 16; `start`: the packed index of the sequence's first query.
template <bool KEYS, int N>
__device__ __forceinline__ uint32_t keep_tile(const DropoutMask& dropout, int start, int own, int column, int head) {
  static_assert(N <= 8 && N % 2 == 0);
  if (!dropout.active) return ~0u;
  uint64_t seed = dropout.seed;
  recompute(seed);  // or the keys of the rounds stay in registers all along
  const int lane = threadIdx.x % kWarp;
  // With queries as rows a call's eight elements are the lane's. With keys as rows those of two lanes, whose keys are
  // neighbours, are those of two calls, for neighbouring queries: each draws for one of the queries.
  const int odd = lane / 4 % 2;
  const uint32_t query = start + (KEYS ? column / 2 + lane % 4 * 2 + odd : own / 2 + lane / 4);
  const uint32_t key = KEYS ? own / 4 + lane / 8 : column / 4 + lane % 4;
  uint32_t keep = 0;
#pragma unroll 1
  for (int n = 0; n < N; n += 2) {
    const Philox4 random = philox4x32(seed, KEYS ? key : key + 2 * n, KEYS ? query + 4 * n : query, head, kStreamAttention);
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = KEYS ? i % 2 * 2 + i / 2 : i;  // the second half of the columns after the second of the rows
      kept |= kept_halves(random.word[i], dropout.threshold) >> (15 - at) & 0x00010001u << at;
    }
    keep |= kept << (2 * n);
  }
  if constexpr (KEYS) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, keep, 4);
    keep = odd ? (keep & 0xffff0000u) | other >> 16 : (keep & 0xffffu) | other << 16;
  }
  return keep;
}

// Whether element i of the n-th eight columns is among them.
__device__ __forceinline__ bool is_kept(uint32_t keep, int n, int i) { return keep >> (2 * n + i / 2 + 16 * (i % 2)) & 1; }

// A mask for the elements i and i + 1, i even, as they are packed.
__device__ __forceinline__ uint32_t kept_pair(uint32_t keep, int n, int i) {
  return (keep >> (2 * n + i / 2) & 0x00010001u) * 0xffffu;
}

// Short sequences: where none is longer, a block holds a head of one sequence, with all of its queries, keys and values.
constexpr int kShort = 128;

// Rows that such a block has room for: they are worked on 32 at a time.
__host__ __device__ __forceinline__ int short_rows(int max_seqlen) { return (max_seqlen + 31) / 32 * 32; }

// Its warps, for the shared memory that it takes; 0 if it does not fit. A warp works on 16 rows at a time. Four warps a
// block if more than one block has room on a multiprocessor, so that one loads while another multiplies; else `most`.
inline int short_warps(const Queue& queue, int max_seqlen, int shared, int most) {
  constexpr int kReserved = 1024;  // of shared memory a block, by CUDA
  if (max_seqlen > kShort || shared > shared_memory_per_block(queue)) return 0;
  if (2 * (shared + kReserved) <= shared_memory_per_multiprocessor(queue)) most = 4;
  const int needed = short_rows(max_seqlen) / 16;
  return needed < most ? needed : most;
}

// The work of such a block.
__device__ __forceinline__ Work short_work(const AttentionShape& shape) {
  const int sequence = blockIdx.x;
  return {sequence, start_of(shape, sequence), length_of(shape, sequence), 0};
}

// A query's log-sum-exp in units of log2, plus infinity where nothing may come of it.
__device__ __forceinline__ float lse_for_backward(const float* lse, int64_t at, bool valid) {
  const float value = valid ? lse[at] * kLog2E : INFINITY;
  return value == -INFINITY ? INFINITY : value;  // a query without a key
}

// Calls run(a value of the element type, the head size and whether there is a bias, as types).
template <class F>
void with_kernel(Format format, const AttentionShape& shape, const F& run) {
  const auto with_size = [&](auto type, auto size) {
    return shape.bias == nullptr ? run(type, size, std::false_type{}) : run(type, size, std::true_type{});
  };
  const auto sized = [&](auto type) {
    if (shape.head_dim == 32) return with_size(type, std::integral_constant<int, 32>{});
    if (shape.head_dim == 64) return with_size(type, std::integral_constant<int, 64>{});
    return with_size(type, std::integral_constant<int, 128>{});
  };
  if (format == Format::kBFloat16) return sized(bf16{});
  return sized(fp16{});
}

template <class T>
struct AttentionForward {
  const T* qkv;  // [total, 3, heads, D]
  T* out;        // [total, heads, D]
  float* lse;    // [heads, total]
  AttentionShape shape;
};

template <class T>
struct AttentionBackward {
  const T *dout, *qkv, *out;  // [total, heads, D], [total, 3, heads, D], [total, heads, D]
  const float* lse;           // [heads, total]
  float* delta;               // [heads, total]; not used for short sequences
  T* dqkv;                    // [total, 3, heads, D]
  float* dscores;             // [batch, heads, max_seqlen, max_seqlen] or null
  AttentionShape shape;
};

// For short sequences; false if the GPU has too little shared memory for it, or a sequence may be longer.
bool attention_short_fwd(const Queue&, const AttentionShape&, Format format, const void* qkv, void* out, float* lse);
bool attention_short_bwd(const Queue&, const AttentionShape&, Format format, const void* dout, const void* qkv,
                         const void* out, const float* lse, void* dqkv, float* dscores);

// For compute capability 9.0, where it was compiled (FASTBERT_SM90).
void attention_fwd_sm90(const Queue&, const AttentionShape&, Format format, const void* qkv, void* out, float* lse);
// Without a bias. delta is there; dq: zeros, where the gradient of the queries is summed. Does not repeat bit for bit.
void attention_bwd_sm90(const Queue&, const AttentionShape&, Format format, const void* dout, const void* qkv,
                        const float* lse, float* delta, void* dqkv, float* dq);

}  // namespace fastbert::cuda
