// Stands in for CUTLASS's products on the host, which CUTLASS's source cannot run on: the same epilogue functions, on as
// many columns at a time, and the same workspace of column sums. Where a product's elements lie is CUTLASS's affair.
#include <stdexcept>
#include <vector>

#include "cuda/cutlass/ffn.h"

namespace fastbert::cuda {
namespace {

constexpr int kVector = 8;

// Calls visit(row, column, eight elements of the product) in every tile, and end(tile of rows) after it.
template <class T, class Visit, class End>
void multiply(const FfnShape& shape, const void* a, const void* b, int64_t b_row, int64_t b_column, const Visit& visit,
              const End& end) {
  const T *const left = static_cast<const T*>(a), *const right = static_cast<const T*>(b);
  for (int first = 0; first < shape.rows; first += kFfnRows) {
    for (int row = first; row < shape.rows && row < first + kFfnRows; ++row)
      for (int column = 0; column < shape.inner; column += kVector) {
        float product[kVector] = {};
        for (int k = 0; k < shape.depth; ++k)
          for (int i = 0; i < kVector; ++i)
            product[i] += to_float(left[static_cast<int64_t>(row) * shape.depth + k]) *
                          to_float(right[k * b_row + (column + i) * b_column]);
        visit(row, column, product);
      }
    end(first / kFfnRows);
  }
}

template <class Run>
void with_type(Format format, const Run& run) {
  if (format == Format::kBFloat16) return run(bf16{});
  if (format == Format::kFloat16) return run(fp16{});
  throw std::runtime_error("a product of 16-bit numbers only");
}

}  // namespace

void ffn_sm80(const Queue&, const FfnShape& shape, Format format, const FfnForward& a) {
  with_type(format, [&](auto type) {
    using T = decltype(type);
    const auto visit = [&](int row, int column, const float(&product)[kVector]) {
      float bias[kVector], pre[kVector], act[kVector];
      load<kVector>(static_cast<const T*>(a.b1) + column, bias);
      ffn_forward(product, bias, pre, act);
      const int64_t element = static_cast<int64_t>(row) * shape.inner + column;
      if (a.pre != nullptr) store<kVector>(static_cast<T*>(a.pre) + element, pre);
      store<kVector>(static_cast<T*>(a.act) + element, act);
    };
    multiply<T>(shape, a.x, a.w1, 1, shape.depth, visit, [](int) {});
  });
}

void ffn_sm80(const Queue&, const FfnShape& shape, Format format, const FfnBackward& a) {
  const int64_t stride = ffn_tiles(shape.inner, kFfnColumns) * kFfnColumns;
  std::vector<float> sums(stride);
  with_type(format, [&](auto type) {
    using T = decltype(type);
    const auto visit = [&](int row, int column, const float(&product)[kVector]) {
      float pre[kVector], dpre[kVector], act[kVector];
      const int64_t element = static_cast<int64_t>(row) * shape.inner + column;
      load<kVector>(static_cast<const T*>(a.pre) + element, pre);
      ffn_backward(product, pre, dpre, act);
      store<kVector>(static_cast<T*>(a.act) + element, act);
      store<kVector>(static_cast<T*>(a.dpre) + element, dpre);
      for (int i = 0; i < kVector; ++i) sums[column + i] += dpre[i];
    };
    const auto end = [&](int tile) {
      for (int64_t i = 0; i < stride; ++i) a.columns[tile * stride + i] = sums[i];
      sums.assign(stride, 0.0f);
    };
    multiply<T>(shape, a.dy, a.w2, shape.inner, 1, visit, end);
  });
}

void ffn_sm90(const Queue& queue, const FfnShape& shape, Format format, const FfnForward& a) {
  ffn_sm80(queue, shape, format, a);
}
void ffn_sm90(const Queue& queue, const FfnShape& shape, Format format, const FfnBackward& a) {
  ffn_sm80(queue, shape, format, a);
}

}  // namespace fastbert::cuda
