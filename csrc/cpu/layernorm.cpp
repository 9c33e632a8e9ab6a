// LayerNorm(dropout(x + x_bias) + residual), forward and backward.
#include "rows.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

template <class X, class R, class Y>
struct LayerNormForward {
  int64_t columns;
  double eps;
  const X* x;
  const R* residual;
  const float *x_bias, *weight, *bias;
  Dropout dropout;
  Y *y, *z;
  float *mean, *rstd;
};

// One row at a time, and everything copied to locals, as in norm_backward_row. buffer: two padded rows. The statistics are
// those of the sum as the backward will find it: in a row that is constant but for rounding, other ones would be far off.
template <bool Drop, class X, class R, class Y>
void layernorm_row(const LayerNormForward<X, R, Y>& a, int64_t row, float* buffer) {
  const int64_t n = a.columns;
  const X* const x = a.x + row * n;
  const R* const residual = a.residual == nullptr ? nullptr : a.residual + row * n;
  const float *const x_bias = a.x_bias, *const weight = a.weight, *const bias = a.bias;
  Y *const y = a.y + row * n, *const z = a.z == nullptr ? nullptr : a.z + row * n;
  float* const factors = buffer + padded_columns(n);
  if constexpr (Drop) a.dropout.factors(factors, 0, n, static_cast<uint32_t>(row), 0, kStreamRows);
  const float total = sum_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
    vf v = load_n(x + c, count);
    if (x_bias != nullptr) v += load_n(x_bias + c, count);
    if constexpr (Drop) v *= load(factors + c);
    if (residual != nullptr) v += load_n(residual + c, count);
    v = rounded<Y>(v);
    if (z != nullptr) store_n(z + c, v, count);
    store(buffer + c, v);
    return v;
  });
  const auto [mean, rstd] = statistics(buffer, n, total, a.eps);
  if (a.mean != nullptr) a.mean[row] = mean, a.rstd[row] = rstd;
  for_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
    store_n(y + c, (load(buffer + c) - mean) * rstd * load_n(weight + c, count) + load_n(bias + c, count), count);
  });
}

template <bool Drop, class X, class R, class Y>
void layernorm_fwd_tasks(const Executor& executor, int64_t rows, const LayerNormForward<X, R, Y>& a) {
  const int64_t rows_per_task = larger(1, kTaskElements / a.columns);
  parallel_tasks(executor, ceil_div(rows, rows_per_task), [&](int64_t task, int) {
    float* buffer = static_cast<float*>(scratch(kScratchRows, 2 * padded_columns(a.columns) * 4));
    for (int64_t row = task * rows_per_task; row < smaller((task + 1) * rows_per_task, rows); ++row)
      layernorm_row<Drop>(a, row, buffer);
  });
}

template <class X, class R, class Y>
void layernorm_fwd_as(const Executor& executor, const RowsShape& shape, const X* x, const Vector& x_bias,
                      const R* residual, const Vector& weight, const Vector& bias, Y* y, Y* z, float* mean,
                      float* rstd) {
  const int64_t n = shape.columns, padded = padded_columns(n);
  float* room = static_cast<float*>(scratch(kScratchSums, 3 * padded * 4));
  const LayerNormForward<X, R, Y> a{n, shape.eps, x, residual, as_float(x_bias, n, room),
                                    as_float(weight, n, room + padded), as_float(bias, n, room + 2 * padded),
                                    make_dropout(shape.dropout_p, shape.seed), y, z, mean, rstd};
  if (a.dropout.active) {
    layernorm_fwd_tasks<true>(executor, shape.rows, a);
  } else {
    layernorm_fwd_tasks<false>(executor, shape.rows, a);
  }
}

void layernorm_fwd(const Executor& executor, const RowsShape& shape, Vector x, Vector x_bias, Vector residual,
                   Vector weight, Vector bias, void* y, void* z, float* mean, float* rstd) {
  const auto as = [&](auto* x_, auto* residual_, auto* y_) {
    auto* z_ = static_cast<decltype(y_)>(z);
    layernorm_fwd_as(executor, shape, x_, x_bias, residual_, weight, bias, y_, z_, mean, rstd);
  };
  const bool wide = x.dtype == DType::kFloat32, wide_residual = residual.dtype == DType::kFloat32;
  const float *xf = static_cast<const float*>(x.data), *rf = static_cast<const float*>(residual.data);
  const bf16 *xb = static_cast<const bf16*>(x.data), *rb = static_cast<const bf16*>(residual.data);
  if (wide && (wide_residual || residual.data == nullptr)) {
    as(xf, rf, static_cast<float*>(y));
  } else if (wide) {
    as(xf, rb, static_cast<float*>(y));
  } else if (wide_residual && residual.data != nullptr) {
    as(xb, rf, static_cast<float*>(y));
  } else {
    as(xb, rb, static_cast<bf16*>(y));
  }
}

template <class T>
void layernorm_bwd_as(const Executor& executor, const RowsShape& shape, const T* dy, const T* z, const Vector& weight,
                      const float* mean, const float* rstd, T* dz, T* dx, void* dweight, void* dbias, float* dx_bias) {
  const int64_t n = shape.columns, padded = padded_columns(n);
  float* room = static_cast<float*>(scratch(kScratchTile, padded * 4));
  const NormBackward<T, T> a{shape.rows, n,  dy, z, mean, rstd, as_float(weight, n, room),
                             make_dropout(shape.dropout_p, shape.seed), dz, dx, dx_bias != nullptr};
  const float* sums = a.dropout.active ? norm_backward<DropoutAt::kBefore>(executor, a)
                                       : norm_backward<DropoutAt::kNowhere>(executor, a);
  store_as(weight.dtype, sums, n, dweight);
  store_as(weight.dtype, sums + padded, n, dbias);
  if (dx_bias != nullptr) store_as(DType::kFloat32, sums + 2 * padded, n, dx_bias);
}

void layernorm_bwd(const Executor& executor, DType dtype, const RowsShape& shape, const void* dy, const void* z,
                   Vector weight, const float* mean, const float* rstd, void* dz, void* dx, void* dweight, void* dbias,
                   float* dx_bias) {
  if (dtype == DType::kFloat32) {
    layernorm_bwd_as(executor, shape, static_cast<const float*>(dy), static_cast<const float*>(z), weight, mean, rstd,
                     static_cast<float*>(dz), static_cast<float*>(dx), dweight, dbias, dx_bias);
  } else {
    layernorm_bwd_as(executor, shape, static_cast<const bf16*>(dy), static_cast<const bf16*>(z), weight, mean, rstd,
                     static_cast<bf16*>(dz), static_cast<bf16*>(dx), dweight, dbias, dx_bias);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
