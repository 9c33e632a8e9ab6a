// The Python module fastbert._C: what is not a tensor op. Importing it also registers the ops. Without PyTorch's headers:
// those of 2.11 do not allow pybind11 beside the stable ABI.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fail.h"
#include "runtime.h"

namespace py = pybind11;

namespace fastbert {
namespace {

#ifndef FASTBERT_VERSION
#define FASTBERT_VERSION "unknown"
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = FASTBERT_VERSION;
  info["compiler"] = __VERSION__;
  std::vector<std::string> isas{"baseline"};
#ifdef FASTBERT_HAVE_AVX2
  isas.push_back("avx2");
#endif
#ifdef FASTBERT_HAVE_AVX512
  isas.push_back("avx512");
#endif
#ifdef FASTBERT_HAVE_AVX512BF16
  isas.push_back("avx512bf16");
#endif
  info["isas"] = isas;
  return info;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define FASTBERT_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  FASTBERT_FEATURE("sse4.2")
  FASTBERT_FEATURE("avx")
  FASTBERT_FEATURE("avx2")
  FASTBERT_FEATURE("fma")
  FASTBERT_FEATURE("bmi2")
  FASTBERT_FEATURE("avx512f")
  FASTBERT_FEATURE("avx512bw")
  FASTBERT_FEATURE("avx512dq")
  FASTBERT_FEATURE("avx512vl")
  FASTBERT_FEATURE("avx512bf16")
#undef FASTBERT_FEATURE
#endif
  return found;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : supported_kernels()) names.emplace_back(k->isa);
  return names;
}

double peak_gflops(int threads, double seconds) {
  if (threads < 1) fail("peak_gflops: threads is ", threads, "; it must be at least 1");
  if (!(seconds > 0 && seconds <= 60)) fail("peak_gflops: seconds is ", seconds, "; it must be above 0 and at most 60");
  py::gil_scoped_release release;
  std::vector<double> rates(threads, seconds);
  executor().run(
      threads,
      [](void* context, int i) {
        double& rate = static_cast<double*>(context)[i];
        rate = kernels().fma_rate(rate);
      },
      rates.data());
  double total = 0;
  for (double r : rates) total += r;
  return total / 1e9;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastbert; importing it registers torch.ops.fastbert.*_cpu.";
  m.def("build_info", &build_info, "What this binary was built from and for.");
  m.def("cpu_features", &cpu_features, "Instruction set extensions of this CPU that fastbert knows.");
  m.def("supported_isas", &supported_isas, "Instruction sets that are built and run here, fastest first.");
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use (FASTBERT_CPU_ISA chooses another).");
  m.def("peak_gflops", &peak_gflops, py::arg("threads"), py::arg("seconds") = 0.5,
        "fp32 multiply-add rate of this many PyTorch threads together, in GFLOP/s; call torch.set_num_threads first.");
}

}  // namespace fastbert
