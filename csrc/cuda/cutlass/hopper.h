// What GPUs of compute capability 9.0 have beyond tile.h: barriers in shared memory, copies of whole boxes of a matrix
// (TMA), products of a warp group (wgmma), registers that change hands. The instructions are those of CuTe and CUTLASS; a
// C++ compiler without CUDA takes them from tests/cuda/emulator.h.
#pragma once
#ifdef __CUDACC__
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cuda_host_adapter.hpp>
#endif

#include <string>
#include <utility>

#include "cuda/launch.h"
#include "cuda/tile.h"

namespace fastbert::cuda {

constexpr int kWarpGroup = 4 * kWarp;

// The compiler moves no access to memory past it. CUTLASS's instructions for barriers and fences do not ask for that.
__device__ __forceinline__ void keep_order() {
#ifdef __CUDACC__
  asm volatile("" ::: "memory");
#endif
}

// A barrier in shared memory (mbarrier). A phase of it ends when as many threads have arrived as it was made for, and
// every byte has that was announced. The phases' parities are 0, 1, 0, ...
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int arrivals) {
#ifdef __CUDACC__
    cutlass::arch::ClusterBarrier::init(&word, arrivals);
#else
    emulator::init_barrier(this, arrivals);
#endif
  }
  // What this thread has done to memory is seen by those that wait.
  __device__ __forceinline__ void arrive() {
    keep_order();
#ifdef __CUDACC__
    cutlass::arch::ClusterBarrier::arrive(&word);
#else
    emulator::arrive(this, 0);
#endif
  }
  // Arrives, and announces bytes that boxes will bring.
  __device__ __forceinline__ void arrive_and_expect(int bytes) {
#ifdef __CUDACC__
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&word, bytes);
#else
    emulator::arrive(this, bytes);
#endif
  }
  // Until the phase of this parity has ended; the one before the first is taken to have parity 1. Whoever waits must not
  // fall behind by two phases.
  __device__ __forceinline__ void wait(uint32_t parity) {
#ifdef __CUDACC__
    cutlass::arch::ClusterBarrier::wait(&word, parity);
#else
    emulator::wait_for_phase(this, parity);
#endif
    keep_order();
  }
};

// Shows barriers that were made to TMA, and, after a __syncthreads, to the block.
__device__ __forceinline__ void publish_barriers() {
#ifdef __CUDACC__
  cutlass::arch::fence_barrier_init();
#endif
}

// Between this thread's plain writes to shared memory and accesses by TMA or wgmma, which a barrier has to order besides.
__device__ __forceinline__ void publish_to_async() {
  keep_order();
#ifdef __CUDACC__
  cutlass::arch::fence_view_async_shared();
#else
  emulator::publish_to_async();
#endif
}

// Barriers by number, of `threads` threads, some of which may only arrive; whole warps.
__device__ __forceinline__ void arrive_at(int number, int threads) {
  keep_order();
#ifdef __CUDACC__
  cutlass::arch::NamedBarrier::arrive(threads, number);
#else
  emulator::named_barrier(number, threads, false);
#endif
}
__device__ __forceinline__ void wait_at(int number, int threads) {
  keep_order();
#ifdef __CUDACC__
  cutlass::arch::NamedBarrier::sync(threads, number);
#else
  emulator::named_barrier(number, threads, true);
#endif
  keep_order();
}

// All of a warp group together: its threads' registers become COUNT.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDACC__
  cutlass::arch::warpgroup_reg_dealloc<COUNT>();
#endif
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDACC__
  cutlass::arch::warpgroup_reg_alloc<COUNT>();
#endif
}

// A matrix of 16-bit elements in memory, of which boxes [box_rows, box_columns] are copied.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;

inline TensorMap make_tensor_map(const Queue& queue, const char* name, const void* data, int64_t rows, int64_t columns,
                                 int box_rows, int box_columns) {
  check(cudaSetDevice(queue.device), name);
  TensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride = sizes[0] * 2;
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult status = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, &stride, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error(std::string(name) + ": cuTensorMapEncodeTiled gave error " + std::to_string(status));
  return map;
}
#else
using TensorMap = emulator::TensorMap;

inline TensorMap make_tensor_map(const Queue&, const char*, const void* data, int64_t rows, int64_t columns,
                                 int box_rows, int box_columns) {
  return {data, rows, columns, box_rows, box_columns};
}
#endif

// One thread: starts copying the box at `row`, `column`; zeros where the matrix has ended. Its bytes arrive at `barrier`.
__device__ __forceinline__ void load_box(const TensorMap& map, Barrier& barrier, void* to, int row, int column) {
#ifdef __CUDACC__
  cute::SM90_TMA_LOAD_2D::copy(&map, &barrier.word, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to,
                               column, row);
#else
  emulator::load_box(map, &barrier, to, row, column);
#endif
}

// Four 8x8 matrices into shared memory; lane i gives the place of row i % 8 of matrix i / 8, and has of each what
// load_matrices would give it.
__device__ __forceinline__ void store_matrices(Address row, const uint32_t (&from)[4]) {
#ifdef __CUDACC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#else
  emulator::store_matrices(reinterpret_cast<void*>(row), from);
#endif
}

// Adds to 16 bytes of device memory, in one access.
__device__ __forceinline__ void add_to_memory(float* to, float4 value) {
#ifdef __CUDACC__
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#else
  emulator::add_to_memory(to, value);
#endif
}

// A tile [ROWS, D] in shared memory, on a multiple of 1024 bytes, as boxes bring it: panels of 64 columns (32 if there are
// no more) one after another, each with row after row, in which 16-byte chunks are exchanged: bits 4 to 6 of an address
// (4 and 5 in the narrow panel) by an exclusive or with those three further up.
template <int ROWS, int D>
struct BoxedTile {
  static_assert(D == 32 || D % 64 == 0);
  static constexpr int kColumns = D < 64 ? D : 64, kPanels = D / kColumns;
  static constexpr int kPitch = kColumns * 2, kPanelBytes = ROWS * kPitch, kBytes = kPanels * kPanelBytes;
  char* data;

  // All of it, from the matrix's `row` and `column`. One thread.
  __device__ __forceinline__ void fetch(const TensorMap& map, Barrier& barrier, int row, int column) const {
    barrier.arrive_and_expect(kBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      load_box(map, barrier, data + panel * kPanelBytes, row, column + panel * kColumns);
  }

  // The descriptors by which wgmma reads it, in units of 16 bytes: the place and the distance between panels in the lower
  // word, that between blocks of 8 rows and how chunks are exchanged in the upper one.
  __device__ __forceinline__ uint64_t descriptor(int offset, int between_panels) const {
    constexpr uint64_t kUpper = 8 * kPitch / 16 | (kColumns == 64 ? 1u : 2u) << 30;
    const uint32_t place = (static_cast<uint32_t>(address_of(data)) & 0x3ffff) / 16;
    return kUpper << 32 | (place + static_cast<uint32_t>(offset / 16 + (between_panels / 16 << 16)));
  }
  // Rows from `row` on, columns [16 k, 16 k + 16), the columns being summed over.
  __device__ __forceinline__ uint64_t by_rows(int row, int k) const {
    constexpr int kSteps = kColumns / 16;
    return descriptor(k / kSteps * kPanelBytes + row * kPitch + k % kSteps * 32, 16);  // one panel: the distance is not read
  }
  // Rows [16 k, 16 k + 16), which are summed over, and all columns from a panel on.
  __device__ __forceinline__ uint64_t by_columns(int k, int panel = 0) const {
    return descriptor(panel * kPanelBytes + 16 * k * kPitch, kPanelBytes);
  }

  // A warp together: zeros in the rows from the valid-th on, which wgmma will read.
  __device__ __forceinline__ void clean(int valid) const {
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll 1
      for (int at = valid * kPitch + threadIdx.x % kWarp * 16; at < kPanelBytes; at += kWarp * 16)
        *reinterpret_cast<uint4*>(data + panel * kPanelBytes + at) = make_uint4(0, 0, 0, 0);
    publish_to_async();
  }

  // The four 8x8 matrices of an operand [16, 16] as mma has it, to `row`, a multiple of 8, and column 16 k. A warp together.
  __device__ __forceinline__ void store(int row, int k, const uint32_t (&words)[4]) const {
    static_assert(kColumns == 64);
    const int lane = threadIdx.x % kWarp;
    const Address first = address_of(data) + (row + lane % 16) * kPitch + ((lane / 16) ^ (lane % 8)) * 16;
    store_matrices((first ^ (k % 4 * 32)) + k / 4 * kPanelBytes, words);
  }
};

// The products of a warp group: groups of them run in order, while its threads do something else. Thread t has rows
// 16 (t / 32) on of an operand or a result of 64 rows, and of these what tile.h says of mma.

#ifdef __CUDACC__
template <bool BF16, int N>
struct Wgmma;
#define FASTBERT_WGMMA(n)                                                                                             \
  template <>                                                                                                         \
  struct Wgmma<true, n> {                                                                                             \
    using ByRows = cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;      \
    using ByColumns = cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>;  \
    using RowsByColumns = cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>; \
    using Columns = cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::MN, cute::SM90::GMMA::Major::MN>;   \
  };                                                                                                                  \
  template <>                                                                                                         \
  struct Wgmma<false, n> {                                                                                            \
    using ByRows = cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;        \
    using ByColumns = cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>;    \
    using RowsByColumns = cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN>;  \
    using Columns = cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_SS<cute::SM90::GMMA::Major::MN, cute::SM90::GMMA::Major::MN>;     \
  };
FASTBERT_WGMMA(32)
FASTBERT_WGMMA(64)
FASTBERT_WGMMA(128)
#undef FASTBERT_WGMMA

__device__ __forceinline__ cute::SM90::GMMA::ScaleOut scale_out(bool add) {
  return add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
}
template <class OP, int N, size_t... I>
__device__ __forceinline__ void wgmma(float (&c)[N][4], uint64_t a, uint64_t b, bool add, std::index_sequence<I...>) {
  OP::fma(a, b, c[I / 4][I % 4]..., scale_out(add));
}
template <class OP, int N, size_t... I>
__device__ __forceinline__ void wgmma(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b, bool add,
                                      std::index_sequence<I...>) {
  OP::fma(a[0], a[1], a[2], a[3], b, c[I / 4][I % 4]..., scale_out(add));
}
#endif

// c [64, 8 N] = a [64, 16] times the transpose of b [8 N, 16], both read by rows; `add`: on top of what c is.
template <class T, int N>
__device__ __forceinline__ void multiply_by_rows(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
#ifdef __CUDACC__
  wgmma<typename Wgmma<T::is_bf16, 8 * N>::ByRows>(c, a, b, add, std::make_index_sequence<4 * N>());
#else
  emulator::multiply_async({T::is_bf16, add, N, c[0], nullptr, {a, true}, {b, true}});
#endif
}
// c [64, 8 N] = a [64, 16] from registers, as mma has it, times b [16, 8 N], read by columns.
template <class T, int N>
__device__ __forceinline__ void multiply_by_columns(float (&c)[N][4], const uint32_t (&a)[4], uint64_t b, bool add) {
#ifdef __CUDACC__
  wgmma<typename Wgmma<T::is_bf16, 8 * N>::ByColumns>(c, a, b, add, std::make_index_sequence<4 * N>());
#else
  emulator::multiply_async({T::is_bf16, add, N, c[0], a, {}, {b, false}});
#endif
}
// The same with a from memory, read by rows.
template <class T, int N>
__device__ __forceinline__ void multiply_by_columns(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
#ifdef __CUDACC__
  wgmma<typename Wgmma<T::is_bf16, 8 * N>::RowsByColumns>(c, a, b, add, std::make_index_sequence<4 * N>());
#else
  emulator::multiply_async({T::is_bf16, add, N, c[0], nullptr, {a, true}, {b, false}});
#endif
}
// c [64, 8 N] = the transpose of a [16, 64] times b [16, 8 N], both read by columns.
template <class T, int N>
__device__ __forceinline__ void multiply_columns(float (&c)[N][4], uint64_t a, uint64_t b, bool add) {
#ifdef __CUDACC__
  wgmma<typename Wgmma<T::is_bf16, 8 * N>::Columns>(c, a, b, add, std::make_index_sequence<4 * N>());
#else
  emulator::multiply_async({T::is_bf16, add, N, c[0], nullptr, {a, false}, {b, false}});
#endif
}

// Before products whose registers this thread has written.
__device__ __forceinline__ void begin_products() {
#ifdef __CUDACC__
  cute::warpgroup_arrive();
#else
  emulator::begin_products();
#endif
}
// Makes a group of the products that were started.
__device__ __forceinline__ void commit_products() {
#ifdef __CUDACC__
  cute::warpgroup_commit_batch();
#else
  emulator::commit_products();
#endif
}
// Until at most PENDING groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
#ifdef __CUDACC__
  cute::warpgroup_wait<PENDING>();
#else
  emulator::wait_for_products(PENDING);
#endif
}
// Keeps the compiler from moving accesses to a result, or to an operand in registers, past where this stands: before
// begin_products and after the wait.
template <class Word, int N>
__device__ __forceinline__ void hold(Word (&words)[N][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(words[n][i]);
#endif
}

// Writes a warp's c [16, D] to `valid` rows of `to`, 16 bytes at a time: four lanes with parts of four times eight columns
// exchange them, so that each has eight columns.
template <class T, int D>
__device__ __forceinline__ void write_rows(const float (&c)[D / 8][4], T* to, int64_t stride, int valid) {
  const int lane = threadIdx.x % kWarp, odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
#pragma unroll
    for (int n = 0; n < D / 8; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack<T>(c[n + i][2 * half], c[n + i][2 * half + 1]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
        (odd ? words[i] : words[i + 1]) = other;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i + 2], 2);
        (upper ? words[i] : words[i + 2]) = other;
      }
      if (row < valid)
        *reinterpret_cast<uint4*>(to + row * stride + (n + lane % 4) * 8) =
            make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

}  // namespace fastbert::cuda
