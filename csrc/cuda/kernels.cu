// All device code, in one file for one fatbin.
#include "cuda/adam.cuh"
#include "cuda/topk.cuh"
#include "cuda/topk_adam.cuh"

// Named after a hash of the sources, by which the extension knows its own kernels.
#ifdef GRADSEL_SOURCE
#define GRADSEL_JOIN(a, b) a##b
#define GRADSEL_NAMED(hash) GRADSEL_JOIN(gradsel_source_, hash)
extern "C" __global__ void GRADSEL_NAMED(GRADSEL_SOURCE)() {}
#endif
