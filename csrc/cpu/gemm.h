// C = A B for the shapes of an encoder, in fp32 with fp32 or bf16 operands, after Goto & van de Geijn 2008 with one
// departure: B alone is packed as a whole, so that whichever operand is smaller can be the packed one and no packed copy of
// a weight has to be kept (and kept fresh) between calls. A task packs its own rows of A, or reads them where they lie.
//
//   B    panels of NR = 2 VLEN columns, each [K][NR], the last one [K][VLEN] if that is enough
//   A    strips of MR rows, each [K][MR], broadcast element by element into MR x 2 accumulators
//   task rows_per_task rows by a range of panels; its result lies in L1/L2 until the epilogue takes it
//
// An epilogue is called as epilogue(tile, ld, i, rows, j, cols): the finished block C[i : i+rows, j : j+cols] is
// tile[r * ld + c]; the tile may be overwritten, and has ld >= cols rounded up to VLEN readable columns. Before that,
// epilogue.expect(i, rows, j, cols, fetch) names the lines of memory that it will read or write: the product fetches them
// into L2 while it runs, a few at a time, or the epilogue would wait for memory most of its time.
#pragma once
#include "parallel.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int MR = FASTBERT_VREGS == 32 ? 14 : 6;
constexpr int NR = 2 * VLEN;
constexpr int64_t KC = 4096 / NR;      // a KC x NR piece of a panel, 16 KiB, stays in L1 while the strips of a task pass
constexpr int64_t kTaskRows = (FASTBERT_VREGS == 32 ? 8 : 16) * MR;  // and kTaskRows x K of A in L2
constexpr int64_t kTaskBytes = (FASTBERT_VREGS == 32 ? 384 : 256) << 10;
constexpr int64_t kDotChain = 128;     // products added up before they join the others
constexpr int kMaxStack = 4;
constexpr int64_t kLine = 16;          // floats in a line of cache
constexpr int64_t kTurn = 2;           // elements of depth that a turn of the inmost loop takes
constexpr int64_t kPageFloats = 1024;  // lines of A this far apart share one set of L1, which is too small for a strip
constexpr int64_t kFewPanels = 6;      // that many do not pay for packing A

// (row in strip, row whose pointer is kept, rows from it): few pointers, the rest is address arithmetic.
#define FASTBERT_STRIP(X) \
  X(0, 0, 0) X(1, 0, 1) X(2, 0, 2) X(3, 3, 0) X(4, 3, 1) X(5, 3, 2) X(6, 6, 0) X(7, 6, 1) X(8, 6, 2) X(9, 9, 0) X(10, 9, 1) X(11, 9, 2) \
  X(12, 12, 0) X(13, 12, 1)

// Lines of memory to be fetched into L2 in the course of a product, in equal shares.
class Fetch {
 public:
  // `each` addresses for every kLine elements of depth.
  struct Share {
    const void* const* address = nullptr;
    int64_t each = 0;
  };

  // out [rows, cols] at ld elements a row.
  template <class T>
  void rows(const T* out, int64_t ld, int64_t rows, int64_t cols) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols && count_ < kMost; c += 64 / static_cast<int64_t>(sizeof(T)))
        address_[count_++] = out + r * ld + c;
  }
  // steps: how often kLine elements of depth will pass.
  void start(int64_t steps) {
    each_ = ceil_div(count_, larger(steps, 1));
    for (; each_ > 0 && count_ < steps * each_; ++count_) address_[count_] = address_[count_ - 1];
  }
  Share next(int64_t depth) {
    const Share share{address_ + next_, each_};
    next_ += ceil_div(depth, kLine) * each_;
    return share;
  }

 private:
  static constexpr int64_t kMost = 6 * kTaskRows, kMostSteps = ceil_div(kTaskRows, MR) * ceil_div(KC, kLine);
  const void* address_[kMost + kMostSteps];
  int64_t count_ = 0, next_ = 0, each_ = 0;
};

// GCC may not take the steps before and after this apart and mix them, which both read a and b: accumulators leave too
// few registers for that.
FASTBERT_INLINE void separate(const float*& a, const float*& b) { asm volatile("" : "+r"(a), "+r"(b)); }

// c [R][ldc] (+)= A [R][depth] b [depth][V * VLEN]. A(i, k) is a[i * stride + k], or a[k * stride + i] if Columns.
// Lines from `ahead` on are fetched, ahead_step floats apart (0: none): one every kTurn elements of depth if Columns,
// else about as many as the strip has. The accumulators are named one by one: GCC 12 keeps an array of them in memory.
// Every kDotChain products they are added to c: in one long chain of additions fp32 would lose more digits than the dot
// products of a BLAS do.
template <int R, int V, bool Columns>
void micro_kernel(int64_t depth, const float* a, int64_t stride, const float* b, const float* ahead, int64_t ahead_step,
                  Fetch::Share fetch, float* c, int64_t ldc, bool add) {
  const float *p0 = a, *p3 = a + 3 * stride, *p6 = a + 6 * stride, *p9 = a + 9 * stride, *p12 = a + 12 * stride;
  if (ahead_step == 0) ahead = b;
  int64_t k0 = 0;
  do {
#define X(i, base, more) vf c##i##_0 = {}, c##i##_1 = {};
    FASTBERT_STRIP(X)
#undef X
    // Element k from where the pointers are.
    const auto step = [&](int64_t k) FASTBERT_INLINED {
      const vf b0 = load(b + k * V * VLEN);
      vf b1 = {};
      if constexpr (V > 1) b1 = load(b + k * V * VLEN + VLEN);
#define X(i, base, more)                                              \
  if constexpr (R > i) {                                              \
    const vf s = splat(Columns ? p0[i] : p##base[more * stride + k]); \
    add_product(c##i##_0, s, b0);                                     \
    if constexpr (V > 1) add_product(c##i##_1, s, b1);                \
  }
      FASTBERT_STRIP(X)
#undef X
    };
    const int64_t chain_end = smaller(depth, k0 + kDotChain);
    for (; k0 < chain_end; k0 += kLine) {
      const int64_t end = smaller(kLine, depth - k0);
      if constexpr (Columns) {
        for (int64_t i = 0; i < fetch.each; ++i) __builtin_prefetch(*fetch.address++, 0, 2);
        const auto advance = [&]() FASTBERT_INLINED {
          p0 += stride, b += V * VLEN;
          separate(p0, b);
        };
        for (int64_t k = 1; k < end; k += kTurn) {
          __builtin_prefetch(ahead, 0, 2);
          ahead += ahead_step;
          step(0);
          advance();
          step(0);
          advance();
        }
        if (end % kTurn != 0) {
          step(0);
          advance();
        }
      } else {
        // A turn is two elements: instructions are decoded hardly faster than the arithmetic goes. Prefetches stand
        // among it, as many at once would fill the buffers for lines on their way. `ahead` comes into L2, and into L1
        // what is next of b and of the strip, whose rows are too many streams for the hardware to follow.
        const auto advance = [&](int64_t k) FASTBERT_INLINED {
          p0 += k, p3 += k, p6 += k, p9 += k, p12 += k, b += k * V * VLEN;
        };
        const float* own = a + k0 + kLine;
        for (int64_t k = 1; k < end; k += kTurn) {
          for (int64_t i = 0; i < 2 * V * VLEN; i += kLine) __builtin_prefetch(b + kLine * V * VLEN + i, 0, 3);
          for (int64_t i = 0; i < kTurn; ++i) {
            if (i == 0 || R > kLine / 2) {
              __builtin_prefetch(own, 0, 3);
              __builtin_prefetch(ahead, 0, 2);
              own += stride, ahead += ahead_step;
            }
            step(i);
            separate(p0, b);
          }
          advance(kTurn);
        }
        if (end % kTurn != 0) {
          step(0);
          advance(1);
        }
      }
    }
#define X(i, base, more)                                                   \
  if constexpr (R > i) {                                                   \
    float* row = c + i * ldc;                                              \
    store(row, add ? load(row) + c##i##_0 : c##i##_0);                     \
    if constexpr (V > 1) store(row + VLEN, add ? load(row + VLEN) + c##i##_1 : c##i##_1); \
  }
    FASTBERT_STRIP(X)
#undef X
    add = true;
  } while (k0 < depth);
}

using MicroKernel = void (*)(int64_t, const float*, int64_t, const float*, const float*, int64_t, Fetch::Share, float*,
                             int64_t, bool);

template <int V, bool Columns>
FASTBERT_INLINE MicroKernel micro_kernel_for(int64_t rows) {
  static constexpr MicroKernel table[] = {
      micro_kernel<1, V, Columns>, micro_kernel<2, V, Columns>, micro_kernel<3, V, Columns>,
      micro_kernel<4, V, Columns>, micro_kernel<5, V, Columns>, micro_kernel<6, V, Columns>,
#if FASTBERT_VREGS == 32
      micro_kernel<7, V, Columns>, micro_kernel<8, V, Columns>, micro_kernel<9, V, Columns>,
      micro_kernel<10, V, Columns>, micro_kernel<11, V, Columns>, micro_kernel<12, V, Columns>,
      micro_kernel<13, V, Columns>, micro_kernel<14, V, Columns>,
#endif
  };
  return table[rows - 1];
}

// Rows of A for `multiply_panel`: strip number s begins at data + s * strip; stride as in micro_kernel. is_new: they have
// not been read yet, and each strip fetches what lies behind it in memory, which is the next one if the lines are whole.
struct Lines {
  const float* data;
  int64_t stride, strip;
  bool is_new = false;
};

// c [rows][width] (+)= A [rows][depth] panel [depth][width], width VLEN or NR. ahead: the piece of B that comes next, where
// A's columns lie packed and that piece is not in the cache anyway.
template <bool Columns>
FASTBERT_INLINE void multiply_panel(int64_t rows, int64_t depth, const Lines& a, const float* panel, const float* ahead,
                                    int64_t width, float* c, int64_t ldc, bool add, Fetch* fetch = nullptr) {
  const int64_t ahead_step = ahead == nullptr ? 0 : kTurn * width / ceil_div(rows, MR);
  for (int64_t r = 0, s = 0; r < rows; r += MR, ++s) {
    const int64_t strip = smaller(rows - r, MR);
    const MicroKernel kernel =
        width > VLEN ? micro_kernel_for<2, Columns>(strip) : micro_kernel_for<1, Columns>(strip);
    const float* lines = a.data + s * a.strip;
    if constexpr (Columns) {
      kernel(depth, lines, a.stride, panel, ahead + s * ahead_step * (depth / kTurn), ahead_step,
             fetch == nullptr ? Fetch::Share{} : fetch->next(depth), c + r * ldc, ldc, add);
    } else {
      kernel(depth, lines, a.stride, panel, lines + MR * a.stride, a.is_new ? kLine : 0, {}, c + r * ldc, ldc, add);
    }
  }
}

// Whether x [m, k] rather than weights [n, k] is packed for their product: the smaller one, as what is packed passes
// through the caches once per task, while what is read in place comes from memory once. A few rows always.
FASTBERT_INLINE bool packs_x(int64_t m, int64_t n) { return m <= n || m <= 4 * NR; }

// Rows of a block often lie a page and more apart, where no hardware prefetcher follows. So who goes through one asks for a
// row's lines this many rows before it reads them. They come into L2: in L1, rows a page apart would drive each other out.
constexpr int64_t kRowsAhead = 8;

template <class T>
FASTBERT_INLINE void prefetch_columns(const T* row, int64_t cols) {
  for (int64_t c = 0; c < cols; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c, 0, 2);
}

// ---- packing ---------------------------------------------------------------------------------------------------

// Which elements of two vectors side by side a step of `transpose` takes, by the step's width 1, 2, 4, ...; in memory,
// as GCC 12 would build them from single elements each time.
struct TransposeSteps {
  alignas(64) int32_t low[4][VLEN], high[4][VLEN];

  constexpr TransposeSteps() : low(), high() {
    for (int step = 0; step < 4; ++step)
      for (int j = 0, s = 1 << step; j < VLEN; ++j) {
        low[step][j] = (j & s) ? VLEN + j - s : j;
        high[step][j] = (j & s) ? VLEN + j : j + s;
      }
  }
};
inline constexpr TransposeSteps kTransposeSteps{};

// rows[i] holds VLEN elements of line i; afterwards of column i.
FASTBERT_INLINE void transpose(vf (&rows)[VLEN]) {
#pragma GCC unroll 4
  for (int step = 3; step >= 0; --step) {
    const int s = 1 << step;
    if (s >= VLEN) continue;
    vi low, high;
    std::memcpy(&low, kTransposeSteps.low[step], sizeof(vi));
    std::memcpy(&high, kTransposeSteps.high[step], sizeof(vi));
#pragma GCC unroll 16
    for (int i = 0; i < VLEN; ++i) {
      if (i & s) continue;
      const vf a = rows[i], b = rows[i + s];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + s] = __builtin_shuffle(a, b, high);
    }
  }
}

FASTBERT_INLINE int64_t panel_width(int64_t cols) { return cols > VLEN ? NR : VLEN; }
FASTBERT_INLINE int64_t panel_count(int64_t n) { return ceil_div(n, NR); }

// One panel of up to NR columns: out [depth][panel_width(cols)] with out[k][c] = src[k * row_stride + c * col_stride].
template <class T>
void pack_panel(const T* src, int64_t row_stride, int64_t col_stride, int64_t depth, int64_t cols, float* out) {
  const int64_t width = panel_width(cols);
  if (col_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      prefetch_columns(src + (k + kRowsAhead) * row_stride, cols);
      for (int64_t c = 0; c < width; c += VLEN)
        store(out + k * width + c, c < cols ? load_n(src + k * row_stride + c, cols - c) : vf{});
    }
    return;
  }
  for (int64_t c0 = 0; c0 < width; c0 += VLEN) {
    const int64_t lines = smaller(larger(cols - c0, 0), VLEN);
    for (int64_t k = 0; k < depth; k += VLEN) {
      const int64_t n = smaller(depth - k, VLEN);
      vf block[VLEN];
#pragma GCC unroll 16
      for (int i = 0; i < VLEN; ++i) {
        const T* line = src + (c0 + i) * col_stride + k * row_stride;
        __builtin_prefetch(line + VLEN * col_stride, 0, 2);
        block[i] = i < lines ? load_n(line, n) : vf{};
      }
      transpose(block);
      float* o = out + k * width + c0;
      if (n == VLEN) {
#pragma GCC unroll 16
        for (int i = 0; i < VLEN; ++i) store(o + i * width, block[i]);
      } else {
        float rest[VLEN][VLEN];
        for (int i = 0; i < VLEN; ++i) store(rest[i], block[i]);
        for (int64_t i = 0; i < n; ++i) store(o + i * width, load(rest[i]));
      }
    }
  }
}

FASTBERT_INLINE void pack_panel(const Matrix& m, int64_t depth, int64_t j, int64_t cols, float* out) {
  if (m.dtype == DType::kFloat32) {
    pack_panel(static_cast<const float*>(m.data) + j * m.col_stride, m.row_stride, m.col_stride, depth, cols, out);
  } else {
    pack_panel(static_cast<const bf16*>(m.data) + j * m.col_stride, m.row_stride, m.col_stride, depth, cols, out);
  }
}

// Matrices that share strides and stand one after another along their rows (A) or columns (B).
struct Stack {
  int count;
  Matrix part[kMaxStack];
  int64_t extent[kMaxStack];
};

FASTBERT_INLINE Stack single(const Matrix& m, int64_t extent) { return {1, {m}, {extent}}; }

// B packed: the panels of each part in turn, panel p of all at data + p * K * NR.
struct PackedB {
  const float* data;
  int64_t depth;
  int count;
  int64_t first_panel[kMaxStack + 1], first_col[kMaxStack], extent[kMaxStack];

  int64_t panels() const { return first_panel[count]; }
  void locate(int64_t panel, int64_t* col, int64_t* cols) const {
    int i = 0;
    while (panel >= first_panel[i + 1]) ++i;
    const int64_t inner = (panel - first_panel[i]) * NR;
    *col = first_col[i] + inner;
    *cols = smaller(extent[i] - inner, NR);
  }
};

// Packs b, whose parts stand side by side (their columns make N), each of `depth` rows.
inline PackedB pack(const Executor& executor, const Stack& b, int64_t depth, ScratchSlot slot) {
  PackedB packed;
  packed.depth = depth;
  packed.count = b.count;
  packed.first_panel[0] = 0;
  int64_t col = 0;
  for (int i = 0; i < b.count; ++i) {
    packed.first_panel[i + 1] = packed.first_panel[i] + panel_count(b.extent[i]);
    packed.first_col[i] = col;
    packed.extent[i] = b.extent[i];
    col += b.extent[i];
  }
  float* out = static_cast<float*>(scratch(slot, packed.panels() * depth * NR * 4));
  packed.data = out;
  // Packing a few columns of x for a latency call is cheaper than waking the other threads.
  const int64_t grain = larger(1, ceil_div(int64_t{32} << 10, larger(depth, 1) * NR));
  parallel_tasks(executor, ceil_div(packed.panels(), grain), [&](int64_t task, int) {
    for (int64_t p = task * grain; p < smaller((task + 1) * grain, packed.panels()); ++p) {
      int i = 0;
      while (p >= packed.first_panel[i + 1]) ++i;
      const int64_t j = (p - packed.first_panel[i]) * NR;
      pack_panel(b.part[i], depth, j, smaller(b.extent[i] - j, NR), out + p * depth * NR);
    }
  });
  return packed;
}

// Packs b, whose parts stand one below another (their rows make K), each of n columns.
inline PackedB pack_rows(const Executor& executor, const Stack& b, int64_t n, ScratchSlot slot) {
  int64_t depth = 0;
  for (int i = 0; i < b.count; ++i) depth += b.extent[i];
  PackedB packed{nullptr, depth, 1, {0, panel_count(n)}, {0}, {n}};
  float* out = static_cast<float*>(scratch(slot, packed.panels() * depth * NR * 4));
  packed.data = out;
  parallel_tasks(executor, packed.panels(), [&](int64_t p, int) {
    float* panel = out + p * depth * NR;
    const int64_t cols = smaller(n - p * NR, NR);
    for (int i = 0; i < b.count; ++i) {
      pack_panel(b.part[i], b.extent[i], p * NR, cols, panel);
      panel += b.extent[i] * panel_width(cols);
    }
  });
  return packed;
}

// ---- one task: rows of A against a range of panels ---------------------------------------------------------------

// Strips of `depth` elements: what is stored a vector at a time may reach VLEN floats beyond the end.
constexpr int64_t strip_floats(int64_t depth) { return MR * depth + VLEN; }

// `rows` rows of A, elements k .. k + depth of each, as strips [depth][MR] in fp32.
template <class T>
void pack_strips(const Matrix& m, bool columns, int64_t rows, int64_t k, int64_t depth, float* out) {
  const int64_t strip = strip_floats(depth);
  const T* src = static_cast<const T*>(m.data) + k * m.col_stride;
  const auto store_group = [](float* o, vf v, int64_t g) FASTBERT_INLINED {
    if (MR <= VLEN || g + VLEN <= MR) {
      store(o + g, v);
    } else {
      store_n(o + g, v, MR - g);
    }
  };
  if (columns) {
    for (int64_t i = 0; i < depth; ++i) {
      const T* line = src + i * m.col_stride;
      prefetch_columns(line + kRowsAhead * m.col_stride, rows);
      float* o = out + i * MR;
      for (int64_t r = 0; r < rows; r += MR, o += strip)
        for (int64_t g = 0; g < smaller(MR, rows - r); g += VLEN) store_group(o, load_n(line + r + g, rows - r - g), g);
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += MR, out += strip)
    for (int64_t i = 0; i < depth; i += VLEN) {
      const int64_t n = smaller(depth - i, VLEN);
      for (int64_t g = 0; g < smaller(MR, rows - r); g += VLEN) {
        const int64_t lines = smaller(smaller(MR, rows - r) - g, VLEN);
        const T* block_src = src + (r + g) * m.row_stride + i;
        vf block[VLEN];
#pragma GCC unroll 16
        for (int j = 0; j < VLEN; ++j) {
          if (j < MR) __builtin_prefetch(block_src + (j + MR) * m.row_stride, 0, 2);
          block[j] = j < lines ? load_n(block_src + j * m.row_stride, n) : vf{};
        }
        transpose(block);
        for (int64_t j = 0; j < n; ++j) store_group(out + (i + j) * MR, block[j], g);
      }
    }
}

// The sum of `depth` rows of n <= VLEN columns, by halves, so that no digits are lost in a long chain of additions.
template <class T>
vf sum_rows(const T* rows, int64_t depth, int64_t stride, int64_t n) {
  if (depth > 8) {
    const int64_t half = depth / 2;
    return sum_rows(rows, half, stride, n) + sum_rows(rows + half * stride, depth - half, stride, n);
  }
  vf total = {};
  for (int64_t i = 0; i < depth; ++i) total += load_n(rows + i * stride, n);
  return total;
}

// The matrix from row `first` on.
FASTBERT_INLINE Matrix from_row(const Matrix& m, int64_t first) {
  const int64_t size = m.dtype == DType::kFloat32 ? sizeof(float) : sizeof(bf16);
  return {static_cast<const char*>(m.data) + first * m.row_stride * size, m.row_stride, m.col_stride, m.dtype};
}

// multiply_task where few panels do not pay for packing A, which comes from memory in a latency call: strip by strip, each in
// its whole length, so that memory is read in one stream, and fetched ahead by a strip. What the epilogue touches is not
// fetched, as so few columns of results are in the cache.
template <class Epilogue>
void multiply_in_place(const Matrix& a, int64_t first, int64_t rows, const PackedB& b, int64_t panel_begin,
                       int64_t panel_end, const Epilogue& epilogue) {
  const int64_t panels = panel_end - panel_begin;
  float* tiles = static_cast<float*>(scratch(kScratchTile, panels * rows * NR * 4));
  const auto each_panel = [&](auto&& visit) FASTBERT_INLINED {
    for (int64_t p = 0; p < panels; ++p) {
      int64_t col, cols;
      b.locate(panel_begin + p, &col, &cols);
      visit(b.data + (panel_begin + p) * b.depth * NR, tiles + p * rows * NR, col, cols);
    }
  };
  for (int64_t r = 0; r < rows; r += MR) {
    Lines strip{static_cast<const float*>(a.data) + r * a.row_stride, a.row_stride, 0, true};
    each_panel([&](const float* panel, float* tile, int64_t, int64_t cols) FASTBERT_INLINED {
      multiply_panel<false>(smaller(rows - r, MR), b.depth, strip, panel, nullptr, panel_width(cols), tile + r * NR, NR,
                            false);
      strip.is_new = false;
    });
  }
  each_panel([&](const float*, float* tile, int64_t col, int64_t cols) FASTBERT_INLINED {
    epilogue(tile, NR, first, rows, col, cols);
  });
}

// Rows first .. first + rows of C; a: those of A. sums (null, or [rows]) receives the sum of each row of A.
template <class Epilogue>
void multiply_task(const Matrix& a, int64_t first, int64_t rows, const PackedB& b, int64_t panel_begin,
                   int64_t panel_end, float* sums, const Epilogue& epilogue) {
  const int64_t depth = b.depth, panels = panel_end - panel_begin, strips = ceil_div(rows, MR);
  const bool columns = a.col_stride != 1;
  if (!columns && sums == nullptr && a.dtype == DType::kFloat32 && panels <= kFewPanels &&
      (a.row_stride % kPageFloats != 0 || rows == 1)) {
    multiply_in_place(a, first, rows, b, panel_begin, panel_end, epilogue);
    return;
  }
  // Either all of A stays in L2 while every panel passes (one tile at a time), or, where it is too long, the results of
  // many panels do while A passes once.
  const bool stay = rows * depth * 4 <= kTaskBytes;
  const int64_t tile_panels = stay ? 1 : larger(1, smaller(panels, 2 * kTaskBytes / (rows * NR * 4)));
  float* tiles = static_cast<float*>(scratch(kScratchTile, tile_panels * rows * NR * 4));
  const int64_t held = stay ? ceil_div(depth, KC) : 1, held_floats = strips * strip_floats(KC);
  float* packed = static_cast<float*>(scratch(kScratchPackA, held * held_floats * 4));
  if (sums != nullptr)
    for (int64_t r = 0; r < rows; ++r) sums[r] = 0.0f;
  for (int64_t p0 = panel_begin; p0 < panel_end; p0 += tile_panels) {
    const int64_t p1 = smaller(p0 + tile_panels, panel_end);
    for (int64_t k = 0; k < depth || k == 0; k += KC) {
      const int64_t kc = smaller(depth - k, KC);
      float* strip = packed + (stay ? k / KC * held_floats : 0);
      if (!stay || p0 == panel_begin) {
        if (a.dtype == DType::kFloat32) {
          pack_strips<float>(a, columns, rows, k, kc, strip);
        } else {
          pack_strips<bf16>(a, columns, rows, k, kc, strip);
        }
      }
      const Lines lines{strip, MR, strip_floats(kc)};
      if (sums != nullptr && p0 == panel_begin)
        for (int64_t r = 0; r < rows; r += MR)
          for (int64_t g = 0; g < smaller(MR, rows - r); g += VLEN) {
            const int64_t n = smaller(smaller(MR, rows - r) - g, VLEN);
            // Whole vectors, as strips have room for them; what stands beyond the n rows is not stored.
            const vf more = sum_rows(lines.data + r / MR * lines.strip + g, kc, MR, VLEN);
            store_n(sums + r + g, load_n(sums + r + g, n) + more, n);
          }
      for (int64_t p = p0; p < p1; ++p) {
        int64_t col, cols;
        b.locate(p, &col, &cols);
        const int64_t width = panel_width(cols);
        const float* panel = b.data + p * depth * NR + k * width;
        const float* ahead = p + 1 < p1 ? panel + depth * NR : b.data + p0 * depth * NR + (k + kc) * NR;
        float* tile = tiles + (p - p0) * rows * NR;
        Fetch fetch;
        if (k + kc == depth) {
          epilogue.expect(first, rows, col, cols, fetch);
          fetch.start(strips * ceil_div(kc, kLine));
        }
        multiply_panel<true>(rows, kc, lines, panel, ahead, width, tile, NR, k > 0, &fetch);
        if (k + kc == depth) epilogue(tile, NR, first, rows, col, cols);
      }
    }
  }
}

// Rows shared out in whole strips to tasks of about one size, as many for each worker, of at most `most` rows.
struct RowBlocks {
  int64_t rows, strips, count;

  RowBlocks() = default;
  RowBlocks(int64_t n, int workers, int64_t most = kTaskRows)
      : rows(n), strips(ceil_div(n, MR)), count(smaller(strips, ceil_div(ceil_div(n, most), workers) * workers)) {}
  int64_t first(int64_t block) const { return smaller(rows, strips * block / count * MR); }
};

// The whole product, A's parts one below another. sums (null or [rows]) as in multiply_task.
template <class Epilogue>
void gemm(const Executor& executor, const Stack& a, const PackedB& b, float* sums, const Epilogue& epilogue) {
  RowBlocks blocks[kMaxStack];
  int64_t row_blocks = 0;
  for (int i = 0; i < a.count; ++i) {
    blocks[i] = RowBlocks(a.extent[i], executor.workers);
    row_blocks += blocks[i].count;
  }
  // Few rows: share out the columns too.
  if (row_blocks == 0 || b.panels() == 0) return;
  const int64_t groups =
      row_blocks >= 2 * executor.workers ? 1 : smaller(b.panels(), ceil_div(4 * executor.workers, row_blocks));
  const int64_t group_panels = ceil_div(b.panels(), groups);
  parallel_tasks(executor, row_blocks * groups, [&](int64_t task, int) {
    int64_t block = task / groups, above = 0;
    const int64_t group = task % groups;
    int i = 0;
    for (; block >= blocks[i].count; ++i) block -= blocks[i].count, above += a.extent[i];
    const int64_t first = blocks[i].first(block), rows = blocks[i].first(block + 1) - first;
    multiply_task(from_row(a.part[i], first), above + first, rows, b, group * group_panels,
                  smaller((group + 1) * group_panels, b.panels()),
                  sums != nullptr && group == 0 ? sums + above + first : nullptr, epilogue);
  });
}

// ---- epilogues ---------------------------------------------------------------------------------------------------

// out[i][j] = tile + bias[j]; bias null or of the output's type.
template <class T>
struct StoreRows {
  T* out;
  int64_t ld_out;
  const T* bias;

  void expect(int64_t i, int64_t rows, int64_t j, int64_t cols, Fetch& fetch) const {
    fetch.rows(out + i * ld_out + j, ld_out, rows, cols);
  }
  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    for (int64_t c = 0; c < cols; c += VLEN) {
      const vf b = bias != nullptr ? load_n(bias + j + c, cols - c) : vf{};
      T* o = out + i * ld_out + j + c;
      if (cols - c >= VLEN) {
        for (int64_t r = 0; r < rows; ++r) store(o + r * ld_out, load(tile + r * ld + c) + b);
      } else {
        for (int64_t r = 0; r < rows; ++r) store_n(o + r * ld_out, load(tile + r * ld + c) + b, cols - c);
      }
    }
  }
};

// The product was formed as C^T: out[j][i] = tile + bias[i].
template <class T>
struct StoreTransposed {
  T* out;
  int64_t ld_out;
  const T* bias;

  void expect(int64_t i, int64_t rows, int64_t j, int64_t cols, Fetch& fetch) const {
    fetch.rows(out + j * ld_out + i, ld_out, cols, rows);
  }
  void operator()(const float* tile, int64_t ld, int64_t i, int64_t rows, int64_t j, int64_t cols) const {
    for (int64_t r = 0; r < rows; r += VLEN) {
      const int64_t n = smaller(rows - r, VLEN);
      const vf b = bias != nullptr ? load_n(bias + i + r, n) : vf{};
      for (int64_t c = 0; c < cols; c += VLEN) {
        vf block[VLEN];
#pragma GCC unroll 16
        for (int k = 0; k < VLEN; ++k) block[k] = k < n ? load(tile + (r + k) * ld + c) : vf{};
        transpose(block);
        T* o = out + (j + c) * ld_out + i + r;
        if (n == VLEN && cols - c >= VLEN) {
#pragma GCC unroll 16
          for (int k = 0; k < VLEN; ++k) store(o + k * ld_out, block[k] + b);
        } else {
          float rest[VLEN][VLEN];
          for (int k = 0; k < VLEN; ++k) store(rest[k], block[k] + b);
          for (int64_t k = 0; k < smaller(cols - c, VLEN); ++k) store_n(o + k * ld_out, load(rest[k]), n);
        }
      }
    }
  }
};

// dw [n, k] = dy [m, n]^T x, db [n] (or null) = column sums of dy. x [m, k] is packed.
template <class T>
void weight_gradient(const Executor& executor, int64_t n, const Matrix& dy, const PackedB& x, T* dw, T* db) {
  float* sums = db == nullptr ? nullptr : static_cast<float*>(scratch(kScratchSums, n * 4));
  const Stack rows = single({dy.data, dy.col_stride, dy.row_stride, dy.dtype}, n);
  gemm(executor, rows, x, sums, StoreRows<T>{dw, x.extent[0], nullptr});
  for (int64_t i = 0; db != nullptr && i < n; ++i) from_float(sums[i], db + i);
}

template <class T>
void weight_gradient(const Executor& executor, int64_t m, int64_t n, int64_t k, const Matrix& dy, const Matrix& x,
                     T* dw, T* db) {
  weight_gradient(executor, n, dy, pack(executor, single(x, k), m, kScratchPackB), dw, db);
}

// out [n] = the column sums of x [m, n]: the gradient of a bias whose weight needs none.
template <class T, class Out>
void column_sums(const Executor& executor, int64_t m, int64_t n, const T* x, Out* out) {
  parallel_tasks(executor, ceil_div(n, 4 * VLEN), [&](int64_t task, int) {
    for (int64_t c = task * 4 * VLEN; c < smaller(n, (task + 1) * 4 * VLEN); c += VLEN)
      store_n(out + c, sum_rows(x + c, m, n, n - c), n - c);
  });
}

}  // namespace FASTBERT_ISA
}  // namespace fastbert
