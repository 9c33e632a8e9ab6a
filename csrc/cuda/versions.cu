// Which CUDA the driver offers and which one was linked into this library, for fastbert/dispatch.py: 13000 for 13.0. The
// driver's is 0 where there is none. Neither question starts CUDA.
#ifdef __CUDACC__
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) int fastbert_cuda_of_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

extern "C" __attribute__((visibility("default"))) int fastbert_cuda_of_library() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif
