// The descriptors of wgmma's operands that CuTe makes, on the host: there, a place in shared memory is a plain pointer.
#include <cstdint>
#include <cstdio>

inline uint64_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<uint64_t>(p); }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace {

using namespace cute;
using Element = cutlass::bfloat16_t;
using SM90::GMMA::Major;

template <Major MAJOR, int D>
using Atom = conditional_t<D % 64 == 0, SM90::GMMA::Layout_SW128_Atom<Element, MAJOR>, SM90::GMMA::Layout_SW64_Atom<Element, MAJOR>>;

template <class TILE, class SHAPE>
uint64_t describe_rows(const TILE& tile, const SHAPE& shape, int row, int k) {
  return SM90::GMMA::make_gmma_desc<Major::K>(local_tile(tile, shape, make_coord(row, k))).desc_;
}
template <class TILE, class SHAPE>
uint64_t describe_columns(const TILE& tile, const SHAPE& shape, int column, int k) {
  return SM90::GMMA::make_gmma_desc<Major::MN>(local_tile(tile, shape, make_coord(column, k))).desc_;
}

// Panel after panel, each with row after row.
template <int ROWS, int D>
auto rows_of(void* data) {
  return make_tensor(make_smem_ptr(static_cast<Element*>(data)),
                     tile_to_shape(Atom<Major::K, D>{}, Shape<Int<ROWS>, Int<D>>{}, Step<_1, _2>{}));
}
template <int ROWS, int D>
auto columns_of(void* data) {
  return make_tensor(make_smem_ptr(static_cast<Element*>(data)),
                     tile_to_shape(Atom<Major::MN, D>{}, Shape<Int<D>, Int<ROWS>>{}, Step<_2, _1>{}));
}

template <class F>
uint64_t with_sizes(int rows, int columns, const F& run) {
  if (rows == 128 && columns == 32) return run(Int<128>{}, Int<32>{});
  if (rows == 128 && columns == 64) return run(Int<128>{}, Int<64>{});
  if (rows == 128 && columns == 128) return run(Int<128>{}, Int<128>{});
  return run(Int<64>{}, Int<128>{});
}

}  // namespace

uint64_t theirs_by_rows(int rows, int columns, void* data, int part, int k) {
  return with_sizes(rows, columns, [&](auto r, auto c) {
    return describe_rows(rows_of<decltype(r)::value, decltype(c)::value>(data), Shape<_64, _16>{}, part, k);
  });
}

// panel: -1 for all columns.
uint64_t theirs_by_columns(int rows, int columns, void* data, int panel, int k) {
  return with_sizes(rows, columns, [&](auto r, auto c) {
    constexpr int D = decltype(c)::value;
    const auto tile = columns_of<decltype(r)::value, D>(data);
    return panel < 0 ? describe_columns(tile, Shape<Int<D>, _16>{}, 0, k)
                     : describe_columns(tile, Shape<Int<(D < 64 ? D : 64)>, _16>{}, panel, k);
  });
}
