// The kernels under test, compiled for the CPU, and a table of them.
#include GRADSEL_KERNELS
#include GRADSEL_KERNEL_NAMES

#include "emulator.h"

namespace emulation {

using namespace gradsel;

#define ENTRY(kernel) {#kernel, [](void** params) { call(kernel, params); }},
const Kernel kernels[] = {GRADSEL_CUDA_KERNELS(ENTRY){nullptr, nullptr}};

}  // namespace emulation
