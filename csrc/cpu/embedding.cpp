// dropout(LayerNorm(word + token type + position embedding)), forward and backward.
#include "rows.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

template <class T>
void embedding_fwd_as(const Executor& executor, const RowsShape& shape, const int64_t* const* ids,
                      const void* const* tables, const Vector& weight_, const Vector& bias_, T* y, T* xhat, float* rstd) {
  const int64_t n = shape.columns, padded = padded_columns(n);
  float* room = static_cast<float*>(scratch(kScratchSums, 2 * padded * 4));
  const float* weight = as_float(weight_, n, room);
  const float* bias = as_float(bias_, n, room + padded);
  const Dropout dropout = make_dropout(shape.dropout_p, shape.seed);
  const int64_t rows_per_task = larger(1, kTaskElements / n);
  parallel_tasks(executor, ceil_div(shape.rows, rows_per_task), [&](int64_t task, int) {
    float* row = static_cast<float*>(scratch(kScratchRows, 2 * padded * 4));
    float* factors = row + padded;
    for (int64_t i = task * rows_per_task; i < smaller((task + 1) * rows_per_task, shape.rows); ++i) {
      const T* word = static_cast<const T*>(tables[0]) + ids[0][i] * n;
      const T* position = static_cast<const T*>(tables[1]) + ids[1][i] * n;
      const T* type = static_cast<const T*>(tables[2]) + ids[2][i] * n;
      if (dropout.active) dropout.factors(factors, 0, n, static_cast<uint32_t>(i), 0, kStreamRows);
      const float m = sum_columns(n, [&](int64_t c, int64_t count) {
        const vf v = load_n(word + c, count) + load_n(type + c, count) + load_n(position + c, count);
        store(row + c, v);
        return v;
      }) / static_cast<float>(n);
      const float s = inverse_deviation(row, n, m, shape.eps);
      if (rstd != nullptr) rstd[i] = s;
      for_columns(n, [&](int64_t c, int64_t count) {
        const vf x = (load(row + c) - m) * s;
        if (xhat != nullptr) store_n(xhat + i * n + c, x, count);
        vf v = x * load_n(weight + c, count) + load_n(bias + c, count);
        if (dropout.active) v *= load(factors + c);
        store_n(y + i * n + c, v, count);
      });
    }
  });
}

void embedding_fwd(const Executor& executor, DType dtype, const RowsShape& shape, const int64_t* const* ids,
                   const void* const* tables, Vector weight, Vector bias, void* y, void* xhat, float* rstd) {
  if (dtype == DType::kFloat32) {
    embedding_fwd_as(executor, shape, ids, tables, weight, bias, static_cast<float*>(y), static_cast<float*>(xhat), rstd);
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

// out[c .. c + count) = sum of those columns of the tokens' rows of dz. Sums of 64 rows are added up, which keeps the error
// of the token types' gradients, sums over half of the tokens, small.
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

// Memory that nobody reads soon: past the cache, and without reading what is overwritten.
template <class T>
FASTBERT_INLINE void fill_zero(T* out, int64_t n) {
#if defined(__SSE2__)
  char *p = reinterpret_cast<char*>(out), *end = reinterpret_cast<char*>(out + n);
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 15) & ~uintptr_t{15});
  if (aligned < end) {
    std::memset(p, 0, aligned - p);
    for (p = aligned; p + 16 <= end; p += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_setzero_si128());
  }
  std::memset(p, 0, end - p);
#else
  std::memset(out, 0, n * sizeof(T));
#endif
}

// dtable [rows, n]: each row is written once, by one worker, so that neither atomics nor a zeroed table are needed.
template <class T>
void table_gradient(const Executor& executor, const float* dz, const int64_t* ids, int64_t count, int64_t n, int64_t rows,
                    int64_t padding_idx, T* dtable) {
  int64_t* memory = static_cast<int64_t*>(scratch(kScratchPackB, (rows + 1 + count) * sizeof(int64_t)));
  const TokensByRow sorted{memory, memory + rows + 1};
  sort_by_row(ids, count, rows, sorted);
  // Few rows with many tokens each (the types): share out the columns too.
  const int64_t slice = rows >= 64 ? n : 4 * VLEN, slices = ceil_div(n, slice);
  const int64_t rows_per_task = rows >= 64 ? larger(1, kTaskElements / n) : 1;
  parallel_tasks(executor, ceil_div(rows, rows_per_task) * slices, [&](int64_t task, int) {
    const int64_t begin = task / slices * rows_per_task, end = smaller(begin + rows_per_task, rows);
    const int64_t c0 = task % slices * slice, c1 = smaller(c0 + slice, n);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t number = r == padding_idx ? 0 : sorted.first[r + 1] - sorted.first[r];
      if (number == 0) {
        fill_zero(dtable + r * n + c0, c1 - c0);
        continue;
      }
      for_columns(c1 - c0, [&](int64_t c, int64_t width) {
        sum_tokens(dz, n, sorted.tokens + sorted.first[r], number, c0 + c, width, dtable + r * n + c0 + c);
      });
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
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
    table_gradient(executor, dz, ids[i], shape.rows, n, sizes[i], i == 0 ? padding_idx : -1, static_cast<T*>(dtables[i]));
}

void embedding_bwd(const Executor& executor, DType dtype, const RowsShape& shape, const void* dy, const void* xhat,
                   const float* rstd, const int64_t* const* ids, Vector weight, const int64_t* sizes, int64_t padding_idx,
                   void* const* dtables, void* dweight, void* dbias, float* workspace) {
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
