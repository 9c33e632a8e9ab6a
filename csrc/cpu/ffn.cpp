// The feed-forward network: linear, exact GELU, linear, with the activation between them kept in cache.
#include "gemm.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

// A task of fewer rows would read the weights too often.
constexpr int64_t kFusedRows = 4 * MR;
constexpr int64_t kHiddenBytes = 512 << 10;  // of activations of a task, in L2
// Tokens whose activation is in memory at a time where x is packed.
constexpr int64_t kSlabTokens = 1536;

// What leaves the first product where x is packed: rows are units, columns tokens. The activation goes straight into the
// panels that the second product reads.
template <class T>
struct GeluToPanels {
  float* panels;  // as PackedB of tokens, depth n1
  int64_t n1;
  const T* bias;
  T* pre;  // [m, n1] or null

  void expect(int64_t i, int64_t rows, int64_t j, int64_t cols, Fetch& fetch) const {
    const int64_t width = panel_width(cols);
    fetch.rows(panels + j * n1 + i * width, width, rows, width);
    if (pre != nullptr) StoreTransposed<T>{pre, n1, nullptr}.expect(i, rows, j, cols, fetch);
  }
  void operator()(float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    const int64_t width = panel_width(cols);
    float* out = panels + j * n1 + i * width;
    for (int64_t r = 0; r < rows; ++r) {
      const vf b = splat(to_float(bias[i + r]));
      for (int64_t c = 0; c < width; c += VLEN) {
        const vf x = load(tile + r * ld + c) + b;
        if (pre != nullptr) store(tile + r * ld + c, x);
        store(out + r * width + c, gelu(x));
      }
    }
    if (pre != nullptr) StoreTransposed<T>{pre, n1, nullptr}(tile, ld, i, rows, j, cols);
  }
};

// What leaves it where the weights are: rows are tokens.
template <class T>
struct GeluRows {
  float* out;  // row 0 is token `first`
  int64_t first, n1;
  const T* bias;
  T* pre;  // [m, n1] or null

  void expect(int64_t i, int64_t rows, int64_t j, int64_t cols, Fetch& fetch) const {
    if (pre != nullptr) fetch.rows(pre + i * n1 + j, n1, rows, cols);
  }
  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    for (int64_t c = 0; c < cols; c += VLEN) {
      const int64_t n = smaller(cols - c, VLEN);
      const vf b = load_n(bias + j + c, n);
      for (int64_t r = 0; r < rows; ++r) {
        const vf x = load(tile + r * ld + c) + b;
        if (pre != nullptr) {
          store_n(pre + (i + r) * n1 + j + c, x, n);
        }
        store_n(out + (i + r - first) * n1 + j + c, gelu(x), n);
      }
    }
  }
};

template <class T>
void ffn_fwd_as(const Executor& executor, DType dtype, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* x,
                const void* w1, const T* b1, const void* w2, T* y, T* pre) {
  if (packs_x(m, n1)) {  // both products are formed transposed, and nothing but x is packed
    const int64_t slabs = ceil_div(m, kSlabTokens), slab = ceil_div(ceil_div(m, slabs), NR) * NR;
    for (int64_t first = 0; first < m; first += slab) {
      const int64_t count = smaller(slab, m - first);
      const char* from = static_cast<const char*>(x) + first * k * static_cast<int64_t>(sizeof(T));
      const PackedB tokens = pack(executor, single({from, 1, k, dtype}, count), k, kScratchPackB);
      PackedB hidden = tokens;
      hidden.depth = n1;
      float* panels = static_cast<float*>(scratch(kScratchPackB2, hidden.panels() * n1 * NR * 4));
      hidden.data = panels;
      T* slab_pre = pre == nullptr ? nullptr : pre + first * n1;
      gemm(executor, single({w1, k, 1, dtype}, n1), tokens, nullptr, GeluToPanels<T>{panels, n1, b1, slab_pre});
      gemm(executor, single({w2, n1, 1, dtype}, n2), hidden, nullptr, StoreTransposed<T>{y + first * n2, n2, nullptr});
    }
    return;
  }
  const PackedB up = pack(executor, single({w1, 1, k, dtype}, n1), k, kScratchPackB);
  const PackedB down = pack(executor, single({w2, 1, n1, dtype}, n2), n1, kScratchPackB2);
  const Matrix all{x, k, 1, dtype};
  const int64_t most = smaller(kTaskRows, kHiddenBytes / (4 * larger(n1, 1)) / MR * MR);
  if (most >= kFusedRows) {
    // The activation of one task stays in L2.
    const RowBlocks blocks(m, executor.workers, most);
    parallel_tasks(executor, blocks.count, [&](int64_t task, int) {
      const int64_t first = blocks.first(task), count = blocks.first(task + 1) - first;
      float* hidden = static_cast<float*>(scratch(kScratchRows, most * n1 * 4));
      multiply_task(from_row(all, first), first, count, up, 0, up.panels(), nullptr,
                    GeluRows<T>{hidden, first, n1, b1, pre});
      multiply_task({hidden, n1, 1, DType::kFloat32}, first, count, down, 0, down.panels(), nullptr,
                    StoreRows<T>{y, n2, nullptr});
    });
    return;
  }
  // Too wide for that: so few rows to a task would read the weights too often. The activation of some tasks of full
  // height at a time instead, in L3.
  const int64_t slab = smaller(m, 8 * kTaskRows * executor.workers);
  float* hidden = static_cast<float*>(scratch(kScratchRows, slab * n1 * 4));
  for (int64_t first = 0; first < m; first += slab) {
    const int64_t count = smaller(slab, m - first);
    T* slab_pre = pre == nullptr ? nullptr : pre + first * n1;
    const char* from = static_cast<const char*>(x) + first * k * static_cast<int64_t>(sizeof(T));
    gemm(executor, single({from, k, 1, dtype}, count), up, nullptr, GeluRows<T>{hidden, 0, n1, b1, slab_pre});
    gemm(executor, single({hidden, n1, 1, DType::kFloat32}, count), down, nullptr,
         StoreRows<T>{y + first * n2, n2, nullptr});
  }
}

void ffn_fwd(const Executor& executor, DType dtype, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* x,
             const void* w1, const void* b1, const void* w2, void* y, void* pre) {
  if (dtype == DType::kFloat32) {
    ffn_fwd_as(executor, dtype, m, k, n1, n2, x, w1, static_cast<const float*>(b1), w2, static_cast<float*>(y),
               static_cast<float*>(pre));
  } else {
    ffn_fwd_as(executor, dtype, m, k, n1, n2, x, w1, static_cast<const bf16*>(b1), w2, static_cast<bf16*>(y),
               static_cast<bf16*>(pre));
  }
}

// d pre = d hidden * gelu'(pre), and, unless panels is null, hidden = gelu(pre) in what the gradient of the second weight
// reads.
template <class T>
struct GeluGradient {
  const T* pre;
  float* dpre;
  float* panels;  // as PackedB of hidden, depth m
  int64_t m, n1;

  void expect(int64_t i, int64_t rows, int64_t j, int64_t cols, Fetch& fetch) const {
    const int64_t width = panel_width(cols);
    fetch.rows(pre + i * n1 + j, n1, rows, cols);
    fetch.rows(dpre + i * n1 + j, n1, rows, cols);
    if (panels != nullptr) fetch.rows(panels + j * m + i * width, width, rows, width);
  }
  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    const int64_t width = panel_width(cols);
    float* out = panels == nullptr ? nullptr : panels + j * m + i * width;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (i + r) * n1 + j;
      for (int64_t c = 0; c < width; c += VLEN) {
        const int64_t n = smaller(larger(cols - c, 0), VLEN);
        const vf x = load_n(pre + at + c, n);
        const NormalCdf normal = normal_cdf(x);
        store_n(dpre + at + c, load(tile + r * ld + c) * (normal.cdf + x * normal.density), n);
        if (out != nullptr) store(out + r * width + c, x * normal.cdf);
      }
    }
  }
};

template <class T>
void ffn_bwd_as(const Executor& executor, DType dtype, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* dy,
                const void* x, const T* pre, const void* w1, const void* w2, T* dx, T* dw1, T* db1, T* dw2,
                float* dpre) {
  const PackedB down = pack_rows(executor, single({w2, n1, 1, dtype}, n2), n1, kScratchPackB);
  float* panels =
      dw2 == nullptr ? nullptr : static_cast<float*>(scratch(kScratchPackB2, panel_count(n1) * m * NR * 4));
  const PackedB hidden{panels, m, 1, {0, panel_count(n1)}, {0}, {n1}};
  gemm(executor, single({dy, n2, 1, dtype}, m), down, nullptr, GeluGradient<T>{pre, dpre, panels, m, n1});
  if (dw2 != nullptr) weight_gradient<T>(executor, n2, {dy, n2, 1, dtype}, hidden, dw2, nullptr);
  if (dw1 != nullptr) {
    weight_gradient<T>(executor, m, n1, k, {dpre, n1, 1, DType::kFloat32}, {x, k, 1, dtype}, dw1, db1);
  } else if (db1 != nullptr) {
    column_sums(executor, m, n1, dpre, db1);
  }
  if (dx == nullptr) return;
  const PackedB up = pack_rows(executor, single({w1, k, 1, dtype}, n1), k, kScratchPackB);
  gemm(executor, single({dpre, n1, 1, DType::kFloat32}, m), up, nullptr, StoreRows<T>{dx, k, nullptr});
}

void ffn_bwd(const Executor& executor, DType dtype, int64_t m, int64_t k, int64_t n1, int64_t n2, const void* dy,
             const void* x, const void* pre, const void* w1, const void* w2, void* dx, void* dw1, void* db1, void* dw2,
             float* dpre) {
  if (dtype == DType::kFloat32) {
    ffn_bwd_as(executor, dtype, m, k, n1, n2, dy, x, static_cast<const float*>(pre), w1, w2, static_cast<float*>(dx),
               static_cast<float*>(dw1), static_cast<float*>(db1), static_cast<float*>(dw2), dpre);
  } else {
    ffn_bwd_as(executor, dtype, m, k, n1, n2, dy, x, static_cast<const bf16*>(pre), w1, w2, static_cast<bf16*>(dx),
               static_cast<bf16*>(dw1), static_cast<bf16*>(db1), static_cast<bf16*>(dw2), dpre);
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
