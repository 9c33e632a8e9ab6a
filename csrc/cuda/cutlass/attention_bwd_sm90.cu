// Attention, backward, for compute capability 9.0 (compiled for sm_90a), by the design of FlashAttention-3 (Shah et al.
// 2024). A block has 128 keys of a head and goes once over its queries: five products, where attention_bwd.cu has seven.
// One warp loads by TMA, two prepare what was loaded, two warp groups multiply by wgmma, each for 64 of the keys. Rows
// are keys, so that the weights are an operand of dv as they lie in registers. dq sums over the keys: the groups exchange
// the gradients of their scores by shared memory, each forms half of the block's part of dq, and adds it to a float32 copy
// in device memory; from registers, because a box would add to the next sequence, too. Blocks do that in any order, so
// that dq does not repeat bit for bit.
#include "cuda/attention.h"
#include "cuda/cutlass/hopper.h"

namespace fastbert::cuda {
namespace {

constexpr int kGroups = 2, kKeys = 64 * kGroups;
constexpr int kMultiplyingWarps = 4 * kGroups, kThreads = kWarpGroup * (1 + kGroups);
constexpr int kStages = 2;  // tiles of queries that have room

// Of a tile: what the registers leave room for.
template <int D>
constexpr int kQueries = D < 128 ? 128 : 64;

// Parts in which the gradients of a tile's weights are formed, for the same reason.
template <int D>
constexpr int kParts = D < 128 ? 2 : 1;

template <int D>
struct Memory {
  static constexpr int M = kQueries<D>;
  using Keys = BoxedTile<kKeys, D>;
  using Queries = BoxedTile<M, D>;
  using Scores = BoxedTile<kKeys, M>;

  struct Statistics {
    float lse[M], delta[M];
  };
  // full: the tile has arrived. prepared: nothing of another sequence is in it, and its statistics are there. empty: it
  // was read, and its place may be written.
  struct Barriers {
    Barrier keys_full, values_full;
    Barrier queries_full[kStages], queries_empty[kStages];
    Barrier douts_full[kStages], douts_empty[kStages];
    Barrier prepared[kStages];
  };
  static constexpr int kAlignment = 1024, kOfQueries = 2 * Keys::kBytes, kOfDouts = kOfQueries + kStages * Queries::kBytes;
  static constexpr int kOfScores = kOfDouts + kStages * Queries::kBytes, kOfStatistics = kOfScores + 2 * Scores::kBytes;
  static constexpr int kOfBarriers = kOfStatistics + kStages * static_cast<int>(sizeof(Statistics));
  static constexpr int kBytes = kAlignment + kOfBarriers + static_cast<int>(sizeof(Barriers));

  char* begin;

  __device__ __forceinline__ Memory()
      : begin(shared_memory() + (kAlignment - address_of(shared_memory()) % kAlignment) % kAlignment) {}
  __device__ __forceinline__ Keys keys() const { return {begin}; }
  __device__ __forceinline__ Keys values() const { return {begin + Keys::kBytes}; }
  __device__ __forceinline__ Queries queries(int tile) const {
    return {begin + kOfQueries + tile % kStages * Queries::kBytes};
  }
  __device__ __forceinline__ Queries douts(int tile) const { return {begin + kOfDouts + tile % kStages * Queries::kBytes}; }
  // The gradients of the scores. Of two tiles, or a warp group would have to wait for the other's product.
  __device__ __forceinline__ Scores scores(int tile) const { return {begin + kOfScores + tile % 2 * Scores::kBytes}; }
  __device__ __forceinline__ Statistics& statistics(int tile) const {
    return reinterpret_cast<Statistics*>(begin + kOfStatistics)[tile % kStages];
  }
  __device__ __forceinline__ Barriers& barriers() const { return *reinterpret_cast<Barriers*>(begin + kOfBarriers); }
};

// The parity of the phase in which a tile is in its place.
__device__ __forceinline__ uint32_t phase_of(int tile) { return tile / kStages & 1; }

template <class T>
struct AttentionBackwardBoxed {
  TensorMap keys, queries, douts;  // of qkv [total, 3 heads D], the same, and dout [total, heads D]
  AttentionBackward<T> a;
  float* dq;  // [total, heads, D]
};

// The tiles of queries that a block goes over.
template <int D>
__device__ __forceinline__ int count_tiles(const Work& work) {
  return (work.length + kQueries<D> - 1) / kQueries<D>;
}
template <int D>
__device__ __forceinline__ bool ends_within(const Work& work, int tile) {
  return (tile + 1) * kQueries<D> > work.length;
}

// One thread.
template <class T, int D>
__device__ __forceinline__ void load_tiles(const AttentionBackwardBoxed<T>& boxed, const Memory<D>& memory,
                                           const Work& work, int head) {
  auto& barriers = memory.barriers();
  const int width = boxed.a.shape.heads * D, column = head * D;
#pragma unroll 1
  for (int tile = 0; tile < count_tiles<D>(work); ++tile) {
    const int stage = tile % kStages, row = work.start + tile * kQueries<D>;
    if (tile == 0) memory.keys().fetch(boxed.keys, barriers.keys_full, work.start + work.first, column + width);
    barriers.queries_empty[stage].wait(phase_of(tile) ^ 1);
    memory.queries(tile).fetch(boxed.queries, barriers.queries_full[stage], row, column);
    if (tile == 0) memory.values().fetch(boxed.keys, barriers.values_full, work.start + work.first, column + 2 * width);
    barriers.douts_empty[stage].wait(phase_of(tile) ^ 1);
    memory.douts(tile).fetch(boxed.douts, barriers.douts_full[stage], row, column);
  }
}

// One warp.
template <class T, int D>
__device__ __forceinline__ void load_statistics(const AttentionBackward<T>& a, const Memory<D>& memory,
                                                const Work& work, int head) {
  auto& barriers = memory.barriers();
  const int64_t begin = head * a.shape.total + work.start;
#pragma unroll 1
  for (int tile = 0; tile < count_tiles<D>(work); ++tile) {
    auto& statistics = memory.statistics(tile);
    barriers.douts_empty[tile % kStages].wait(phase_of(tile) ^ 1);
#pragma unroll  // so that it waits for memory once
    for (int i = threadIdx.x % kWarp; i < kQueries<D>; i += kWarp) {
      const int row = tile * kQueries<D> + i;
      statistics.lse[i] = lse_for_backward(a.lse, begin + row, row < work.length);
      statistics.delta[i] = row < work.length ? a.delta[begin + row] : 0.0f;
    }
    barriers.prepared[tile % kStages].arrive();
  }
}

// One warp. A box runs on into the next sequence, whose rows are summed over and would count if they were infinite: 0
// times infinity is NaN.
template <int D>
__device__ __forceinline__ void clean_tiles(const Memory<D>& memory, const Work& work) {
  auto& barriers = memory.barriers();
  if (work.first + kKeys > work.length) {
    barriers.keys_full.wait(0);
    memory.keys().clean(work.length - work.first);
  }
#pragma unroll 1
  for (int tile = 0; tile < count_tiles<D>(work); ++tile) {
    const int stage = tile % kStages, valid = work.length - tile * kQueries<D>;
    barriers.queries_full[stage].wait(phase_of(tile));
    if (valid < kQueries<D>) memory.queries(tile).clean(valid);
    barriers.douts_full[stage].wait(phase_of(tile));
    if (valid < kQueries<D>) memory.douts(tile).clean(valid);
    barriers.prepared[stage].arrive();
  }
}

// Adds a warp's c [16, 8 N] to `valid` rows of `to`, 16 bytes at a time: two lanes with parts of two times eight columns
// exchange them, so that each has four columns.
template <int N>
__device__ __forceinline__ void add_rows(const float (&c)[N][4], float* to, int64_t stride, int valid) {
  const int lane = threadIdx.x % kWarp, odd = lane & 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      float own[2], other[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float first = c[n][2 * half + i], second = c[n + 1][2 * half + i];
        own[i] = odd ? second : first;
        other[i] = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      }
      if (row < valid)
        add_to_memory(to + row * stride + (n + odd) * 8 + lane % 4 / 2 * 4,
                      odd ? make_float4(other[0], other[1], own[0], own[1])
                          : make_float4(own[0], own[1], other[0], other[1]));
    }
  }
}

template <class T, int D>
__device__ __forceinline__ void multiply_tiles(const AttentionBackwardBoxed<T>& boxed, const Memory<D>& memory,
                                               const Work& work, int head) {
  constexpr int M = kQueries<D>, P = M / kParts<D>;
  // Of a tile's part of dq a warp group has 64 queries, or 64 columns of all.
  constexpr int kColumns = M == 128 ? D : D / 2;
  static_assert(M == 128 || kColumns == 64);
  const AttentionShape& shape = boxed.a.shape;
  auto& barriers = memory.barriers();
  const int group = threadIdx.x / kWarpGroup - 1, lane = threadIdx.x % kWarp;
  const int of_group = threadIdx.x % kWarpGroup / kWarp * 16;  // the warp's first row of 64
  const int own = work.first + group * 64 + of_group;          // the warp's first key in the sequence
  const int tiles = count_tiles<D>(work);
  const float scale = shape.scale * kLog2E, kept_scale = shape.dropout.active ? shape.dropout.scale : 1.0f;

  float x[M / 8][4], dx[P / 8][4], dq[kColumns / 8][4], dk[D / 8][4], dv[D / 8][4];
  uint32_t weights[M / 16][4], keep[M / 64];

  // What is computed from it is computed in place: the loop has no registers for what does not change in it.
  const auto here = [](int value) {
    recompute(value);
    return value;
  };
  const auto release = [&](Barrier& barrier) {
    if (threadIdx.x % kWarp == 0) barrier.arrive();
  };
  const auto start_scores = [&](int tile) {
    const int stage = tile % kStages;
    const auto keys = memory.keys();
    const auto queries = memory.queries(tile);
    barriers.queries_full[stage].wait(phase_of(tile));
    if (ends_within<D>(work, tile)) barriers.prepared[stage].wait(phase_of(tile));
    const int row = here(group) * 64;
    hold(x);
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) multiply_by_rows<T>(x, keys.by_rows(row, k), queries.by_rows(0, k), k > 0);
    commit_products();
  };
  // Which weights of a tile are kept: drawn while products are under way.
  const auto draw = [&](int tile) {
    const DropoutMask dropout(shape.dropout);
#pragma unroll
    for (int part = 0; part < M / 64; ++part)
      keep[part] = keep_tile<true, 8>(dropout, work.start, own, tile * M + 64 * part, head);
  };
  const auto start_weight_grads = [&](int tile, int part) {
    const auto values = memory.values();
    const auto douts = memory.douts(tile);
    const int row = here(group) * 64;
    hold(dx);
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) multiply_by_rows<T>(dx, values.by_rows(row, k), douts.by_rows(part * P, k), k > 0);
    commit_products();
  };
  // From scores to weights, and those that are kept as an operand.
  const auto weigh = [&](int tile) {
    const float* const lse = memory.statistics(tile).lse + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < M / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = exp2_approx(x[n][i] * scale - lse[8 * n + i % 2]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) weights[n / 2][n % 2 * 2 + i / 2] = pack<T>(x[n][i], x[n][i + 1]);
    }
    if (shape.dropout.active) {
#pragma unroll
      for (int n = 0; n < M / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; i += 2) weights[n / 2][n % 2 * 2 + i / 2] &= kept_pair(keep[n / 8], n % 8, i);
    }
  };
  const auto start_dv = [&](int tile) {
    const auto douts = memory.douts(tile);
    hold(dv);
    hold(weights);
    begin_products();
#pragma unroll
    for (int k = 0; k < M / 16; ++k) multiply_by_columns<T>(dv, weights[k], douts.by_columns(k), k > 0 || tile > 0);
    commit_products();
  };
  // From gradients of weights to those of scores, as an operand and for the other warp group.
  const auto finish_grads = [&](int tile, int part) {
    const auto scores = memory.scores(tile);
    const int row = here(group) * 64 + of_group;
    const float* const delta = memory.statistics(tile).delta + lane % 4 * 2;
    if (shape.dropout.active) {
#pragma unroll
      for (int n = 0; n < P / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = part * P / 8 + n;
          dx[n][i] = is_kept(keep[column / 8], column % 8, i) ? dx[n][i] * kept_scale : 0.0f;
        }
    }
#pragma unroll
    for (int n = 0; n < P / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = part * P / 8 + n;
        dx[n][i] = x[column][i] * (dx[n][i] - delta[8 * column + i % 2]);
      }
    if (work.first + kKeys > work.length) {
#pragma unroll
      for (int n = 0; n < P / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (own + lane / 4 + i / 2 * 8 >= work.length) dx[n][i] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < P / 16; ++j) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack<T>(dx[2 * j + i / 2][i % 2 * 2], dx[2 * j + i / 2][i % 2 * 2 + 1]);
      scores.store(row, part * P / 16 + j, words);
    }
  };
  const auto start_dq = [&](int tile) {
    const auto scores = memory.scores(tile);
    const auto keys = memory.keys();
    const int which = here(group);
    hold(dq);
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      multiply_columns<T>(dq, scores.by_columns(k, M == 128 ? which : 0), keys.by_columns(k, M == 128 ? 0 : which),
                          k > 0);
    commit_products();
  };
  const auto start_dk = [&](int tile) {
    const auto queries = memory.queries(tile);
    const auto scores = memory.scores(tile);
    const int row = here(group) * 64;
    hold(dk);
    begin_products();
#pragma unroll
    for (int k = 0; k < M / 16; ++k)
      multiply_by_columns<T>(dk, scores.by_rows(row, k), queries.by_columns(k), k > 0 || tile > 0);
    commit_products();
  };
  const auto end_dq = [&](int tile) {
    hold(dq);
    release(barriers.douts_empty[tile % kStages]);
    const int which = here(group), first = tile * M + (M == 128 ? which * 64 : 0) + of_group;
    const int64_t stride = static_cast<int64_t>(shape.heads) * D;
    float* const to = boxed.dq + (work.start + first) * stride + head * D + (M == 128 ? 0 : which * 64);
    add_rows(dq, to, stride, work.length - first);
  };

  barriers.keys_full.wait(0);
  start_scores(0);
  draw(0);
  barriers.values_full.wait(0);
  wait_for_products<0>();
  hold(x);
  int tile = 0;
  while (true) {
    barriers.douts_full[tile % kStages].wait(phase_of(tile));  // shows what TMA wrote, though `prepared` comes after it
    barriers.prepared[tile % kStages].wait(phase_of(tile));
    start_weight_grads(tile, 0);
    weigh(tile);
    start_dv(tile);
    wait_for_products<1>();
    hold(dx);
    finish_grads(tile, 0);
#pragma unroll
    for (int part = 1; part < kParts<D>; ++part) {
      start_weight_grads(tile, part);
      wait_for_products<0>();
      hold(dx);
      finish_grads(tile, part);
    }
    publish_to_async();
    wait_at(0, kGroups * kWarpGroup);
    start_dq(tile);
    start_dk(tile);
    wait_for_products<1>();
    end_dq(tile);
    if (tile + 1 == tiles) break;
    start_scores(tile + 1);
    draw(tile + 1);
    wait_for_products<0>();
    hold(x);
    release(barriers.queries_empty[tile % kStages]);
    ++tile;
  }
  wait_for_products<0>();
  hold(dk);
  hold(dv);
  const int64_t stride = static_cast<int64_t>(shape.heads) * D;
  multiply_rows(dk, {shape.scale, shape.scale});
  multiply_rows(dv, {kept_scale, kept_scale});
  T* const to = boxed.a.dqkv + (work.start + own) * 3 * stride + stride + head * D;
  write_rows<T, D>(dk, to, 3 * stride, work.length - own);
  write_rows<T, D>(dv, to + stride, 3 * stride, work.length - own);
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ AttentionBackwardBoxed<T> boxed) {
  const AttentionShape& shape = boxed.a.shape;
  const Work work = find_work(shape, blockIdx.x, kKeys);
  if (work.none()) return;
  const Memory<D> memory;
  auto& barriers = memory.barriers();
  if (threadIdx.x == 0) {
    barriers.keys_full.init(1), barriers.values_full.init(1);
    for (int i = 0; i < kStages; ++i) {
      barriers.queries_full[i].init(1), barriers.queries_empty[i].init(kMultiplyingWarps);
      barriers.douts_full[i].init(1), barriers.douts_empty[i].init(kMultiplyingWarps);
      barriers.prepared[i].init(2 * kWarp);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpGroup) {
    give_registers<24>();
    if (threadIdx.x == 0) {
      load_tiles<T, D>(boxed, memory, work, blockIdx.y);
    } else if (threadIdx.x / kWarp == 1) {
      load_statistics<T, D>(boxed.a, memory, work, blockIdx.y);
    } else if (threadIdx.x / kWarp == 2) {
      clean_tiles<D>(memory, work);
    }
  } else {
    take_registers<240>();
    multiply_tiles<T, D>(boxed, memory, work, blockIdx.y);
  }
}

constexpr int kRoundThreads = 256;

// The gradient of the queries from its sums. A thread has eight of its elements.
template <class T, int D>
__global__ void __launch_bounds__(kRoundThreads)
    attention_dq_sm90_kernel(int64_t total, int heads, float scale, const float* dq, T* dqkv) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kRoundThreads + threadIdx.x, row = heads * (D / 8);
  if (vector >= total * row) return;
  float sums[8];
  load<8>(dq + vector * 8, sums);
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] *= scale;
  store<8>(dqkv + (vector / row * 3 * row + vector % row) * 8, sums);
}

}  // namespace

void attention_bwd_sm90(const Queue& queue, const AttentionShape& shape, Format format, const void* dout,
                        const void* qkv, const float* lse, float* delta, void* dqkv, float* dq) {
  with_kernel(format, shape, [&](auto type, auto size, auto) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value, kBox = BoxedTile<kKeys, D>::kColumns;
    const char* const name = "attention_bwd_cuda";
    const int64_t width = static_cast<int64_t>(shape.heads) * D;
    const AttentionBackwardBoxed<T> boxed{make_tensor_map(queue, name, qkv, shape.total, 3 * width, kKeys, kBox),
                                          make_tensor_map(queue, name, qkv, shape.total, 3 * width, kQueries<D>, kBox),
                                          make_tensor_map(queue, name, dout, shape.total, width, kQueries<D>, kBox),
                                          {static_cast<const T*>(dout), static_cast<const T*>(qkv), nullptr, lse, delta,
                                           static_cast<T*>(dqkv), nullptr, shape},
                                          dq};
    launch(queue, name, attention_bwd_sm90_kernel<T, D>, dim3(count_tiles(shape.total, shape.batch, kKeys), shape.heads),
           kThreads, Memory<D>::kBytes, boxed);
    const int64_t blocks = (shape.total * width / 8 + kRoundThreads - 1) / kRoundThreads;
    launch(queue, name, attention_dq_sm90_kernel<T, D>, dim3(static_cast<unsigned>(blocks)), kRoundThreads, 0, shape.total,
           shape.heads, shape.scale, static_cast<const float*>(dq), static_cast<T*>(dqkv));
  });
}

}  // namespace fastbert::cuda
