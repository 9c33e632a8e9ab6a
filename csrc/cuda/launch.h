// Starting a kernel.
#pragma once
#include <sstream>
#include <stdexcept>

#include "cuda/device.h"

namespace fastbert::cuda {

#ifdef __CUDACC__

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch, a good one, would report this error
  std::ostringstream text;
  text << what << ": " << cudaGetErrorName(status) << ", " << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

inline int attribute(const Queue& queue, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, queue.device), "an attribute of the GPU");
  return value;
}

inline int multiprocessors(const Queue& queue) { return attribute(queue, cudaDevAttrMultiProcessorCount); }

// 80 for 8.0.
inline int compute_capability(const Queue& queue) {
  return 10 * attribute(queue, cudaDevAttrComputeCapabilityMajor) +
         attribute(queue, cudaDevAttrComputeCapabilityMinor);
}

// In bytes.
inline int shared_memory_per_block(const Queue& queue) {
  return attribute(queue, cudaDevAttrMaxSharedMemoryPerBlockOptin);
}
inline int shared_memory_per_multiprocessor(const Queue& queue) {
  return attribute(queue, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

// shared: bytes of dynamic shared memory a block.
template <class... Parameters, class... Arguments>
void launch(const Queue& queue, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  check(cudaSetDevice(queue.device), name);  // the runtime in this library is not the one that PyTorch has told already
  if (shared > 48 * 1024)  // all there may be, as another thread may be about to launch the same kernel with more
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_memory_per_block(queue)),
          name);
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

inline int multiprocessors(const Queue&) { return 3; }

inline int compute_capability(const Queue&) { return emulator::capability(); }
inline int shared_memory_per_block(const Queue& queue) { return (compute_capability(queue) == 90 ? 227 : 163) * 1024; }
inline int shared_memory_per_multiprocessor(const Queue& queue) { return shared_memory_per_block(queue) + 1024; }

template <class... Parameters, class... Arguments>
void launch(const Queue&, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
            const Arguments&... arguments) {
  emulator::run(name, grid, threads, shared, [&] { kernel(arguments...); });
}

#endif

}  // namespace fastbert::cuda
