// LayerNorm(dropout(x + x_bias) + residual), forward and backward. A row stays in registers between its one read and its
// one write. Short rows (up to 1024 columns) take a warp each, four of them a block, which never wait for each other;
// longer ones take a block each, and those that registers do not hold are read again, from the cache. Eight columns are
// one access; where a row's length or place forbids that, one is.
#include <type_traits>

#include "cuda/launch.h"

namespace fastbert::cuda {
namespace {

constexpr int kRowsPerBlock = 4;  // where a row takes one warp
constexpr int kMaxWarps = 32;     // to a row
constexpr int kSlots = 4 * kMaxWarps;  // floats, through which the warps of a row exchange sums

// Elements of a row in one thread's registers, for N columns to an access.
constexpr int elements(int n) { return n == 8 ? 32 : 4; }
constexpr int max_columns(int n) { return n == 8 ? 8192 : 4096; }  // that registers hold
constexpr int max_threads(int n) { return max_columns(n) / elements(n); }
static_assert(max_threads(1) == kMaxWarps * kWarp);

// N neighbouring elements as they lie in memory, in words that `load` takes.
template <int N, class T>
struct Elements {
  using Word = std::conditional_t<N == 1, T, std::conditional_t<sizeof(T) == 4, float4, uint4>>;
  Word words[N * sizeof(T) / sizeof(Word)];

  __device__ __forceinline__ void to_floats(float (&to)[N]) const { load<N>(reinterpret_cast<const T*>(words), to); }
};

// Which columns a thread has: `N` neighbouring ones, CHUNKS times, `stride` apart.
template <int N, int CHUNKS>
struct Columns {
  static_assert(N * CHUNKS <= elements(N));
  int lane, stride, count;

  __device__ __forceinline__ int operator[](int chunk) const { return (chunk * stride + lane) * N; }
  __device__ __forceinline__ bool has(int chunk) const { return (*this)[chunk] < count; }

  // All of a thread's part of a row, without a branch between the loads, so that all are under way at once. Chunks that
  // the row does not have come from its end, and count for nothing.
  template <class T>
  __device__ __forceinline__ void fetch(const T* row, Elements<N, T> (&to)[CHUNKS]) const {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
      to[i] = *reinterpret_cast<const Elements<N, T>*>(row + (has(i) ? (*this)[i] : count - N));
  }
  template <class T>
  __device__ __forceinline__ void read(const T* row, float (&to)[CHUNKS][N]) const {
    Elements<N, T> elements[CHUNKS];
    fetch(row, elements);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) elements[i].to_floats(to[i]);
  }
  __device__ __forceinline__ void read(const Parameter& from, float (&to)[CHUNKS][N]) const {
    with_format(from, [&](auto data) { read(data, to); });
  }
};

// How a block shares out its rows: `warps` threads' warps to a row.
struct Team {
  int warps;

  __device__ __forceinline__ int64_t first_row() const {
    return warps == 1 ? static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp : blockIdx.x;
  }
  __device__ __forceinline__ int64_t row_step() const {
    return static_cast<int64_t>(gridDim.x) * (warps == 1 ? kRowsPerBlock : 1);
  }
  __device__ __forceinline__ int lane() const { return warps == 1 ? threadIdx.x % kWarp : threadIdx.x; }
  __device__ __forceinline__ int stride() const { return warps * kWarp; }

  // The sum over the row's threads, in each of them. slots: a float for each warp, not in use since the last barrier.
  __device__ __forceinline__ float sum(float value, float* slots) const {
    value = warp_sum(value);
    if (warps == 1) return value;
    if (threadIdx.x % kWarp == 0) slots[threadIdx.x / kWarp] = value;
    __syncthreads();
    float total = slots[0];
    for (int w = 1; w < warps; ++w) total += slots[w];
    return total;
  }
};

template <class X, class R, class Y>
struct Forward {
  int64_t rows;
  int columns, warps;
  float eps;
  Dropout dropout;
  const X* x;         // [rows, columns]
  const R* residual;  // [rows, columns] or null
  Parameter x_bias, weight, bias;
  Y *y, *z;           // [rows, columns], z may be null
  float *mean, *rstd;  // [rows] or null
};

template <class X, class R, class Y, int N, int CHUNKS>
__global__ void __launch_bounds__(max_threads(N), 1) layernorm_fwd_kernel(Forward<X, R, Y> a) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  const Team team{a.warps};
  const int64_t row = team.first_row();
  if (row >= a.rows) return;  // a whole warp, of a block whose warps do not wait for each other
  Columns<N, CHUNKS> columns{team.lane(), team.stride(), a.columns};
  const int64_t place = row * a.columns;

  const DropoutMask dropout(a.dropout);
  Elements<N, X> x[CHUNKS];
  Elements<N, R> residual[CHUNKS];
  columns.fetch(a.x + place, x);
  if (a.residual != nullptr) columns.fetch(a.residual + place, residual);
  float values[CHUNKS][N] = {};
  if (a.x_bias.data != nullptr) columns.read(a.x_bias, values);
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    float add[N];
    x[i].to_floats(add);
#pragma unroll
    for (int j = 0; j < N; ++j) values[i][j] += add[j];
  }
  if (dropout.active) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
      if (columns.has(i)) dropout.apply_row<N>(values[i], static_cast<uint32_t>(row), columns[i]);
  }
  if (a.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      float add[N];
      residual[i].to_floats(add);
#pragma unroll
      for (int j = 0; j < N; ++j) values[i][j] += add[j];
    }
  }

  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (!columns.has(i)) continue;
    if (a.z != nullptr) store<N>(a.z + place + columns[i], values[i]);
    // The statistics are those of the sum as the backward will find it: in a row that is constant but for rounding,
    // other ones would be far off.
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[i][j] = to_float(from_float<Y>(values[i][j]));
      total += values[i][j];
    }
  }
  float mean = team.sum(total, slots) / static_cast<float>(a.columns);
  // A mean that is rounded would make a constant row steep. So few 16-bit numbers have one that is exact enough.
  if constexpr (std::is_same_v<Y, float>) {
    float rest = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (!columns.has(i)) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) rest += values[i][j] - mean;
    }
    mean += team.sum(rest, slots + 2 * kMaxWarps) / static_cast<float>(a.columns);
  }
  float squares = 0.0f;  // of the centred values, so that nothing cancels
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (!columns.has(i)) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) squares += (values[i][j] - mean) * (values[i][j] - mean);
  }
  const float rstd = 1.0f / sqrtf(team.sum(squares, slots + kMaxWarps) / static_cast<float>(a.columns) + a.eps);
  if (a.mean != nullptr && columns.lane == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  recompute(columns.lane);  // or parameters are read early, and take registers
  float parameter[CHUNKS][N];
  columns.read(a.weight, parameter);
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) values[i][j] = (values[i][j] - mean) * rstd * parameter[i][j];
  columns.read(a.bias, parameter);
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (!columns.has(i)) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) parameter[i][j] += values[i][j];
    store<N>(a.y + place + columns[i], parameter[i]);
  }
}

template <class T>
struct Backward {
  int64_t rows;
  int columns, warps;
  Dropout dropout;
  const T *dy, *z;          // [rows, columns]
  Parameter weight;         // [columns]
  const float *mean, *rstd;  // [rows]
  T *dz, *dx;               // [rows, columns], dx null without dropout
  float* sums;              // [blocks, 3, columns]: of dy xhat, dy and dx
};

// Threads of the backward that a multiprocessor holds: they keep to its 65536 registers, as if they were one block.
constexpr int resident_threads(int n, int chunks) {
  constexpr int kInEights[] = {768, 512, 384, 256};
  return n == 1 ? 1024 : kInEights[chunks - 1];
}

// A block takes every gridDim-th row, or four of them, and keeps its column sums in registers, the weight in shared
// memory: in its own format it would be a branch to each of its loads.
template <class T, int N, int CHUNKS>
__global__ void __launch_bounds__(resident_threads(N, CHUNKS), 1) layernorm_bwd_kernel(Backward<T> a) {
  const Team team{a.warps};
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float* const weight = team.warps == 1 ? shared : shared + kSlots;
  for (int column = threadIdx.x * N; column < a.columns; column += blockDim.x * N) {
    float values[N];
    with_format(a.weight, [&](auto data) { load<N>(data + column, values); });
    store<N>(weight + column, values);
  }
  __syncthreads();
  Columns<N, CHUNKS> columns{team.lane(), team.stride(), a.columns};
  const DropoutMask dropout(a.dropout);
  float sums[3][CHUNKS][N] = {};
  float* slots = shared;  // two sets: when one is written again, a barrier lies after its last reading
  for (int64_t row = team.first_row(); row < a.rows; row += team.row_step()) {
    const int64_t place = row * a.columns;
    recompute(columns.lane);  // or the addresses of all chunks stay in registers
    const float mean = a.mean[row], rstd = a.rstd[row];
    float gradient[CHUNKS][N], normal[CHUNKS][N];
    columns.read(a.dy + place, gradient);
    columns.read(a.z + place, normal);
    float total = 0.0f, total_normal = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (!columns.has(i)) continue;
      float factor[N];
      load<N>(weight + columns[i], factor);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        normal[i][j] = (normal[i][j] - mean) * rstd;
        sums[0][i][j] += gradient[i][j] * normal[i][j];
        sums[1][i][j] += gradient[i][j];
        gradient[i][j] *= factor[j];
        total += gradient[i][j];
        total_normal += gradient[i][j] * normal[i][j];
      }
    }
    // One barrier for both: each warp's slot of the second sum is written before the barrier of the first.
    total_normal = warp_sum(total_normal);
    if (team.warps > 1 && threadIdx.x % kWarp == 0) slots[kMaxWarps + threadIdx.x / kWarp] = total_normal;
    const float average = team.sum(total, slots) / static_cast<float>(a.columns);
    if (team.warps > 1) {
      total_normal = slots[kMaxWarps];
      for (int w = 1; w < team.warps; ++w) total_normal += slots[kMaxWarps + w];
    }
    const float average_normal = total_normal / static_cast<float>(a.columns);
    slots = slots == shared ? shared + 2 * kMaxWarps : shared;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      if (!columns.has(i)) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) gradient[i][j] = (gradient[i][j] - average - normal[i][j] * average_normal) * rstd;
      store<N>(a.dz + place + columns[i], gradient[i]);
      if (dropout.active) {
        dropout.apply_row<N>(gradient[i], static_cast<uint32_t>(row), columns[i]);
        store<N>(a.dx + place + columns[i], gradient[i]);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) sums[2][i][j] += gradient[i][j];
    }
  }
  float* out = a.sums + static_cast<int64_t>(blockIdx.x) * 3 * a.columns;
  if (team.warps > 1) {
#pragma unroll
    for (int s = 0; s < 3; ++s)
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i)
        if (columns.has(i)) store<N>(out + s * a.columns + columns[i], sums[s][i]);
    return;
  }
  // The warps of the block one after another, in their order; a column always belongs to the same lane.
  __syncthreads();  // the weight is not read any more
  for (int w = 0; w < kRowsPerBlock; ++w) {
    if (static_cast<int>(threadIdx.x) / kWarp == w) {
#pragma unroll
      for (int s = 0; s < 3; ++s) {
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
          if (!columns.has(i)) continue;
          if (w > 0) {
            float before[N];
            load<N>(shared + s * a.columns + columns[i], before);
#pragma unroll
            for (int j = 0; j < N; ++j) sums[s][i][j] += before[j];
          }
          store<N>((w + 1 < kRowsPerBlock ? shared : out) + s * a.columns + columns[i], sums[s][i]);
        }
      }
    }
    __syncthreads();
  }
}

constexpr int kLongThreads = 512;  // to a row that registers do not hold

// The sum of term(column's value) over a row: each thread takes every kLongThreads-th access of N columns.
template <int N, class T, class F>
__device__ __forceinline__ float sum_long_row(const T* row, int columns, float* slots, const F& term) {
  float total = 0.0f;
  for (int column = threadIdx.x * N; column < columns; column += kLongThreads * N) {
    float values[N];
    load<N>(row + column, values);
#pragma unroll
    for (int j = 0; j < N; ++j) total += term(values[j]);
  }
  return Team{kLongThreads / kWarp}.sum(total, slots);
}

// The sum before the norm is kept in z, or where that is not wanted in y; each thread reads what it has written itself.
template <class X, class R, class Y, int N>
__global__ void __launch_bounds__(kLongThreads, 1) layernorm_fwd_long_kernel(Forward<X, R, Y> a) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  const int64_t row = blockIdx.x, place = row * a.columns;
  Y* const kept = (a.z != nullptr ? a.z : a.y) + place;
  const DropoutMask dropout(a.dropout);
  for (int column = threadIdx.x * N; column < a.columns; column += kLongThreads * N) {
    float values[N] = {}, add[N];
    if (a.x_bias.data != nullptr) with_format(a.x_bias, [&](auto data) { load<N>(data + column, values); });
    load<N>(a.x + place + column, add);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] += add[j];
    if (dropout.active) dropout.apply_row<N>(values, static_cast<uint32_t>(row), column);
    if (a.residual != nullptr) {
      load<N>(a.residual + place + column, add);
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] += add[j];
    }
    store<N>(kept + column, values);
  }
  const float count = static_cast<float>(a.columns);
  float mean = sum_long_row<N>(kept, a.columns, slots, [](float v) { return v; }) / count;
  mean += sum_long_row<N>(kept, a.columns, slots + 2 * kMaxWarps, [=](float v) { return v - mean; }) / count;
  const auto square = [=](float v) { return (v - mean) * (v - mean); };
  const float rstd = 1.0f / sqrtf(sum_long_row<N>(kept, a.columns, slots + kMaxWarps, square) / count + a.eps);
  if (a.mean != nullptr && threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
  for (int column = threadIdx.x * N; column < a.columns; column += kLongThreads * N) {
    float values[N], weight[N], bias[N];
    load<N>(kept + column, values);
    with_format(a.weight, [&](auto data) { load<N>(data + column, weight); });
    with_format(a.bias, [&](auto data) { load<N>(data + column, bias); });
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = (values[j] - mean) * rstd * weight[j] + bias[j];
    store<N>(a.y + place + column, values);
  }
}

// dz and dx alone: registers do not hold the column sums either.
template <class T, int N>
__global__ void __launch_bounds__(kLongThreads, 1) layernorm_bwd_long_kernel(Backward<T> a) {
  float* const slots = reinterpret_cast<float*>(shared_memory());
  const Team team{kLongThreads / kWarp};
  const int64_t row = blockIdx.x, place = row * a.columns;
  const DropoutMask dropout(a.dropout);
  const float mean = a.mean[row], rstd = a.rstd[row];
  const auto read = [&](int column, float (&gradient)[N], float (&normal)[N]) {
    float weight[N];
    with_format(a.weight, [&](auto data) { load<N>(data + column, weight); });
    load<N>(a.dy + place + column, gradient);
    load<N>(a.z + place + column, normal);
#pragma unroll
    for (int j = 0; j < N; ++j) gradient[j] *= weight[j], normal[j] = (normal[j] - mean) * rstd;
  };
  float gradient[N], normal[N], total = 0.0f, total_normal = 0.0f;
  for (int column = threadIdx.x * N; column < a.columns; column += kLongThreads * N) {
    read(column, gradient, normal);
#pragma unroll
    for (int j = 0; j < N; ++j) total += gradient[j], total_normal += gradient[j] * normal[j];
  }
  const float average = team.sum(total, slots) / static_cast<float>(a.columns);
  const float average_normal = team.sum(total_normal, slots + kMaxWarps) / static_cast<float>(a.columns);
  for (int column = threadIdx.x * N; column < a.columns; column += kLongThreads * N) {
    read(column, gradient, normal);
#pragma unroll
    for (int j = 0; j < N; ++j) gradient[j] = (gradient[j] - average - normal[j] * average_normal) * rstd;
    store<N>(a.dz + place + column, gradient);
    if (!dropout.active) continue;
    dropout.apply_row<N>(gradient, static_cast<uint32_t>(row), column);
    store<N>(a.dx + place + column, gradient);
  }
}

// Their column sums, after them: a thread takes a column of every gridDim.y-th row.
template <class T>
__global__ void __launch_bounds__(kLongThreads) layernorm_bwd_long_sums_kernel(Backward<T> a) {
  const int column = static_cast<int>(blockIdx.x) * kLongThreads + static_cast<int>(threadIdx.x);
  if (column >= a.columns) return;
  const T* const dx = a.dx != nullptr ? a.dx : a.dz;
  float sums[3] = {};
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t place = row * a.columns + column;
    const float gradient = to_float(a.dy[place]);
    sums[0] += gradient * ((to_float(a.z[place]) - a.mean[row]) * a.rstd[row]);
    sums[1] += gradient;
    sums[2] += to_float(dx[place]);
  }
  float* const out = a.sums + static_cast<int64_t>(blockIdx.y) * 3 * a.columns + column;
#pragma unroll
  for (int s = 0; s < 3; ++s) out[static_cast<int64_t>(s) * a.columns] = sums[s];
}

constexpr int kParts = 8;

// Adds up the sets of column sums: a warp takes 32 columns of every eighth set.
__global__ void __launch_bounds__(kParts* kWarp)
    layernorm_sums_kernel(int sets, int columns, int count, const float* sums, Format format, void* dweight, void* dbias,
                          float* dx_bias) {
  const int column = static_cast<int>(blockIdx.x) * kWarp + static_cast<int>(threadIdx.x) % kWarp;  // of `count`
  const int part = static_cast<int>(threadIdx.x) / kWarp;
  float total = 0.0f;
  if (column < count)
    for (int set = part; set < sets; set += kParts) total += sums[static_cast<int64_t>(set) * 3 * columns + column];
  total = sum_parts(total, kWarp);
  if (part > 0 || column >= count) return;
  const int which = column / columns, at = column % columns;
  if (which == 2) {
    dx_bias[at] = total;
  } else {
    void* out = which == 0 ? dweight : dbias;
    if (format == Format::kFloat32) static_cast<float*>(out)[at] = total;
    if (format == Format::kBFloat16) static_cast<bf16*>(out)[at] = from_float<bf16>(total);
    if (format == Format::kFloat16) static_cast<fp16*>(out)[at] = from_float<fp16>(total);
  }
}

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Whether rows can be read eight columns at a time.
template <class... Pointers>
bool in_eights(int columns, Pointers... pointers) {
  return columns % 8 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

bool is_long(bool eights, int columns) { return columns > max_columns(eights ? 8 : 1); }
int warps_for(bool eights, int columns) { return ceil_div(columns, kWarp * elements(eights ? 8 : 1)); }
int threads_for(int warps) { return (warps == 1 ? kRowsPerBlock : warps) * kWarp; }

template <int N>
using Size = std::integral_constant<int, N>;

// Calls run(N, CHUNKS), as types, for the kernel that fits.
template <class F>
void with_chunks(bool eights, int columns, const F& run) {
  if (!eights) return run(Size<1>{}, Size<elements(1)>{});
  switch (ceil_div(columns, 8 * kWarp * warps_for(true, columns))) {
    case 1: return run(Size<8>{}, Size<1>{});
    case 2: return run(Size<8>{}, Size<2>{});
    case 3: return run(Size<8>{}, Size<3>{});
    default: return run(Size<8>{}, Size<4>{});
  }
}

template <class F>
void with_access(bool eights, const F& run) {
  eights ? run(Size<8>{}) : run(Size<1>{});
}

template <class X, class R, class Y>
void forward(const Queue& queue, const LayerNormShape& shape, float eps, const void* x, Parameter x_bias,
             const void* residual, Parameter weight, Parameter bias, void* y, void* z, float* mean, float* rstd) {
  const bool eights = in_eights(shape.columns, x, x_bias.data, residual, weight.data, bias.data, y, z);
  const int warps = warps_for(eights, shape.columns);
  const Forward<X, R, Y> a{shape.rows,
                           shape.columns,
                           warps,
                           eps,
                           shape.dropout,
                           static_cast<const X*>(x),
                           static_cast<const R*>(residual),
                           x_bias,
                           weight,
                           bias,
                           static_cast<Y*>(y),
                           static_cast<Y*>(z),
                           mean,
                           rstd};
  if (is_long(eights, shape.columns))
    return with_access(eights, [&](auto n) {
      launch(queue, "layernorm_fwd_cuda", layernorm_fwd_long_kernel<X, R, Y, decltype(n)::value>,
             dim3(static_cast<unsigned>(shape.rows)), kLongThreads, kSlots * 4, a);
    });
  const int64_t blocks = warps == 1 ? (shape.rows + kRowsPerBlock - 1) / kRowsPerBlock : shape.rows;
  with_chunks(eights, shape.columns, [&](auto n, auto chunks) {
    launch(queue, "layernorm_fwd_cuda", layernorm_fwd_kernel<X, R, Y, decltype(n)::value, decltype(chunks)::value>,
           dim3(static_cast<unsigned>(blocks)), threads_for(warps), 3 * kMaxWarps * 4, a);
  });
}

template <class T>
void backward(const Queue& queue, const LayerNormShape& shape, const void* dy, const void* z, Parameter weight,
              const float* mean, const float* rstd, void* dz, void* dx, float* workspace) {
  const bool eights = in_eights(shape.columns, dy, z, weight.data, dz, dx, workspace);
  const int warps = warps_for(eights, shape.columns);
  const Backward<T> a{shape.rows,
                      shape.columns,
                      warps,
                      shape.dropout,
                      static_cast<const T*>(dy),
                      static_cast<const T*>(z),
                      weight,
                      mean,
                      rstd,
                      static_cast<T*>(dz),
                      static_cast<T*>(dx),
                      workspace};
  const unsigned sets = static_cast<unsigned>(layernorm_bwd_sets(queue, shape));
  if (is_long(eights, shape.columns)) {
    with_access(eights, [&](auto n) {
      launch(queue, "layernorm_bwd_cuda", layernorm_bwd_long_kernel<T, decltype(n)::value>,
             dim3(static_cast<unsigned>(shape.rows)), kLongThreads, kSlots * 4, a);
    });
    return launch(queue, "layernorm_bwd_cuda", layernorm_bwd_long_sums_kernel<T>,
                  dim3(static_cast<unsigned>(ceil_div(shape.columns, kLongThreads)), sets), kLongThreads, 0, a);
  }
  const int shared = warps == 1 ? 3 * shape.columns * 4 : (kSlots + shape.columns) * 4;
  with_chunks(eights, shape.columns, [&](auto n, auto chunks) {
    launch(queue, "layernorm_bwd_cuda", layernorm_bwd_kernel<T, decltype(n)::value, decltype(chunks)::value>,
           dim3(sets), threads_for(warps), shared, a);
  });
}

}  // namespace

void layernorm_fwd(const Queue& queue, const LayerNormShape& shape, float eps, Parameter x, Parameter x_bias,
                   Parameter residual, Parameter weight, Parameter bias, void* y, void* z, float* mean, float* rstd) {
  const auto as = [&](auto x_type, auto residual_type, auto y_type) {
    forward<decltype(x_type), decltype(residual_type), decltype(y_type)>(queue, shape, eps, x.data, x_bias, residual.data,
                                                                         weight, bias, y, z, mean, rstd);
  };
  const Format r = residual.data == nullptr ? x.format : residual.format;
  if (x.format == Format::kFloat32) {
    if (r == Format::kFloat32) return as(float{}, float{}, float{});
    if (r == Format::kBFloat16) return as(float{}, bf16{}, float{});
    return as(float{}, fp16{}, float{});
  }
  if (x.format == Format::kBFloat16 && r == Format::kBFloat16) return as(bf16{}, bf16{}, bf16{});
  if (x.format == Format::kBFloat16 && r == Format::kFloat32) return as(bf16{}, float{}, float{});
  if (x.format == Format::kFloat16 && r == Format::kFloat16) return as(fp16{}, fp16{}, fp16{});
  if (x.format == Format::kFloat16 && r == Format::kFloat32) return as(fp16{}, float{}, float{});
  throw std::runtime_error("layernorm_fwd_cuda: x and residual are bfloat16 and float16; one must be float32 or both the same");
}

int layernorm_bwd_sets(const Queue& queue, const LayerNormShape& shape) {
  // As many blocks as run at once where the tensors' places allow eights: a question of the columns alone.
  const bool eights = in_eights(shape.columns);
  const int warps = warps_for(eights, shape.columns);
  int64_t most = multiprocessors(queue);
  if (is_long(eights, shape.columns)) return static_cast<int>(shape.rows < most ? shape.rows : most);
  with_chunks(eights, shape.columns, [&](auto n, auto chunks) {
    most *= resident_threads(decltype(n)::value, decltype(chunks)::value) / threads_for(warps);
  });
  const int64_t needed = warps == 1 ? (shape.rows + kRowsPerBlock - 1) / kRowsPerBlock : shape.rows;
  return static_cast<int>(needed < most ? needed : most);
}

void layernorm_bwd(const Queue& queue, const LayerNormShape& shape, Format format, const void* dy, const void* z,
                   Parameter weight, const float* mean, const float* rstd, void* dz, void* dx, void* dweight,
                   void* dbias, float* dx_bias, float* workspace) {
  switch (format) {
    case Format::kFloat32: backward<float>(queue, shape, dy, z, weight, mean, rstd, dz, dx, workspace); break;
    case Format::kBFloat16: backward<bf16>(queue, shape, dy, z, weight, mean, rstd, dz, dx, workspace); break;
    case Format::kFloat16: backward<fp16>(queue, shape, dy, z, weight, mean, rstd, dz, dx, workspace); break;
  }
  const int count = (dx_bias == nullptr ? 2 : 3) * shape.columns;
  launch(queue, "layernorm_bwd_cuda", layernorm_sums_kernel, dim3(static_cast<unsigned>(ceil_div(count, kWarp))),
         kParts * kWarp, kParts * kWarp * 4, layernorm_bwd_sets(queue, shape), shape.columns, count,
         static_cast<const float*>(workspace), weight.format, dweight, dbias, dx_bias);
}

}  // namespace fastbert::cuda
