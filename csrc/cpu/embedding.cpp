// dropout(LayerNorm(word + token type + position embedding)), forward and backward.
#include "rows.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int64_t kWordsAhead = 2;

template <class T>
struct EmbeddingForward {
  int64_t rows, columns;
  double eps;
  const int64_t* ids[3];
  const T* tables[3];
  const float *weight, *bias;
  Dropout dropout;
  T *y, *xhat;
  float* rstd;
};

// buffer: two padded rows.
template <bool Drop, class T>
void embedding_row(const EmbeddingForward<T>& a, int64_t row, float* buffer) {
  const int64_t n = a.columns;
  const T* const word = a.tables[0] + a.ids[0][row] * n;
  const T* const position = a.tables[1] + a.ids[1][row] * n;
  const T* const type = a.tables[2] + a.ids[2][row] * n;
  const float *const weight = a.weight, *const bias = a.bias;
  T *const y = a.y + row * n, *const xhat = a.xhat == nullptr ? nullptr : a.xhat + row * n;
  float* const factors = buffer + padded_columns(n);
  // No hardware prefetcher can know which words follow.
  const int64_t next = smaller(row + kWordsAhead, a.rows - 1);
  for (int64_t c = 0; c < n; c += 64 / sizeof(T)) __builtin_prefetch(a.tables[0] + a.ids[0][next] * n + c);
  if constexpr (Drop) a.dropout.factors(factors, 0, n, static_cast<uint32_t>(row), 0, kStreamRows);
  const float total = sum_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
    const vf v = load_n(word + c, count) + load_n(type + c, count) + load_n(position + c, count);
    store(buffer + c, v);
    return v;
  });
  const auto [mean, rstd] = statistics(buffer, n, total, a.eps);
  if (a.rstd != nullptr) a.rstd[row] = rstd;
  for_columns(n, [&](int64_t c, int64_t count) FASTBERT_INLINED {
    const vf x = (load(buffer + c) - mean) * rstd;
    if (xhat != nullptr) store_n(xhat + c, x, count);
    vf v = x * load_n(weight + c, count) + load_n(bias + c, count);
    if constexpr (Drop) v *= load(factors + c);
    store_n(y + c, v, count);
  });
}

template <bool Drop, class T>
void embedding_fwd_tasks(const Executor& executor, const EmbeddingForward<T>& a) {
  const int64_t rows_per_task = larger(1, kTaskElements / a.columns);
  parallel_tasks(executor, ceil_div(a.rows, rows_per_task), [&](int64_t task, int) {
    float* buffer = static_cast<float*>(scratch(kScratchRows, 2 * padded_columns(a.columns) * 4));
    for (int64_t row = task * rows_per_task; row < smaller((task + 1) * rows_per_task, a.rows); ++row)
      embedding_row<Drop>(a, row, buffer);
  });
}

template <class T>
void embedding_fwd_as(const Executor& executor, const RowsShape& shape, const int64_t* const* ids,
                      const void* const* tables, const Vector& weight, const Vector& bias, T* y, T* xhat, float* rstd) {
  const int64_t n = shape.columns, padded = padded_columns(n);
  float* room = static_cast<float*>(scratch(kScratchSums, 2 * padded * 4));
  const auto table = [&](int i) { return static_cast<const T*>(tables[i]); };
  const EmbeddingForward<T> a{shape.rows, n, shape.eps, {ids[0], ids[1], ids[2]}, {table(0), table(1), table(2)},
                              as_float(weight, n, room), as_float(bias, n, room + padded),
                              make_dropout(shape.dropout_p, shape.seed), y, xhat, rstd};
  if (a.dropout.active) {
    embedding_fwd_tasks<true>(executor, a);
  } else {
    embedding_fwd_tasks<false>(executor, a);
  }
}

void embedding_fwd(const Executor& executor, DType dtype, const RowsShape& shape, const int64_t* const* ids,
                   const void* const* tables, Vector weight, Vector bias, void* y, void* xhat, float* rstd) {
  if (dtype == DType::kFloat32) {
    embedding_fwd_as(executor, shape, ids, tables, weight, bias, static_cast<float*>(y), static_cast<float*>(xhat),
                     rstd);
  } else {
    embedding_fwd_as(executor, shape, ids, tables, weight, bias, static_cast<bf16*>(y), static_cast<bf16*>(xhat), rstd);
  }
}

// The tokens of each row of a table, in their order: tokens[first[row] .. first[row + 1]).
struct TokensByRow {
  int64_t* first;   // [rows + 1]
  int64_t* tokens;  // [number of ids]
};

inline void sort_by_row(const int64_t* ids, int64_t count, int64_t rows, const TokensByRow& sorted) {
  std::memset(sorted.first, 0, (rows + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) ++sorted.first[ids[i] + 1];
  for (int64_t r = 0; r < rows; ++r) sorted.first[r + 1] += sorted.first[r];
  // first[r] moves to the end of row r, which is where row r + 1 begins.
  for (int64_t i = 0; i < count; ++i) sorted.tokens[sorted.first[ids[i]]++] = i;
  std::memmove(sorted.first + 1, sorted.first, rows * sizeof(int64_t));
  sorted.first[0] = 0;
}

// out[c .. c + count) = sum of those columns of the tokens' rows of dz. Sums of 64 rows are added up, which keeps the
// error of the token types' gradients, sums over half of the tokens, small.
template <class T>
FASTBERT_INLINE void sum_tokens(const float* dz, int64_t n, const int64_t* tokens, int64_t number, int64_t c,
                                int64_t count, T* out) {
  vf total = {};
  for (int64_t t = 0; t < number;) {
    const int64_t end = smaller(t + 64, number);
    vf part = {};
    for (; t < end; ++t) part += load_n(dz + tokens[t] * n + c, count);
    total += part;
  }
  store_n(out, total, count);
}

// dtable [rows, n]: each row is written once, by one worker, so that neither atomics nor a zeroed table are needed.
template <class T>
void table_gradient(const Executor& executor, const float* dz, const int64_t* ids, int64_t count, int64_t n,
                    int64_t rows, int64_t padding_idx, T* dtable) {
  int64_t* memory = static_cast<int64_t*>(scratch(kScratchPackB, (rows + 1 + count) * sizeof(int64_t)));
  const TokensByRow sorted{memory, memory + rows + 1};
  sort_by_row(ids, count, rows, sorted);
  // Few rows with many tokens each (the types): share out the columns too.
  const int64_t slice = rows >= 64 ? n : 4 * VLEN, slices = ceil_div(n, slice);
  const int64_t rows_per_task = rows >= 64 ? larger(1, kTaskElements / n) : 1;
  parallel_tasks(executor, ceil_div(rows, rows_per_task) * slices, [&](int64_t task, int) {
    const int64_t begin = task / slices * rows_per_task, end = smaller(begin + rows_per_task, rows);
    const int64_t c0 = task % slices * slice, c1 = smaller(c0 + slice, n);
    const auto number = [&](int64_t r) { return r == padding_idx ? 0 : sorted.first[r + 1] - sorted.first[r]; };
    for (int64_t r = begin; r < end;) {
      if (number(r) > 0) {
        for_columns(c1 - c0, [&](int64_t c, int64_t width) FASTBERT_INLINED {
          sum_tokens(dz, n, sorted.tokens + sorted.first[r], number(r), c0 + c, width, dtable + r * n + c0 + c);
        });
        ++r;
        continue;
      }
      // Most rows of a vocabulary: one call for as many as there are, which fills faster than one for each.
      const int64_t empty = r;
      do ++r;
      while (slices == 1 && r < end && number(r) == 0);
      std::memset(dtable + empty * n + c0, 0, ((r - empty - 1) * n + c1 - c0) * sizeof(T));
    }
  });
}

template <class T>
void embedding_bwd_as(const Executor& executor, const RowsShape& shape, const T* dy, const T* xhat, const float* rstd,
                      const int64_t* const* ids, const Vector& weight, const int64_t* sizes, int64_t padding_idx,
                      void* const* dtables, void* dweight, void* dbias, float* dz) {
  const int64_t n = shape.columns;
  float* room = static_cast<float*>(scratch(kScratchTile, padded_columns(n) * 4));
  const NormBackward<T, float> a{shape.rows, n,  dy, xhat, nullptr, rstd, as_float(weight, n, room),
                                 make_dropout(shape.dropout_p, shape.seed), dz, nullptr, false};
  const float* sums = a.dropout.active ? norm_backward<DropoutAt::kAfter>(executor, a)
                                       : norm_backward<DropoutAt::kNowhere>(executor, a);
  store_as(weight.dtype, sums, n, dweight);
  store_as(weight.dtype, sums + padded_columns(n), n, dbias);
  for (int i = 0; i < 3; ++i)
    table_gradient(executor, dz, ids[i], shape.rows, n, sizes[i], i == 0 ? padding_idx : -1,
                   static_cast<T*>(dtables[i]));
}

void embedding_bwd(const Executor& executor, DType dtype, const RowsShape& shape, const void* dy, const void* xhat,
                   const float* rstd, const int64_t* const* ids, Vector weight, const int64_t* sizes,
                   int64_t padding_idx, void* const* dtables, void* dweight, void* dbias, float* workspace) {
  if (dtype == DType::kFloat32) {
    embedding_bwd_as(executor, shape, static_cast<const float*>(dy), static_cast<const float*>(xhat), rstd, ids, weight,
                     sizes, padding_idx, dtables, dweight, dbias, workspace);
  } else {
    embedding_bwd_as(executor, shape, static_cast<const bf16*>(dy), static_cast<const bf16*>(xhat), rstd, ids, weight,
                     sizes, padding_idx, dtables, dweight, dbias, workspace);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
