// What runs the CPU kernels: the table that cpuid (and FASTBERT_CPU_ISA) chose, and PyTorch's threads.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastbert {

// Fastest first; what this machine can run.
std::vector<const Kernels*> supported_kernels();
// The fastest of them that FASTBERT_CPU_ISA does not exclude; throws std::runtime_error if that is not a name it knows.
const Kernels& kernels();
// Follows torch.set_num_threads; one worker after fork, where PyTorch's thread pool is gone.
Executor executor();

}  // namespace fastbert
