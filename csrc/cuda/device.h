// What the CUDA kernels share: number formats, 16-byte accesses, sums over a warp or a block, dropout.
//
// The kernels use CUDA's own names. A C++ compiler without CUDA takes those from tests/cuda/emulator.h, which runs a
// kernel on the host, thread by thread: that is how their index arithmetic is tested where there is no GPU.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulator.h"
#endif

#include "cuda/kernels.h"
#include "philox.h"

namespace fastbert::cuda {

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The 16-bit formats as they lie in memory. Arithmetic is fp32.
struct bf16 {
  static constexpr bool is_bf16 = true;
  uint16_t bits;
};
struct fp16 {
  static constexpr bool is_bf16 = false;
  uint16_t bits;
};

// Two fp32 values rounded into one word, the first in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return emulator::bf16_bits(low) | static_cast<uint32_t>(emulator::bf16_bits(high)) << 16;
#endif
}

template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
#ifdef __CUDACC__
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return emulator::fp16_bits(low) | static_cast<uint32_t>(emulator::fp16_bits(high)) << 16;
#endif
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) {
#ifdef __CUDACC__
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
#else
  return emulator::bf16_value(value.bits);
#endif
}
__device__ __forceinline__ float to_float(fp16 value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return emulator::fp16_value(value.bits);
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float value) {
  return {static_cast<uint16_t>(pack<T>(value, 0.0f))};
}
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

// The lower and the upper half of a word.
template <class T>
__device__ __forceinline__ float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
__device__ __forceinline__ float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// N neighbouring elements, N = 1 or 8; eight are one access of 16 bytes (two in fp32) and must lie on 16 bytes.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = to_float(*from);
  } else if constexpr (sizeof(T) == 4) {
    const float4 a = *reinterpret_cast<const float4*>(from), b = *(reinterpret_cast<const float4*>(from) + 1);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) to[2 * i] = low_half<T>(words[i]), to[2 * i + 1] = high_half<T>(words[i]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  if constexpr (N == 1) {
    *to = from_float<T>(from[0]);
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
    *(reinterpret_cast<float4*>(to) + 1) = make_float4(from[4], from[5], from[6], from[7]);
  } else {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(from[0], from[1]), pack<T>(from[2], from[3]),
                                               pack<T>(from[4], from[5]), pack<T>(from[6], from[7]));
  }
}

// Calls read(data) with the elements of a parameter, whose format is known when the kernel runs.
template <class F>
__device__ __forceinline__ void with_format(const Parameter& from, const F& read) {
  if (from.format == Format::kFloat32) {
    read(static_cast<const float*>(from.data));
  } else if (from.format == Format::kBFloat16) {
    read(static_cast<const bf16*>(from.data));
  } else {
    read(static_cast<const fp16*>(from.data));
  }
}

// In one instruction each, to a float's last two bits.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// Hides from the compiler where `value` comes from: what depends on it is computed where it is used, and takes no
// registers in between.
__device__ __forceinline__ void recompute(int& value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
}
__device__ __forceinline__ void recompute(uint64_t& value) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(value));
#endif
}

// The dynamic shared memory of the block. TMA and wgmma swizzle by the address: a tile begins at a multiple of 1024.
__device__ __forceinline__ char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) char memory[];
  return memory;
#else
  return emulator::shared_memory();
#endif
}

// The sum over the warp, in every lane: the same additions in each, so the same bits.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// The sum over a block's parts, each of `width` threads, in their order, in the threads of the first part. Takes a float
// of the dynamic shared memory for each thread.
__device__ __forceinline__ float sum_parts(float value, int width) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = value;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < width)
    for (int other = threadIdx.x + width; other < static_cast<int>(blockDim.x); other += width) value += shared[other];
  return value;
}

// Dropout with the seed that lies in device memory, so that a captured graph draws anew when the seed is.
struct DropoutMask {
  uint64_t seed;
  uint32_t threshold;
  float scale;
  bool active;

  __device__ __forceinline__ explicit DropoutMask(const Dropout& d)
      : seed(d.active ? static_cast<uint64_t>(*d.seed) : 0), threshold(d.threshold), scale(d.scale), active(d.active) {}

  // N neighbouring columns of a row, N = 1 or 8 and `column` a multiple of it.
  template <int N>
  __device__ __forceinline__ void apply_row(float (&values)[N], uint32_t row, uint32_t column) const {
    if constexpr (N == 1) {
      const Philox4 random = philox4x32(seed, column >> 3, row, 0, kStreamRows);
      const uint32_t first = column & 2 ? random.word[1] : random.word[0];
      const uint32_t second = column & 2 ? random.word[3] : random.word[2];
      const uint32_t word = column & 4 ? second : first;
      values[0] = keeps_upper(column & 1 ? word : word << 16, threshold) ? values[0] * scale : 0.0f;
    } else {
      const Philox4 random = philox4x32(seed, column >> 3, row, 0, kStreamRows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[2 * i] = keeps_lower(random.word[i], threshold) ? values[2 * i] * scale : 0.0f;
        values[2 * i + 1] = keeps_upper(random.word[i], threshold) ? values[2 * i + 1] * scale : 0.0f;
      }
    }
  }
};

}  // namespace fastbert::cuda
