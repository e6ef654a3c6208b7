// Starting a kernel by name. driver.cpp does it on a GPU, tests/cuda/emulator.cpp on the CPU.
#pragma once

#include <cstdint>

namespace gradsel {

struct Launch {
  const char* kernel;
  unsigned grid, block, shared_bytes;
  int device;
  int64_t stream;
};

// params[i] points to the i-th argument. Throws std::runtime_error.
void cuda_launch(const Launch& launch, void** params);

int cuda_multiprocessors(int device);

}  // namespace gradsel
