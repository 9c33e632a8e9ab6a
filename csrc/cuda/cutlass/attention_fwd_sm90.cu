// Attention, forward, for compute capability 9.0 (compiled for sm_90a), by the design of FlashAttention-3 (Shah et al.
// 2024). A block stays and takes one item after another, a head of a tile of queries. One warp loads by TMA; two warp
// groups multiply by wgmma, each for 64 of the queries. Each starts the scores of its next tile of keys together with the
// product of its weights and values, so that the softmax runs under the latter, and the two take turns at starting, so
// that it runs under the other group's products too. Where the keys of an item end, the scores are the next item's.
#include "cuda/attention.h"
#include "cuda/cutlass/hopper.h"

namespace fastbert::cuda {
namespace {

constexpr int kGroups = 2, kRows = 64 * kGroups, kKeys = 128;
constexpr int kMultiplyingWarps = 4 * kGroups, kThreads = kWarpGroup * (1 + kGroups);
constexpr int kItems = 2;  // whose queries have room

// Tiles of keys, and of values, that have room.
template <int D>
constexpr int kStages = D < 128 ? 4 : 2;

// A place in a ring of buffers, and the parity of the phases of its barriers.
template <int STAGES>
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

template <int D>
struct Memory {
  using Tile = BoxedTile<kKeys, D>;
  static_assert(kRows == kKeys);
  static constexpr int kAlignment = 1024, kTiles = kItems + 2 * kStages<D>;

  // full: the tile has arrived. empty: it was read, and its place may be written.
  struct Barriers {
    Barrier queries_full[kItems], queries_empty[kItems];
    Barrier keys_full[kStages<D>], keys_empty[kStages<D>];
    Barrier values_full[kStages<D>], values_clean[kStages<D>], values_empty[kStages<D>];
  };
  static constexpr int kBytes = kAlignment + kTiles * Tile::kBytes + static_cast<int>(sizeof(Barriers));

  char* begin;

  __device__ __forceinline__ Memory()
      : begin(shared_memory() + (kAlignment - address_of(shared_memory()) % kAlignment) % kAlignment) {}
  __device__ __forceinline__ Tile queries(int place) const { return {begin + place * Tile::kBytes}; }
  __device__ __forceinline__ Tile keys(int stage) const { return {begin + (kItems + stage) * Tile::kBytes}; }
  __device__ __forceinline__ Tile values(int stage) const {
    return {begin + (kItems + kStages<D> + stage) * Tile::kBytes};
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(begin + kTiles * Tile::kBytes);
  }
};

template <class T>
struct AttentionForwardBoxed {
  TensorMap qkv;  // [total, 3 heads D]
  AttentionForward<T> a;
};

struct Item {
  int index, head;
  Work work;

  __device__ __forceinline__ bool none() const { return index < 0; }
  __device__ __forceinline__ int tiles() const { return (work.length + kKeys - 1) / kKeys; }
  __device__ __forceinline__ bool ends_within(int tile) const { return (tile + 1) * kKeys > work.length; }
};

__host__ __device__ inline int count_items(const AttentionShape& shape) {
  return count_tiles(shape.total, shape.batch, kRows) * shape.heads;
}

// This block's next item from `index` on, the same in every warp. The heads of a tile are neighbours.
__device__ __forceinline__ Item next_item(const AttentionShape& shape, int index) {
  const int items = count_items(shape);
  for (; index < items; index += gridDim.x) {
    const Work work = find_work(shape, index / shape.heads, kRows);
    if (!work.none()) return {index, index % shape.heads, work};
  }
  return {-1, 0, {0, 0, 0, 0}};
}

template <class T, int D>
__device__ __forceinline__ void load_tiles(const AttentionForwardBoxed<T>& boxed, const Memory<D>& memory) {
  const AttentionShape& shape = boxed.a.shape;
  auto& barriers = memory.barriers();
  const int width = shape.heads * D;
  Place<kItems> place;
  Place<kStages<D>> stage;
  for (Item item = next_item(shape, blockIdx.x); !item.none(); item = next_item(shape, item.index + gridDim.x)) {
    if (threadIdx.x % kWarp == 0) {
      const int column = item.head * D;
      barriers.queries_empty[place.stage].wait(place.phase ^ 1);
      memory.queries(place.stage)
          .fetch(boxed.qkv, barriers.queries_full[place.stage], item.work.start + item.work.first, column);
#pragma unroll 1
      for (int tile = 0; tile < item.tiles(); ++tile) {
        const int row = item.work.start + tile * kKeys;
        barriers.keys_empty[stage.stage].wait(stage.phase ^ 1);
        memory.keys(stage.stage).fetch(boxed.qkv, barriers.keys_full[stage.stage], row, column + width);
        barriers.values_empty[stage.stage].wait(stage.phase ^ 1);
        memory.values(stage.stage).fetch(boxed.qkv, barriers.values_full[stage.stage], row, column + 2 * width);
        stage.advance();
      }
    }
    place.advance();
    __syncwarp();
  }
}

// A box runs on into the next sequence, whose values would count if they were infinite: 0 times infinity is NaN.
template <int D>
__device__ __forceinline__ void clean_values(const AttentionShape& shape, const Memory<D>& memory) {
  auto& barriers = memory.barriers();
  const int lane = threadIdx.x % kWarp;
  Place<kStages<D>> stage;
  for (Item item = next_item(shape, blockIdx.x); !item.none(); item = next_item(shape, item.index + gridDim.x))
    for (int tile = 0; tile < item.tiles(); ++tile) {
      barriers.values_full[stage.stage].wait(stage.phase);
      if (item.ends_within(tile)) memory.values(stage.stage).clean(item.work.length - tile * kKeys);
      barriers.values_clean[stage.stage].arrive();
      __syncwarp();
      if (lane == 0) barriers.values_empty[stage.stage].arrive();  // no tile is left out, or a phase would be
      stage.advance();
    }
}

template <class T, int D, bool BIAS>
__device__ __forceinline__ void multiply_tiles(const AttentionForward<T>& a, const Memory<D>& memory) {
  const AttentionShape& shape = a.shape;
  auto& barriers = memory.barriers();
  const int group = threadIdx.x / kWarpGroup - 1, lane = threadIdx.x % kWarp;
  const int own = group * 64 + threadIdx.x % kWarpGroup / kWarp * 16;  // the warp's first row in the tile
  const DropoutMask dropout(shape.dropout);
  // What scores are multiplied by when the highest is known; with a bias they are before.
  const float scale = BIAS ? 1.0f : fmaxf(fabsf(shape.scale), 1e-30f) * kLog2E;
  Place<kItems> place;
  Place<kStages<D>> key_stage, value_stage;

  float x[kKeys / 8][4], result[D / 8][4];
  uint32_t weights[kKeys / 16][4], keep[kKeys / 64];
  OnlineSoftmax softmax;
  float shrink[2];

  const auto release = [&](Barrier& barrier) {
    if (lane == 0) barrier.arrive();
  };
  const auto take_turn = [&] { wait_at(group, kGroups * kWarpGroup); };
  const auto end_turn = [&] { arrive_at(1 - group, kGroups * kWarpGroup); };
  const auto start_scores = [&] {
    const auto queries = memory.queries(place.stage), keys = memory.keys(key_stage.stage);
    hold(x);
    begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) multiply_by_rows<T>(x, queries.by_rows(group * 64, k), keys.by_rows(0, k), k > 0);
    commit_products();
  };
  const auto end_scores = [&](bool last_of_item) {
    hold(x);
    release(barriers.keys_empty[key_stage.stage]);
    key_stage.advance();
    if (!last_of_item) return;
    release(barriers.queries_empty[place.stage]);
    place.advance();
  };
  const auto wait_for_values = [&](const Item& item, int tile) {
    barriers.values_full[value_stage.stage].wait(value_stage.phase);
    if (item.ends_within(tile)) barriers.values_clean[value_stage.stage].wait(value_stage.phase);
  };
  const auto start_result = [&](int tile) {
    const auto values = memory.values(value_stage.stage);
    hold(result);
    hold(weights);
    begin_products();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
      multiply_by_columns<T>(result, weights[k], values.by_columns(k), k > 0 || tile > 0);
    commit_products();
  };
  const auto end_result = [&] {
    hold(result);
    release(barriers.values_empty[value_stage.stage]);
    value_stage.advance();
  };
  // Which weights of a tile are kept: drawn while its scores are computed.
  const auto draw = [&](const Item& item, int tile) {
#pragma unroll
    for (int part = 0; part < kKeys / 64; ++part)
      keep[part] = keep_tile<false, 8>(dropout, item.work.start, item.work.first + own, tile * kKeys + 64 * part, item.head);
  };
  const auto weigh = [&](const Item& item, int tile) {
    const int row = item.work.first + own, column = tile * kKeys;
    if constexpr (BIAS) {
      const float* const bias = shape.bias + item.work.sequence * shape.bias_strides[0] + item.head * shape.bias_strides[1];
      finish_scores<false, true>(x, shape, bias, row, column, item.work.length);
    } else {
      if (shape.scale < 0.0f) multiply_rows(x, {-1.0f, -1.0f});
      if (item.ends_within(tile)) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (column + 8 * n + lane % 4 * 2 + i % 2 >= item.work.length) x[n][i] = -INFINITY;
      }
    }
    softmax.weigh(x, scale, shrink);
  };
  // Those that are kept, as an operand.
  const auto pack_weights = [&] {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; i += 2) weights[n / 2][n % 2 * 2 + i / 2] = pack<T>(x[n][i], x[n][i + 1]);
    if (dropout.active) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; i += 2) weights[n / 2][n % 2 * 2 + i / 2] &= kept_pair(keep[n / 8], n % 8, i);
    }
  };
  const auto write = [&](const Item& item, OnlineSoftmax& finished) {
    const Work& work = item.work;
    float by[2], lse[2];
    finished.finish(scale, dropout.active ? dropout.scale : 1.0f, by, lse);
    multiply_rows(result, by);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = work.first + own + lane / 4 + half * 8;
      if (lane % 4 == 0 && row < work.length) a.lse[item.head * shape.total + work.start + row] = lse[half];
    }
    const int64_t stride = static_cast<int64_t>(shape.heads) * D;
    const int first = work.first + own;
    write_rows<T, D>(result, a.out + (work.start + first) * stride + item.head * D, stride, work.length - first);
  };

  if (group == 1) end_turn();  // group 0 begins
  Item item = next_item(shape, blockIdx.x);
  if (!item.none()) {
    int tile = 0;
    barriers.queries_full[place.stage].wait(place.phase);
    barriers.keys_full[key_stage.stage].wait(key_stage.phase);
    start_scores();
    draw(item, 0);
    wait_for_products<0>();
    end_scores(item.tiles() == 1);
    weigh(item, 0);
    while (true) {
      pack_weights();
      const bool last = tile + 1 == item.tiles();
      const Item next = last ? next_item(shape, item.index + gridDim.x) : item;
      const int next_tile = last ? 0 : tile + 1;
      if (next.none()) break;
      if (last) barriers.queries_full[place.stage].wait(place.phase);
      barriers.keys_full[key_stage.stage].wait(key_stage.phase);
      take_turn();
      start_scores();
      wait_for_values(item, tile);
      start_result(tile);
      end_turn();
      draw(next, next_tile);
      wait_for_products<1>();
      end_scores(next_tile + 1 == next.tiles());
      OnlineSoftmax finished = softmax;
      if (last) softmax = OnlineSoftmax();
      weigh(next, next_tile);
      if (last) {  // the wait is behind the jump, or the assembler moves it up, before the softmax
        wait_for_products<0>();
        end_result();
        write(item, finished);
      } else {
        wait_for_products<0>();
        end_result();
        multiply_rows(result, shrink);
      }
      item = next, tile = next_tile;
    }
    wait_for_values(item, tile);
    start_result(tile);
    wait_for_products<0>();
    end_result();
    write(item, softmax);
  }
  if (group == 0) take_turn();  // so that every arrival is waited for
}

template <class T, int D, bool BIAS>
__global__ void __launch_bounds__(kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ AttentionForwardBoxed<T> boxed) {
  const Memory<D> memory;
  auto& barriers = memory.barriers();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kItems; ++i) barriers.queries_full[i].init(1), barriers.queries_empty[i].init(kMultiplyingWarps);
    for (int i = 0; i < kStages<D>; ++i) {
      barriers.keys_full[i].init(1), barriers.keys_empty[i].init(kMultiplyingWarps);
      barriers.values_full[i].init(1), barriers.values_clean[i].init(kWarp);
      barriers.values_empty[i].init(kMultiplyingWarps + 1);
    }
    publish_barriers();
  }
  __syncthreads();
  if (threadIdx.x < kWarpGroup) {
    give_registers<40>();
    if (threadIdx.x / kWarp == 0) {
      load_tiles<T, D>(boxed, memory);
    } else if (threadIdx.x / kWarp == 1) {
      clean_values<D>(boxed.a.shape, memory);
    }
  } else {
    take_registers<232>();
    multiply_tiles<T, D, BIAS>(boxed.a, memory);
  }
}

}  // namespace

void attention_fwd_sm90(const Queue& queue, const AttentionShape& shape, Format format, const void* qkv, void* out,
                        float* lse) {
  with_kernel(format, shape, [&](auto type, auto size, auto has_bias) {
    using T = decltype(type);
    constexpr int D = decltype(size)::value;
    const char* const name = "attention_fwd_cuda";
    const AttentionForwardBoxed<T> boxed{
        make_tensor_map(queue, name, qkv, shape.total, 3 * static_cast<int64_t>(shape.heads) * D, kKeys,
                        BoxedTile<kKeys, D>::kColumns),
        {static_cast<const T*>(qkv), static_cast<T*>(out), lse, shape}};
    const int items = count_items(shape), most = multiprocessors(queue);
    launch(queue, name, attention_fwd_sm90_kernel<T, D, decltype(has_bias)::value>, dim3(items < most ? items : most),
           kThreads, Memory<D>::kBytes, boxed);
  });
}

}  // namespace fastbert::cuda
