// LayerNorm(dropout(x + x_bias) + residual), forward and backward.
#include "rows.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

template <class X, class R, class Y>
void layernorm_fwd_as(const Executor& executor, const RowsShape& shape, const X* x, const Vector& x_bias_,
                      const R* residual, const Vector& weight_, const Vector& bias_, Y* y, Y* z, float* mean,
                      float* rstd) {
  const int64_t n = shape.columns, padded = padded_columns(n);
  float* room = static_cast<float*>(scratch(kScratchSums, 3 * padded * 4));
  const float* x_bias = as_float(x_bias_, n, room);
  const float* weight = as_float(weight_, n, room + padded);
  const float* bias = as_float(bias_, n, room + 2 * padded);
  const Dropout dropout = make_dropout(shape.dropout_p, shape.seed);
  const int64_t rows_per_task = larger(1, kTaskElements / n);
  parallel_tasks(executor, ceil_div(shape.rows, rows_per_task), [&](int64_t task, int) {
    float* row = static_cast<float*>(scratch(kScratchRows, 2 * padded * 4));
    float* factors = row + padded;
    for (int64_t i = task * rows_per_task; i < smaller((task + 1) * rows_per_task, shape.rows); ++i) {
      if (dropout.active) dropout.factors(factors, 0, n, static_cast<uint32_t>(i), 0, kStreamRows);
      const float m = sum_columns(n, [&](int64_t c, int64_t count) {
        vf v = load_n(x + i * n + c, count);
        if (x_bias != nullptr) v += load_n(x_bias + c, count);
        if (dropout.active) v *= load(factors + c);
        if (residual != nullptr) v += load_n(residual + i * n + c, count);
        if (z != nullptr) store_n(z + i * n + c, v, count);
        store(row + c, v);
        return v;
      }) / static_cast<float>(n);
      const float s = inverse_deviation(row, n, m, shape.eps);
      if (mean != nullptr) mean[i] = m, rstd[i] = s;
      for_columns(n, [&](int64_t c, int64_t count) {
        const vf v = (load(row + c) - m) * s * load_n(weight + c, count) + load_n(bias + c, count);
        store_n(y + i * n + c, v, count);
      });
    }
  });
}

void layernorm_fwd(const Executor& executor, const RowsShape& shape, Vector x, Vector x_bias, Vector residual,
                   Vector weight, Vector bias, void* y, void* z, float* mean, float* rstd) {
  const auto as = [&](auto* x_, auto* residual_, auto* y_) {
    layernorm_fwd_as(executor, shape, x_, x_bias, residual_, weight, bias, y_, static_cast<decltype(y_)>(z), mean, rstd);
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
