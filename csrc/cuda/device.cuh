// What all device code shares. nvcc compiles it, and g++ for the tests, which emulate a GPU on the CPU.
#pragma once

#include "common/numbers.h"

#ifdef __CUDACC__
extern __shared__ uint4 gradsel_dynamic_shared[];
#else
unsigned char* emulated_shared_memory();
#endif

namespace gradsel {

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef __CUDACC__
  return reinterpret_cast<unsigned char*>(gradsel_dynamic_shared);
#else
  return emulated_shared_memory();
#endif
}

// The same address, but the compiler learns that it is in global memory: otherwise every access would test for that.
template <class T>
__device__ __forceinline__ T* at(int64_t address) {
#ifdef __CUDACC__
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
#else
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
#endif
}
template <class T>
__device__ __forceinline__ T* in_global_memory(T* address) {
  return at<T>(static_cast<int64_t>(reinterpret_cast<intptr_t>(address)));
}

__device__ __forceinline__ unsigned lane_number() { return threadIdx.x % kWarp; }
__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_number()) - 1; }

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a < b ? b : a;
}

// Reductions over a warp; 32 bits in one instruction.
__device__ __forceinline__ unsigned warp_max(unsigned x) { return __reduce_max_sync(kAllLanes, x); }
__device__ __forceinline__ unsigned warp_min(unsigned x) { return __reduce_min_sync(kAllLanes, x); }
__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(x), distance);
    x = larger(x, other);
  }
  return x;
}
__device__ __forceinline__ uint64_t warp_min(uint64_t x) { return ~warp_max(~x); }

// The sum of x over the lanes before this one, and over all of them.
__device__ __forceinline__ unsigned warp_sum_before(unsigned x, unsigned* total) {
  unsigned sum = x;
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    const unsigned other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane_number() >= distance) sum += other;
  }
  *total = __shfl_sync(kAllLanes, sum, kWarp - 1);
  return sum - x;
}

}  // namespace gradsel
