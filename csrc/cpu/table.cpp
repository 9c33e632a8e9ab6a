// The table of kernels of this instruction set, and the loop that measures what the machine can do with it.
#include "table.h"

#include <time.h>

#include "vec.h"

#define FASTBERT_TEXT_(x) #x
#define FASTBERT_TEXT(x) FASTBERT_TEXT_(x)
#define FASTBERT_JOIN_(a, b) a##b
#define FASTBERT_JOIN(a, b) FASTBERT_JOIN_(a, b)

namespace fastbert {
namespace FASTBERT_ISA {

static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Floating-point operations a second of independent multiply-adds in registers, nothing else.
double fma_rate(double seconds) {
  constexpr int kRounds = 20000;
  const vf scale = splat(0.999f), shift = splat(0.001f);
  vf a0 = shift, a1 = shift, a2 = shift, a3 = shift, a4 = shift, a5 = shift, a6 = shift, a7 = shift, a8 = shift,
     a9 = shift, a10 = shift, a11 = shift;
  double flops = 0, spent = 0;
  const double start = now();
  do {
    for (int i = 0; i < kRounds; ++i) {
      a0 = a0 * scale + shift, a1 = a1 * scale + shift, a2 = a2 * scale + shift, a3 = a3 * scale + shift;
      a4 = a4 * scale + shift, a5 = a5 * scale + shift, a6 = a6 * scale + shift, a7 = a7 * scale + shift;
      a8 = a8 * scale + shift, a9 = a9 * scale + shift, a10 = a10 * scale + shift, a11 = a11 * scale + shift;
    }
    // Keeps the compiler from proving the accumulators unused, or from merging them: all hold the same values.
    asm volatile("" : "+m"(a0), "+m"(a1), "+m"(a2), "+m"(a3), "+m"(a4), "+m"(a5));
    asm volatile("" : "+m"(a6), "+m"(a7), "+m"(a8), "+m"(a9), "+m"(a10), "+m"(a11));
    flops += 2.0 * 12 * VLEN * kRounds;
    spent = now() - start;
  } while (spent < seconds);
  return flops / spent;
}

}  // namespace FASTBERT_ISA

extern const Kernels FASTBERT_JOIN(kernels_, FASTBERT_ISA);
const Kernels FASTBERT_JOIN(kernels_, FASTBERT_ISA) = {
    FASTBERT_TEXT(FASTBERT_ISA),   FASTBERT_ISA::linear_fwd,    FASTBERT_ISA::linear_bwd, FASTBERT_ISA::ffn_fwd,
    FASTBERT_ISA::ffn_bwd,         FASTBERT_ISA::attention_fwd, FASTBERT_ISA::attention_bwd,
    FASTBERT_ISA::fma_rate,        FASTBERT_ISA::layernorm_fwd, FASTBERT_ISA::layernorm_bwd,
    FASTBERT_ISA::embedding_fwd,   FASTBERT_ISA::embedding_bwd, FASTBERT_ISA::mlm_loss,
    FASTBERT_ISA::layers_fwd,
};

}  // namespace fastbert
