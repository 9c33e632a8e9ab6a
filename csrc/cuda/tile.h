// Tiles of 16-bit elements in shared memory, and the tensor cores of sm_80 and later that work on them.
//
// mma is m16n8k16. Lane 4 g + t of a warp holds, of A [16, 16], rows g and g + 8 and columns 2 t, 2 t + 1 and those + 8;
// of B [16, 8], rows 2 t, 2 t + 1 and those + 8 of column g; of C [16, 8], rows g and g + 8 of columns 2 t, 2 t + 1.
#pragma once
#include "cuda/device.h"

namespace fastbert::cuda {

// A place in shared memory, in bytes.
#ifdef __CUDACC__
using Address = uint32_t;
__device__ __forceinline__ Address address_of(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#else
using Address = uintptr_t;
inline Address address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }
#endif

// Starts copying 16 bytes into shared memory, or zeros if not `valid`. `from` must be a readable place all the same.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_of(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  emulator::copy_async(to, from, valid ? 16 : 0);
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::commit_copies();
#endif
}

// Waits until at most PENDING of this thread's groups of copies are under way. A barrier shows them to the others.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  emulator::wait_for_copies(PENDING);
#endif
}

// Four 8x8 matrices; lane i gives the place of row i % 8 of matrix i / 8. Lane 4 g + t gets columns 2 t, 2 t + 1 of
// row g of each, or, TRANSPOSED, rows 2 t, 2 t + 1 of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(Address row, uint32_t (&to)[4]) {
#ifdef __CUDACC__
  if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
  }
#else
  emulator::load_matrices(TRANSPOSED, reinterpret_cast<const void*>(row), to);
#endif
}

// c += a b
template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (T::is_bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  emulator::multiply_add(T::is_bf16, c, a, b0, b1);
#endif
}

// A tile [rows, D] in shared memory, on a multiple of 256 bytes. The 16-byte chunks of a row are exchanged so that the
// same chunk of eight neighbouring rows lies in eight different groups of banks: by an exclusive or, so that a pair of
// chunks further on is an exclusive or of the address, and eight rows further on an addition.
template <class T, int D>
struct Tile {
  static_assert(D == 32 || D == 64 || D == 128);
  static constexpr int kChunks = D / 8;
  T* data;

  __device__ __forceinline__ T* chunk(int row, int index) const {
    const int exchanged = D == 32 ? index ^ ((row >> 1) & 3) : index ^ (row & 7);
    return data + (row * kChunks + exchanged) * 8;
  }

  // All threads of the block together: `rows` rows from `from`, `stride` elements apart, zeros from the valid-th on.
  __device__ __forceinline__ void fetch(const T* from, int64_t stride, int rows, int valid) const {
    for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
      const int row = i / kChunks, index = i % kChunks;
      const bool is_valid = row < valid;
      copy_async(chunk(row, index), from + (is_valid ? row : 0) * stride + index * 8, is_valid);
    }
  }

  // What this lane gives to load_matrices for [16, 16] at the upper left: A as it lies and, TRANSPOSED, two B side by
  // side.
  __device__ __forceinline__ Address corner(int row) const {
    const int lane = threadIdx.x % kWarp;
    return address_of(chunk(row + lane % 16, lane / 16));
  }
  // The same for two B side by side that are two [8, 16] of this tile, one below the other.
  __device__ __forceinline__ Address corner_of_transposed() const {
    const int lane = threadIdx.x % kWarp;
    return address_of(chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2));
  }
  static __device__ __forceinline__ Address moved(Address corner, int rows_by_8, int columns_by_16) {
    return (corner ^ (32 * columns_by_16)) + rows_by_8 * 8 * D * 2;
  }
};

// c [16, 8 N] += 16 rows of a, from `row`, times the transpose of b [8 N, D].
template <class T, int D, int N>
__device__ __forceinline__ void multiply_transposed(float (&c)[N][4], const Tile<T, D>& a, int row,
                                                    const Tile<T, D>& b) {
  const Address a_corner = a.corner(row), b_corner = b.corner_of_transposed();
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[4];
    load_matrices<false>(a.moved(a_corner, 0, k), left);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices<false>(b.moved(b_corner, n, k), right);
      multiply_add<T>(c[n], left, right[0], right[1]);
      multiply_add<T>(c[n + 1], left, right[2], right[3]);
    }
  }
}

// c [16, D] += a [16, 8 N], accumulators of an earlier product, times b [8 N, D].
template <class T, int D, int N>
__device__ __forceinline__ void multiply_accumulators(float (&c)[D / 8][4], const float (&a)[N][4],
                                                      const Tile<T, D>& b) {
  const Address b_corner = b.corner(0);
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    const uint32_t left[4] = {pack<T>(a[k][0], a[k][1]), pack<T>(a[k][2], a[k][3]), pack<T>(a[k + 1][0], a[k + 1][1]),
                              pack<T>(a[k + 1][2], a[k + 1][3])};
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t right[4];
      load_matrices<true>(b.moved(b_corner, k, n), right);
      multiply_add<T>(c[2 * n], left, right[0], right[1]);
      multiply_add<T>(c[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// c [16, D] += the transpose of 16 columns of a [depth, 64], from `column`, times b [depth, D]. depth: rounded up to 16.
template <class T, int D>
__device__ __forceinline__ void multiply_columns(float (&c)[D / 8][4], const Tile<T, 64>& a, int column,
                                                 const Tile<T, D>& b, int depth) {
  const Address a_corner = a.moved(a.corner_of_transposed(), 0, column / 16), b_corner = b.corner(0);
  for (int k = 0; k < depth; k += 16) {
    uint32_t left[4];
    load_matrices<true>(a.moved(a_corner, k / 8, 0), left);
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t right[4];
      load_matrices<true>(b.moved(b_corner, k / 8, n), right);
      multiply_add<T>(c[2 * n], left, right[0], right[1]);
      multiply_add<T>(c[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// Writes a warp's c [16, D] to `valid` rows of `to`, 16 bytes at a time, by way of 16 rows of a tile from `row` on that
// no other warp uses.
template <class T, int D>
__device__ __forceinline__ void write_rows(const float (&c)[D / 8][4], const Tile<T, D>& through, int row, T* to,
                                           int64_t stride, int valid) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    reinterpret_cast<uint32_t*>(through.chunk(row + lane / 4, n))[lane % 4] = pack<T>(c[n][0], c[n][1]);
    reinterpret_cast<uint32_t*>(through.chunk(row + lane / 4 + 8, n))[lane % 4] = pack<T>(c[n][2], c[n][3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * Tile<T, D>::kChunks; i += kWarp) {
    const int r = i / Tile<T, D>::kChunks, index = i % Tile<T, D>::kChunks;
    if (r < valid)
      *reinterpret_cast<uint4*>(to + r * stride + index * 8) = *reinterpret_cast<const uint4*>(through.chunk(row + r, index));
  }
}

}  // namespace fastbert::cuda
