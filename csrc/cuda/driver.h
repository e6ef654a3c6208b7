// Loading the CUDA kernels; launch.h launches them.
#pragma once

#include <string>

namespace gradsel {

// Remembers the contents of the fatbin. They are loaded to a device when it is first asked for.
void cuda_load(const std::string& fatbin);

// Why no kernel can run on a device, in words for the user; empty if it can. Loads them.
std::string cuda_why_off(int device);

}  // namespace gradsel
