// Stands in for CUTLASS's products on the host, which CUTLASS's source cannot run on: what a thread of a block makes of its
// part of a tile is the kernels' own, and the products are plain loops. Where CUTLASS hands a thread its elements, and in
// which order, is its affair: here, too, they are as ffn.h says.
#include <stdexcept>

#include "cuda/cutlass/ffn.h"
#include "cuda/launch.h"

namespace fastbert::cuda {
namespace {

constexpr int kThreads = kFfnColumns;

// The product of a matrix in row-major order with one whose element (k, column) is at k * b_row + column * b_column.
template <class T>
struct Factors {
  FfnShape shape;
  const T *a, *b;
  int64_t b_row, b_column;

  // 0 outside.
  float product(int row, int column) const {
    if (row >= shape.rows || column >= shape.inner) return 0.0f;
    float sum = 0.0f;
    for (int k = 0; k < shape.depth; ++k)
      sum += to_float(a[static_cast<int64_t>(row) * shape.depth + k]) * to_float(b[k * b_row + column * b_column]);
    return sum;
  }
};

constexpr int kRowsToStep = 2;  // that a thread fetches before it visits them

template <class T, class PART>
void product_sm80_kernel(Factors<T> factors, typename PART::Operands operands) {
  const int thread = threadIdx.x, column = blockIdx.y * kFfnColumns + thread % kFfnThreadsToRow * kFfnVector;
  constexpr int kApart = kThreads / kFfnThreadsToRow;  // rows that the threads have at a time
  PART part;
  for (int step = 0; step < kFfnRows; step += kApart * kRowsToStep) {
    FfnPlace place[kRowsToStep];
    for (int i = 0; i < kRowsToStep; ++i) {
      const int row = blockIdx.x * kFfnRows + step + i * kApart + thread / kFfnThreadsToRow;
      place[i] = {row, column, factors.shape.rows, factors.shape.inner};
      part.fetch(operands, i, place[i]);
    }
    for (int i = 0; i < kRowsToStep; ++i) {
      float product[kFfnVector];
      for (int j = 0; j < kFfnVector; ++j) product[j] = factors.product(place[i].row, column + j);
      part.visit(operands, i, place[i], product);
    }
  }
  part.end(operands, reinterpret_cast<typename PART::Shared*>(shared_memory()), thread, blockIdx.x, blockIdx.y,
           factors.shape.inner);
}

// Subtiles [64, 32], one below the other before one beside the other; visit(row, column, product), which gives what the
// column sums are of, 0 outside.
template <class T, class VISIT>
void tile_sm90(const Factors<T>& factors, float* columns, const VISIT& visit) {
  constexpr int kRows = 64, kColumns = 32, kElements = kRows * kColumns / kThreads;
  auto& shared = *reinterpret_cast<FfnWarpSums*>(shared_memory());
  const int thread = threadIdx.x, lane = thread % kWarp, first_row = thread / kWarp * 16 + lane / 4;
  const int first_column = lane % 4 * 2;
  for (int n = 0; n < kFfnColumns; n += kColumns) {
    FfnColumnSums<kElements> sums;
    for (int m = 0; m < kFfnRows; m += kRows) {
      float values[kElements];
      for (int i = 0; i < kElements; ++i) {
        const int row = blockIdx.x * kFfnRows + m + first_row + i / 2 % 2 * 8;
        const int column = blockIdx.y * kFfnColumns + n + first_column + i / 4 * 8 + i % 2;
        values[i] = visit(row, column, factors.product(row, column));
      }
      if (columns != nullptr) sums.add(values, m == 0);
    }
    if (columns != nullptr) sums.share(shared, thread, n + first_column);
  }
  if (columns == nullptr) return;
  __syncthreads();
  const int64_t stride = ffn_tiles(factors.shape.inner, kFfnColumns) * kFfnColumns;
  columns[blockIdx.x * stride + blockIdx.y * kFfnColumns + thread] = ffn_column_sum(shared, thread);
}

template <class T>
void product_sm90_kernel(Factors<T> factors, FfnForward a) {
  tile_sm90(factors, nullptr, [&](int row, int column, float product) {
    const FfnPlace place{row, column, factors.shape.rows, factors.shape.inner};
    if (!place.inside()) return 0.0f;
    const float pre = product + to_float(static_cast<const T*>(a.b1)[column]);
    if (a.pre != nullptr) static_cast<T*>(a.pre)[place.element()] = from_float<T>(pre);
    static_cast<T*>(a.act)[place.element()] = from_float<T>(gelu(pre));
    return 0.0f;
  });
}

template <class T>
void product_sm90_kernel(Factors<T> factors, FfnBackward a) {
  tile_sm90(factors, a.columns, [&](int row, int column, float product) {
    const FfnPlace place{row, column, factors.shape.rows, factors.shape.inner};
    if (!place.inside()) return 0.0f;
    float derivative;
    const float act = gelu(to_float(static_cast<const T*>(a.pre)[place.element()]), &derivative);
    static_cast<T*>(a.act)[place.element()] = from_float<T>(act);
    static_cast<T*>(a.dpre)[place.element()] = from_float<T>(product * derivative);
    return product * derivative;
  });
}

template <class Run>
void with_type(Format format, const Run& run) {
  if (format == Format::kBFloat16) return run(bf16{});
  if (format == Format::kFloat16) return run(fp16{});
  throw std::runtime_error("a product of 16-bit numbers only");
}

template <class T>
Factors<T> factors(const FfnShape& shape, const FfnForward& a) {
  return {shape, static_cast<const T*>(a.x), static_cast<const T*>(a.w1), 1, shape.depth};
}
template <class T>
Factors<T> factors(const FfnShape& shape, const FfnBackward& a) {
  return {shape, static_cast<const T*>(a.dy), static_cast<const T*>(a.w2), shape.inner, 1};
}

dim3 grid(const FfnShape& shape) {
  return {static_cast<unsigned>(ffn_tiles(shape.rows, kFfnRows)), static_cast<unsigned>(ffn_tiles(shape.inner, kFfnColumns))};
}

template <template <class> class PART, class Operands>
void run_sm80(const Queue& queue, const FfnShape& shape, Format format, const Operands& a) {
  with_type(format, [&](auto type) {
    using T = decltype(type);
    launch(queue, "ffn_cuda", product_sm80_kernel<T, PART<T>>, grid(shape), kThreads, sizeof(typename PART<T>::Shared),
           factors<T>(shape, a), a);
  });
}

template <class Operands>
void run_sm90(const Queue& queue, const FfnShape& shape, Format format, const Operands& a) {
  with_type(format, [&](auto type) {
    using T = decltype(type);
    void (*kernel)(Factors<T>, Operands) = product_sm90_kernel<T>;
    launch(queue, "ffn_cuda", kernel, grid(shape), kThreads, sizeof(FfnWarpSums), factors<T>(shape, a), a);
  });
}

template <class T>
using BackwardPart = FfnBackwardPart<T, kThreads, kRowsToStep>;

}  // namespace

void ffn_sm80(const Queue& queue, const FfnShape& shape, Format format, const FfnForward& a) {
  run_sm80<FfnForwardPart>(queue, shape, format, a);
}
void ffn_sm80(const Queue& queue, const FfnShape& shape, Format format, const FfnBackward& a) {
  run_sm80<BackwardPart>(queue, shape, format, a);
}
void ffn_sm90(const Queue& queue, const FfnShape& shape, Format format, const FfnForward& a) {
  run_sm90(queue, shape, format, a);
}
void ffn_sm90(const Queue& queue, const FfnShape& shape, Format format, const FfnBackward& a) {
  run_sm90(queue, shape, format, a);
}

}  // namespace fastbert::cuda
