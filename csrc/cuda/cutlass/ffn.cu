// ffn's products with an epilogue: which of them runs, and the end of the bias's gradient.
#include "cuda/cutlass/ffn.h"

#include "cuda/launch.h"

namespace fastbert::cuda {
namespace {

constexpr int kParts = 8;

// Adds up what the tiles left: a warp takes 32 columns of every eighth tile.
template <class T>
__global__ void __launch_bounds__(kParts* kWarp)
    ffn_sums_kernel(int tiles, int columns, int stride, const float* sums, T* out) {
  const int part = threadIdx.x / kWarp, column = blockIdx.x * kWarp + threadIdx.x % kWarp;
  float total = 0.0f;
  if (column < columns)
    for (int tile = part; tile < tiles; tile += kParts) total += sums[static_cast<int64_t>(tile) * stride + column];
  total = sum_parts(total, kWarp);
  if (part > 0 || column >= columns) return;
  out[column] = from_float<T>(total);
}

// Kernels for compute capability 9.0a run on no other.
template <class Operands>
void multiply(const Queue& queue, const FfnShape& shape, Format format, const Operands& operands) {
#ifdef FASTBERT_SM90
  if (compute_capability(queue) == 90) return ffn_sm90(queue, shape, format, operands);
#endif
  ffn_sm80(queue, shape, format, operands);
}

}  // namespace

void ffn_fwd(const Queue& queue, const FfnShape& shape, Format format, const void* x, const void* w1, const void* b1,
             void* pre, void* act) {
  if (shape.rows == 0 || shape.inner == 0) return;
  multiply(queue, shape, format, FfnForward{x, w1, b1, pre, act});
}

int64_t ffn_bwd_workspace(const FfnShape& shape) {
  return ffn_tiles(shape.rows, kFfnRows) * ffn_tiles(shape.inner, kFfnColumns) * kFfnColumns;
}

void ffn_bwd(const Queue& queue, const FfnShape& shape, Format format, const void* dy, const void* w2, const void* pre,
             void* dpre, void* act, void* db1, float* workspace) {
  if (shape.inner == 0) return;
  if (shape.rows > 0) multiply(queue, shape, format, FfnBackward{dy, w2, pre, dpre, act, workspace});
  if (db1 == nullptr) return;
  const auto sum = [&](auto type) {
    using T = decltype(type);
    const int tiles = static_cast<int>(ffn_tiles(shape.rows, kFfnRows));
    const int stride = static_cast<int>(ffn_tiles(shape.inner, kFfnColumns)) * kFfnColumns;
    launch(queue, "ffn_bwd_cuda", ffn_sums_kernel<T>, dim3(static_cast<unsigned>(ffn_tiles(shape.inner, kWarp))),
           kParts * kWarp, kParts * kWarp * 4, tiles, shape.inner, stride, static_cast<const float*>(workspace),
           static_cast<T*>(db1));
  };
  if (format == Format::kBFloat16) return sum(bf16{});
  sum(fp16{});
}

}  // namespace fastbert::cuda
