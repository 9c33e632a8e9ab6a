// ffn's products by mma.sync and cp.async, for every GPU from compute capability 8.0 on: CUTLASS's GEMM with epilogues of
// our own, which get eight neighbouring columns of a row at a time.
#include "cuda/cutlass/ffn.h"

// In this order: the header of the visitors does not include all that it uses.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cuda/launch.h"

namespace fastbert::cuda {
namespace {

using Tile = cutlass::gemm::GemmShape<kFfnRows, kFfnColumns, 32>;
using WarpTile = cutlass::gemm::GemmShape<64, 64, 32>;
constexpr int kStages = 4, kVector = kFfnVector;

template <class T>
using Element = std::conditional_t<T::is_bf16, cutlass::bfloat16_t, cutlass::half_t>;

// Which elements of a tile a thread gets: always the same eight columns.
template <class T>
using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Tile, WarpTile, Element<T>, kVector, 1>;
constexpr int kThreads = Tile::kM / WarpTile::kM * (Tile::kN / WarpTile::kN) * kWarp, kThreadsToRow = Tile::kN / kVector;
constexpr int kSteps = ThreadMap<bf16>::Count::kRow * ThreadMap<bf16>::Count::kGroup * ThreadMap<bf16>::Count::kCluster;
constexpr int kRowsToStep = Tile::kM * kThreadsToRow / kThreads / kSteps;  // of one thread

template <class T>
using Forward = FfnForwardPart<T>;
template <class T>
using Backward = FfnBackwardPart<T, kThreads, kRowsToStep>;

// What CUTLASS asks of an epilogue, around what WORK does.
template <class T, class WORK>
struct Epilogue {
  struct Arguments {
    typename WORK::Operands operands;
    int inner;
  };
  using Params = Arguments;
  struct SharedStorage {
    alignas(16) typename WORK::Shared work;
  };

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }

  const Params* params;
  SharedStorage* shared;

  Epilogue() = default;
  CUTLASS_HOST_DEVICE Epilogue(const Params& params_, SharedStorage& shared_) : params(&params_), shared(&shared_) {}

  template <class Places>
  struct Callbacks : cutlass::epilogue::threadblock::EmptyCallbacks {
    const Params* params;
    SharedStorage* shared;
    Places places;
    int rows, thread;
    cutlass::gemm::GemmCoord tile;
    WORK work;

    CUTLASS_DEVICE Callbacks(const Params* params_, SharedStorage* shared_, const Places& places_, int rows_,
                             int thread_, cutlass::gemm::GemmCoord tile_)
        : params(params_), shared(shared_), places(places_), rows(rows_), thread(thread_), tile(tile_) {}

    CUTLASS_DEVICE FfnPlace place(int row, int step) const {
      const auto at = places(0, row, step);
      return {static_cast<int>(cute::get<0>(at)), static_cast<int>(cute::get<1>(at)), rows, params->inner};
    }
    CUTLASS_DEVICE void begin_step(int step) {
#pragma unroll
      for (int row = 0; row < kRowsToStep; ++row) work.fetch(params->operands, row, place(row, step));
    }
    CUTLASS_DEVICE void visit(int step, int row, int, int, const cutlass::Array<float, kVector>& product) {
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = product[i];
      work.visit(params->operands, row, place(row, step), values);
    }
    CUTLASS_DEVICE void end_epilogue() { work.end(params->operands, &shared->work, thread, tile.m(), tile.n(), params->inner); }
  };

  template <class Problem>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, const Problem& problem) {
    static_assert(ThreadMap<T>::Iterations::kColumn == 1 && ThreadMap<T>::Iterations::kRow == kRowsToStep &&
                  ThreadMap<T>::Detail::kAccessWidth == kThreadsToRow);
    using cute::_;
    const auto all = ThreadMap<T>::partition(cute::make_identity_tensor(problem), thread, tile);
    const auto places = cute::group_modes<2, 5>(all(cute::_0{}, _, _, _, _, _));  // column, row, step
    return Callbacks<std::decay_t<decltype(places)>>(params, shared, places, cute::get<0>(problem), thread, tile);
  }
};

// [rows, depth] times [depth, inner], of which LAYOUT tells how it lies.
template <class T, class LAYOUT, class WORK>
using Product = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    Element<T>, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kVector, Element<T>, LAYOUT,
    cutlass::ComplexTransform::kNone, kVector, Element<T>, cutlass::layout::RowMajor, kVector, float, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, WarpTile, cutlass::gemm::GemmShape<16, 8, 16>,
    Epilogue<T, WORK>, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
    cutlass::arch::OpMultiplyAdd>::GemmKernel;
template <class T>
using ForwardProduct = Product<T, cutlass::layout::ColumnMajor, Forward<T>>;
template <class T>
using BackwardProduct = Product<T, cutlass::layout::RowMajor, Backward<T>>;

// Kernels of our own around CUTLASS's, for their names.
template <class T>
__global__ void __launch_bounds__(kThreads) ffn_fwd_sm80_kernel(typename ForwardProduct<T>::Params params) {
  ForwardProduct<T>::invoke(params, *reinterpret_cast<typename ForwardProduct<T>::SharedStorage*>(shared_memory()));
}
template <class T>
__global__ void __launch_bounds__(kThreads) ffn_bwd_sm80_kernel(typename BackwardProduct<T>::Params params) {
  BackwardProduct<T>::invoke(params, *reinterpret_cast<typename BackwardProduct<T>::SharedStorage*>(shared_memory()));
}

template <class PRODUCT, class Operands>
void start(const Queue& queue, const char* name, void (*kernel)(typename PRODUCT::Params), const FfnShape& shape,
           const void* a, const void* b, int64_t b_stride, const Operands& operands) {
  static_assert(PRODUCT::kThreadCount == kThreads);
  typename PRODUCT::Arguments arguments;
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_size = {shape.rows, shape.inner, shape.depth};
  arguments.epilogue = {operands, shape.inner};
  arguments.ptr_A = a, arguments.lda = shape.depth;
  arguments.ptr_B = b, arguments.ldb = b_stride;
  arguments.batch_stride_A = arguments.batch_stride_B = 0;
  const typename PRODUCT::Params params(arguments, 0, 0);  // the numbers that only stream-K needs
  const dim3 grid = typename PRODUCT::ThreadblockSwizzle().get_grid_shape(params.grid_tiled_shape);
  launch(queue, name, kernel, grid, kThreads, static_cast<int>(sizeof(typename PRODUCT::SharedStorage)), params);
}

}  // namespace

void ffn_sm80(const Queue& queue, const FfnShape& shape, Format format, const FfnForward& a) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    start<ForwardProduct<T>>(queue, "ffn_fwd_cuda", ffn_fwd_sm80_kernel<T>, shape, a.x, a.w1, shape.depth, a);
  };
  if (format == Format::kBFloat16) return run(bf16{});
  run(fp16{});
}

void ffn_sm80(const Queue& queue, const FfnShape& shape, Format format, const FfnBackward& a) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    start<BackwardProduct<T>>(queue, "ffn_bwd_cuda", ffn_bwd_sm80_kernel<T>, shape, a.dy, a.w2, shape.inner, a);
  };
  if (format == Format::kBFloat16) return run(bf16{});
  run(fp16{});
}

}  // namespace fastbert::cuda
