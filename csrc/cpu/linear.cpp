// Linear layers, forward and backward. No weight is kept packed between calls: of the two operands of a product the
// smaller one is packed anew, which costs a fraction of the product that grows as small as the other operand is large.
#include "gemm.h"
#include "table.h"

namespace fastbert {
namespace FASTBERT_ISA {

template <class T>
const T* bias_of(const void* const* bias, int i) {
  return bias == nullptr ? nullptr : static_cast<const T*>(bias[i]);
}

// The bias of the weight that output `col` belongs to, so that it can be indexed by `col`; null if it has none.
template <class T>
struct StackBias {
  const int64_t* n;
  const void* const* bias;

  const T* operator()(int64_t col) const {
    int i = 0;
    int64_t before = 0;
    while (col >= before + n[i]) before += n[i++];
    const T* b = bias_of<T>(bias, i);
    return b == nullptr ? nullptr : b - before;
  }
};

// y of several weights side by side. Transposed: rows of C are outputs.
template <class Store, class T, bool Transposed>
struct StoreStack {
  T* y;
  int64_t ld;
  StackBias<T> bias_at;

  void expect(int64_t i, int64_t rows, int64_t j, int64_t cols, Fetch& fetch) const {
    Store{y, ld, nullptr}.expect(i, rows, j, cols, fetch);
  }
  void operator()(const float* tile, int64_t ld_tile, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    Store{y, ld, bias_at(Transposed ? i : j)}(tile, ld_tile, i, rows, j, cols);
  }
};

template <class T>
void linear_fwd_as(const Executor& executor, DType dtype, int64_t m, int64_t k, const void* x, int count,
                   const int64_t* n, const void* const* weight, const void* const* bias, T* y) {
  Stack weights{count, {}, {}};
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += weights.extent[i] = n[i];
  const StackBias<T> bias_at{n, bias};
  if (packs_x(m, total)) {
    for (int i = 0; i < count; ++i) weights.part[i] = {weight[i], k, 1, dtype};
    const PackedB packed = pack(executor, single({x, 1, k, dtype}, m), k, kScratchPackB);
    gemm(executor, weights, packed, nullptr, StoreStack<StoreTransposed<T>, T, true>{y, total, bias_at});
  } else {
    for (int i = 0; i < count; ++i) weights.part[i] = {weight[i], 1, k, dtype};
    const PackedB packed = pack(executor, weights, k, kScratchPackB);
    gemm(executor, single({x, k, 1, dtype}, m), packed, nullptr, StoreStack<StoreRows<T>, T, false>{y, total, bias_at});
  }
}

void linear_fwd(const Executor& executor, DType dtype, int64_t m, int64_t k, const void* x, int count, const int64_t* n,
                const void* const* weight, const void* const* bias, void* y) {
  if (dtype == DType::kFloat32) {
    linear_fwd_as(executor, dtype, m, k, x, count, n, weight, bias, static_cast<float*>(y));
  } else {
    linear_fwd_as(executor, dtype, m, k, x, count, n, weight, bias, static_cast<bf16*>(y));
  }
}

template <class T>
void linear_bwd_as(const Executor& executor, DType dtype, int64_t m, int64_t k, const T* dy, const void* x, int count,
                   const int64_t* n, const void* const* weight, T* dx, T* dw, T* db) {
  Stack weights{count, {}, {}};
  int64_t total = 0;
  for (int i = 0; i < count; ++i) {
    weights.part[i] = {weight[i], k, 1, dtype};
    total += weights.extent[i] = n[i];
  }
  if (dx != nullptr) {
    const PackedB packed = pack_rows(executor, weights, k, kScratchPackB);
    gemm(executor, single({dy, total, 1, dtype}, m), packed, nullptr, StoreRows<T>{dx, k, nullptr});
  }
  if (dw != nullptr) {
    weight_gradient(executor, m, total, k, {dy, total, 1, dtype}, {x, k, 1, dtype}, dw, db);
  } else if (db != nullptr) {
    column_sums(executor, m, total, dy, db);
  }
}

void linear_bwd(const Executor& executor, DType dtype, int64_t m, int64_t k, const void* dy, const void* x, int count,
                const int64_t* n, const void* const* weight, void* dx, void* dw, void* db) {
  if (dtype == DType::kFloat32) {
    linear_bwd_as(executor, dtype, m, k, static_cast<const float*>(dy), x, count, n, weight, static_cast<float*>(dx),
                  static_cast<float*>(dw), static_cast<float*>(db));
  } else {
    linear_bwd_as(executor, dtype, m, k, static_cast<const bf16*>(dy), x, count, n, weight, static_cast<bf16*>(dx),
                  static_cast<bf16*>(dw), static_cast<bf16*>(db));
  }
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
