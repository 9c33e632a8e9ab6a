// ffn's products for compute capability 9.0 (compiled for sm_90a): CUTLASS's persistent ping-pong kernel, in which the
// epilogue of one tile runs under the wgmma of the next, with its epilogues put together from CUTLASS's nodes.
#include "cuda/cutlass/ffn.h"

// In this order: not every header includes all that it uses.
#include <cutlass/cutlass.h>

#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/gemm/kernel/tile_scheduler.hpp>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include <cstring>

#include "cuda/launch.h"

namespace fastbert::cuda {
namespace {

namespace fusion = cutlass::epilogue::fusion;
namespace collective = cutlass::epilogue::collective;
using cute::_0;
using cute::_1;
using cute::Int;
using RowMajor = cutlass::layout::RowMajor;
using Tile = cute::Shape<Int<kFfnRows>, Int<kFfnColumns>, Int<64>>;
using Cluster = cute::Shape<_1, _1, _1>;
using Schedule = cutlass::epilogue::TmaWarpSpecialized;  // ping-pong's
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kVector = 8;

template <class T>
using Element = std::conditional_t<T::is_bf16, cutlass::bfloat16_t, cutlass::half_t>;

// On V = cutlass::Array<float, N>.
template <class V>
struct Gelu {
  CUTLASS_DEVICE V operator()(const V& v) const {
    V y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < V::kElements; ++i) y[i] = gelu(v[i]);
    return y;
  }
};

template <template <class> class FUNCTION, class OUT>
using Compute = fusion::Sm90Compute<FUNCTION, OUT, float, kRound>;

// A second matrix that an epilogue writes, beside the main one. SOURCE: of a matrix that it reads, or void.
template <class T, class SOURCE>
struct Store {
  using Descriptor =
      collective::detail::EpilogueDescriptor<Tile, collective::EpilogueTileAuto, SOURCE, Element<T>, Schedule>;
  using Of = collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, Element<T>>;
  using Node = fusion::Sm90AuxStore<Of::Stages, typename Of::EpilogueTile, Element<T>, kRound, typename Of::Stride,
                                    typename Of::SmemLayoutAtom, typename Of::CopyOpR2S>;
};

// act = gelu(store pre(product + bias))
template <class T>
using ForwardEpilogue = fusion::Sm90EVT<
    Compute<Gelu, Element<T>>,
    fusion::Sm90EVT<typename Store<T, void>::Node,
                    fusion::Sm90EVT<Compute<cutlass::plus, float>, fusion::Sm90AccFetch,
                                    fusion::Sm90RowBroadcast<0, Tile, Element<T>, float>>>>;

// Adds up the columns of a tile, which go to memory as they are; no tile adds to another's. A node of our own, as
// CUTLASS's keeps all of the tile's columns in a thread's registers, and this one those of a subtile.
struct ColumnSums {
  struct SharedStorage {
    FfnWarpSums sums;
  };
  struct Arguments {
    float* columns;
    int64_t stride;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  const Params* params;
  FfnWarpSums* shared;

  CUTLASS_HOST_DEVICE ColumnSums() {}
  CUTLASS_HOST_DEVICE ColumnSums(const Params& params_, const SharedStorage& storage)
      : params(&params_), shared(&const_cast<SharedStorage&>(storage).sums) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const fusion::ProducerLoadArgs<Args...>&) {
    return fusion::EmptyProducerLoadCallbacks{};
  }

  // For subtiles [ROWS, COLUMNS], one below the other before one beside the other.
  template <int ROWS, int COLUMNS>
  struct Callbacks : fusion::EmptyConsumerStoreCallbacks {
    static constexpr int kElements = ROWS * COLUMNS / kFfnColumns;  // of a thread
    float* out;
    FfnWarpSums& shared;
    int thread, column;  // the thread's first, in the tile
    FfnColumnSums<kElements> sums;

    CUTLASS_DEVICE Callbacks(float* out_, FfnWarpSums& shared_, int thread_, int column_)
        : out(out_), shared(shared_), thread(thread_), column(column_) {}

    template <class V>
    CUTLASS_DEVICE V visit(const cutlass::Array<float, kElements>&, int, int subtile_row, int, const V& values) {
      static_assert(V::kElements == kElements, "a visit for each subtile");
      sums.add(values, subtile_row == 0);
      return values;
    }

    template <class Shared, class Synchronize, class Values>
    CUTLASS_DEVICE void reduce(Shared&&, const Synchronize& synchronize, int subtile_row, int subtile_column, bool last,
                               Values) {
      if (subtile_row + 1 == kFfnRows / ROWS) sums.share(shared, thread, subtile_column * COLUMNS + column);
      if (!last) return;
      synchronize();
      out[thread] = ffn_column_sum(shared, thread);
    }
  };

  template <bool, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    // What FfnColumnSums takes for granted of the places of a thread's elements.
    const auto place = args.tCcD(cute::_, cute::_, cute::_, _0{}, _0{}).layout();
    CUTE_STATIC_ASSERT_V(cute::get<1>(place(Int<1>{})) == Int<1>{});
    CUTE_STATIC_ASSERT_V(cute::get<0>(place(Int<2>{})) == Int<8>{});
    CUTE_STATIC_ASSERT_V(cute::get<1>(place(Int<2>{})) == Int<0>{});
    CUTE_STATIC_ASSERT_V(cute::get<1>(place(Int<4>{})) == Int<8>{});
    CUTE_STATIC_ASSERT_V(cute::get<1>(place(Int<8>{})) == Int<16>{});
    using Subtile = decltype(cute::product_each(cute::shape(args.epi_tile)));
    const auto [m, n, k, l] = args.tile_coord_mnkl;
    const int column = cute::get<1>(args.residue_cD) - cute::get<1>(args.residue_tCcD);
    return Callbacks<cute::size<0>(Subtile{}), cute::size<1>(Subtile{})>(
        params->columns + m * params->stride + n * kFfnColumns, *shared, args.thread_idx, column);
  }
};

// pre -> product gelu'(pre), and stores gelu(pre): one node, so that what both have in common is computed once.
template <class T>
struct GeluBackward : Store<T, Element<T>>::Node {
  using Base = typename Store<T, Element<T>>::Node;
  using Base::Base;

  template <class STORE>
  struct Callbacks : STORE {
    CUTLASS_DEVICE explicit Callbacks(STORE&& store) : STORE(cute::move(store)) {}

    template <int N>
    CUTLASS_DEVICE auto visit(const cutlass::Array<float, N>& product, int vector, int subtile_row, int subtile_column,
                              const cutlass::Array<Element<T>, N>& pre) {
      cutlass::Array<float, N> act, dpre;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        float derivative;
        act[i] = gelu(static_cast<float>(pre[i]), &derivative);
        dpre[i] = product[i] * derivative;
      }
      STORE::visit(product, vector, subtile_row, subtile_column, act);
      return dpre;
    }
  };

  template <bool REFERENCE_SOURCE, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    auto store = Base::template get_consumer_store_callbacks<REFERENCE_SOURCE>(args);
    return Callbacks<decltype(store)>(cute::move(store));
  }
};

// dpre = column sums of (GeluBackward(pre)), which is written as it passes
template <class T>
using BackwardEpilogue = fusion::Sm90EVT<
    Compute<cutlass::epilogue::thread::Identity, Element<T>>,
    fusion::Sm90EVT<ColumnSums, fusion::Sm90EVT<GeluBackward<T>, fusion::Sm90SrcFetch<Element<T>>>>>;

// [rows, depth] times [depth, inner], of which LAYOUT tells how it lies.
template <class T, class LAYOUT, class SOURCE, class EPILOGUE>
struct Product {
  using Epilogue = typename collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, collective::EpilogueTileAuto, float, float,
      SOURCE, RowMajor, kVector, Element<T>, RowMajor, kVector, Schedule, EPILOGUE>::CollectiveOp;
  using Stages =
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element<T>, RowMajor, kVector, Element<T>, LAYOUT, kVector,
      float, Tile, Cluster, Stages, cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, Epilogue>;
};
template <class T>
using ForwardProduct = typename Product<T, cutlass::layout::ColumnMajor, void, ForwardEpilogue<T>>::Kernel;
template <class T>
using BackwardProduct = typename Product<T, RowMajor, Element<T>, BackwardEpilogue<T>>::Kernel;

// Kernels of our own around CUTLASS's, for their names.
template <class T>
__global__ void __launch_bounds__(ForwardProduct<T>::MaxThreadsPerBlock, 1)
    ffn_fwd_sm90_kernel(const __grid_constant__ typename ForwardProduct<T>::Params params) {
  ForwardProduct<T>()(params, shared_memory());
}
template <class T>
__global__ void __launch_bounds__(BackwardProduct<T>::MaxThreadsPerBlock, 1)
    ffn_bwd_sm90_kernel(const __grid_constant__ typename BackwardProduct<T>::Params params) {
  BackwardProduct<T>()(params, shared_memory());
}

// The stride of a matrix in row-major order.
auto row_major(int columns) { return cute::make_stride(static_cast<int64_t>(columns), _1{}, static_cast<int64_t>(0)); }

// CuTe leaves a descriptor of zeros where the driver refuses to make it, and tells nobody who could act on it.
template <class Copy>
void check_descriptor(const Copy& copy, const char* name) {
  constexpr CUtensorMap kNone{};
  if (std::memcmp(copy.get_tma_descriptor(), &kNone, sizeof kNone) == 0)
    throw std::runtime_error(std::string(name) + ": the driver made no TMA descriptor");
}

// The node that stores the second matrix, in the tree of an epilogue.
template <class TREE>
const auto& second_store(const TREE& tree, const FfnForward&) {
  return tree.op_0.op_1;
}
template <class TREE>
const auto& second_store(const TREE& tree, const FfnBackward&) {
  return tree.op_0.op_0.op_1;
}

template <class PRODUCT, class Element, class Operands, class Arguments>
void start(const Queue& queue, const char* name, void (*kernel)(typename PRODUCT::Params), const FfnShape& shape,
           const void* a, const void* b, typename PRODUCT::StrideB b_stride, const Operands& operands,
           const Arguments& epilogue, const void* source, void* out, const void* second) {
  check(cudaSetDevice(queue.device), name);
  cutlass::KernelHardwareInfo hardware;
  hardware.device_id = queue.device;
  hardware.sm_count = multiprocessors(queue);
  typename PRODUCT::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {shape.rows, shape.inner, shape.depth, 1},
      {static_cast<const Element*>(a), row_major(shape.depth), static_cast<const Element*>(b), b_stride},
      {epilogue, static_cast<const Element*>(source), row_major(shape.inner), static_cast<Element*>(out),
       row_major(shape.inner)},
      hardware};
  if (!PRODUCT::can_implement(arguments) || PRODUCT::get_workspace_size(arguments) != 0)
    throw std::runtime_error(std::string(name) + ": CUTLASS cannot form this product");
  const typename PRODUCT::Params params = PRODUCT::to_underlying_arguments(arguments, nullptr);
  check_descriptor(params.mainloop.tma_load_a, name);
  check_descriptor(params.mainloop.tma_load_b, name);
  check_descriptor(params.epilogue.tma_store_d, name);
  if (source != nullptr) check_descriptor(params.epilogue.tma_load_c, name);
  if (second != nullptr) check_descriptor(second_store(params.epilogue.thread, operands).tma_store_aux, name);
  launch(queue, name, kernel, PRODUCT::get_grid_shape(params), static_cast<int>(PRODUCT::MaxThreadsPerBlock),
         static_cast<int>(PRODUCT::SharedStorageSize), params);
}

}  // namespace

void ffn_sm90(const Queue& queue, const FfnShape& shape, Format format, const FfnForward& a) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    using E = Element<T>;
    typename ForwardEpilogue<T>::Arguments epilogue{
        {{{}, {static_cast<const E*>(a.b1), E(0), {}}, {}}, {static_cast<E*>(a.pre), row_major(shape.inner)}}, {}};
    start<ForwardProduct<T>, E>(queue, "ffn_fwd_cuda", ffn_fwd_sm90_kernel<T>, shape, a.x, a.w1, row_major(shape.depth),
                                a, epilogue, nullptr, a.act, a.pre);
  };
  if (format == Format::kBFloat16) return run(bf16{});
  run(fp16{});
}

void ffn_sm90(const Queue& queue, const FfnShape& shape, Format format, const FfnBackward& a) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    using E = Element<T>;
    const int64_t sums_stride = ffn_tiles(shape.inner, kFfnColumns) * kFfnColumns;
    typename BackwardEpilogue<T>::Arguments epilogue{
        {{{}, {static_cast<E*>(a.act), row_major(shape.inner)}}, {a.columns, sums_stride}}, {}};
    start<BackwardProduct<T>, E>(queue, "ffn_bwd_cuda", ffn_bwd_sm90_kernel<T>, shape, a.dy, a.w2,
                                 cute::make_stride(_1{}, static_cast<int64_t>(shape.inner), static_cast<int64_t>(0)),
                                 a, epilogue, a.pre, a.dpre, a.act);
  };
  if (format == Format::kBFloat16) return run(bf16{});
  run(fp16{});
}

}  // namespace fastbert::cuda
