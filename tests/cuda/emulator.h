// Runs the CUDA kernels of csrc/cuda on the host, for tests. The kernels are compiled as plain C++; every thread of a
// block is a fiber, and a barrier or a warp's collective operation is where fibers wait for each other.
//
// Stricter than a GPU: shared memory starts as NaN, what cp.async brings is NaN until it was waited for, and a collective
// or a barrier that some threads do not reach is an error. So it is with what compute capability 9.0 adds, which kernels
// find under FASTBERT_EMULATOR_CAPABILITY=90: boxes (TMA) and results of wgmma are NaN until they were waited for, wgmma
// reads its operands no sooner than that, and nothing may be under way at the end.
// FASTBERT_EMULATOR_ORDER=reverse runs threads and blocks in the opposite order, =ahead each warp as far as it can go
// before the next, =priority a warp only when none with a higher number can go on, =late2 the third warp only when no other
// can: a missing barrier then gives other results.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max, std::min;
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace fastbert::emulator {

// Runs `kernel` for every thread of every block. Throws std::runtime_error if threads wait for ever.
void run(const char* name, dim3 grid, int threads, int shared, const std::function<void()>& kernel);

char* shared_memory();
void barrier();

// What a lane brings to a collective operation of its warp.
struct Offer {
  uint32_t words[8];
  const void* address;
};
// Waits for the warp's 32 lanes; gives what each brought. `operation` must be the same for all.
const Offer* exchange(const char* operation, const Offer& mine);

// Asynchronous copies of 16 bytes into shared memory; `bytes` of them from `from`, zeros after them.
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int pending_groups);

// Rows of 16 bytes that ldmatrix found in banks of one another since the last call: each costs a cycle more.
int64_t take_bank_conflicts();

uint16_t bf16_bits(float value);
uint16_t fp16_bits(float value);
float bf16_value(uint16_t bits);
float fp16_value(uint16_t bits);

void load_matrices(bool transposed, const void* row, uint32_t (&to)[4]);
void multiply_add(bool is_bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// 80 for 8.0.
int capability();

// A barrier in shared memory (mbarrier). bytes: that are announced.
void init_barrier(const void* barrier, int arrivals);
void arrive(const void* barrier, int bytes);
void wait_for_phase(const void* barrier, uint32_t parity);

// A barrier by its number, of `threads` threads; this one waits, or only arrives.
void named_barrier(int number, int threads, bool waits);

// A matrix of 16-bit elements, its rows one after another.
struct TensorMap {
  const void* data;
  int64_t rows, columns;
  int box_rows, box_columns;
};
void load_box(const TensorMap& map, const void* barrier, void* to, int row, int column);

// What this thread wrote to shared memory may be read by wgmma and written by boxes. Missed after store_matrices.
void publish_to_async();

void store_matrices(void* row, const uint32_t (&from)[4]);

// Adds four floats to device memory.
void add_to_memory(float* to, float4 value);

// wgmma, as cuda/cutlass/hopper.h has it: c [64, 8 n] of a warp group = a [64, 16] b [16, 8 n]; a thread has 4 n floats.
struct Operand {
  uint64_t descriptor;
  bool by_rows;  // what is summed over is contiguous; else the rows of a, or the columns of b
};
struct Multiplication {
  bool is_bf16, add;
  int n;
  float* c;
  const uint32_t* words;  // of a, from registers, or null: then from memory
  Operand a, b;
};
void begin_products();
void multiply_async(const Multiplication& multiplication);
void commit_products();
void wait_for_products(int pending_groups);

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace fastbert::emulator

inline void __syncthreads() { fastbert::emulator::barrier(); }

inline void __syncwarp() { fastbert::emulator::exchange("syncwarp", {}); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  static_assert(sizeof(T) == 4);
  fastbert::emulator::Offer offer{};
  std::memcpy(offer.words, &value, 4);
  const auto* offers = fastbert::emulator::exchange("shfl", offer);
  std::memcpy(&value, offers[fastbert::emulator::lane() ^ distance].words, 4);
  return value;
}

inline uint32_t __ballot_sync(unsigned, bool value) {
  const auto* offers = fastbert::emulator::exchange("ballot", {{value}, nullptr});
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= offers[lane].words[0] << lane;
  return bits;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
