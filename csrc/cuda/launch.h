// Starting a kernel.
#pragma once
#include <sstream>
#include <stdexcept>

#include "cuda/device.h"

namespace fastbert::cuda {

#ifdef __CUDACC__

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::ostringstream text;
  text << what << ": " << cudaGetErrorName(status) << ", " << cudaGetErrorString(status);
  throw std::runtime_error(text.str());
}

inline int multiprocessors(const Queue& queue) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, queue.device), "the number of multiprocessors");
  return count;
}

// shared: bytes of dynamic shared memory a block.
template <class... Parameters, class... Arguments>
void launch(const Queue& queue, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  check(cudaSetDevice(queue.device), name);  // the runtime in this library is not the one that PyTorch has told already
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          name);
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

#else

inline int multiprocessors(const Queue&) { return 3; }

template <class... Parameters, class... Arguments>
void launch(const Queue&, const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
            const Arguments&... arguments) {
  emulator::run(name, grid, threads, shared, [&] { kernel(arguments...); });
}

#endif

}  // namespace fastbert::cuda
