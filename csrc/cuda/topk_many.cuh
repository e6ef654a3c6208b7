// Row-wise top-K of |grad| for any K, by radix selection. One block works on a row and reads it several times, from the
// cache if it fits. Also the keys, which all top-K kernels share.
#pragma once

#include "cuda/device.cuh"
#include "cuda/topk.h"

namespace gradsel {

template <class Raw>
struct KeyOf {
  using Type = uint32_t;
};
template <>
struct KeyOf<uint64_t> {
  using Type = uint64_t;
};

template <class Raw>
__device__ __forceinline__ typename KeyOf<Raw>::Type magnitude(Raw raw) {
  constexpr Raw kSign = static_cast<Raw>(Raw{1} << (8 * sizeof(Raw) - 1));
  return static_cast<typename KeyOf<Raw>::Type>(raw & static_cast<Raw>(~kSign));
}

template <class Raw>
__device__ __forceinline__ const Raw* row_of(const TopK& p, int64_t row) {
  return in_global_memory(static_cast<const Raw*>(p.grad)) + row * p.row_stride;
}

// Sums over the threads of a block before this one, and over all; `sums` has room for one number a warp.
__device__ __forceinline__ unsigned block_sum_before(unsigned x, unsigned* sums, unsigned* total) {
  const unsigned warp = threadIdx.x / kWarp;
  unsigned own;
  unsigned before = warp_sum_before(x, &own);
  __syncthreads();  // sums may still be read from an earlier call
  if (lane_number() == 0) sums[warp] = own;
  __syncthreads();
  *total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  return before;
}

// Finds the K-th key 8 bits at a time, from the top, by counting the next digit of the keys that begin as it does.
template <class Raw, class Each>
__device__ __forceinline__ void topk_many(const TopK& p, int64_t number, unsigned char* shared, const Each& each) {
  using Key = typename KeyOf<Raw>::Type;
  constexpr unsigned kDigits = 256;
  unsigned* histogram = reinterpret_cast<unsigned*>(shared);
  unsigned* sums = histogram + kDigits;  // one a warp
  Key* shared_key = reinterpret_cast<Key*>(sums + kWarp);
  unsigned* shared_wanted = reinterpret_cast<unsigned*>(shared_key + 1);
  const Raw* row = row_of<Raw>(p, number);
  const Key nan = static_cast<Key>(p.nan);

  Key kth = 0;
  unsigned wanted = static_cast<unsigned>(p.k);  // of the keys that begin as the K-th does
  for (int shift = 8 * static_cast<int>(sizeof(Raw)) - 8; shift >= 0; shift -= 8) {
    for (unsigned i = threadIdx.x; i < kDigits; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for (int64_t col = threadIdx.x; col < p.cols; col += blockDim.x) {
      const Key key = smaller(magnitude(row[col * p.col_stride]), nan);
      if (shift + 8 == 8 * static_cast<int>(sizeof(Raw)) || key >> (shift + 8) == kth >> (shift + 8))
        atomicAdd(histogram + (static_cast<unsigned>(key >> shift) & (kDigits - 1)), 1u);
    }
    __syncthreads();
    // Threads hold the digits in descending order.
    const unsigned digit = kDigits - 1 - threadIdx.x;
    unsigned total;
    const unsigned above = block_sum_before(histogram[digit], sums, &total);
    if (above < wanted && wanted <= above + histogram[digit]) {
      *shared_key = kth | (static_cast<Key>(digit) << shift);
      *shared_wanted = wanted - above;
    }
    __syncthreads();
    kth = *shared_key;
    wanted = *shared_wanted;
  }

  const int64_t words = (p.cols + 31) / 32;
  unsigned equal_before = 0, chosen_before = 0;
  for (int64_t first = 0; first < p.cols; first += blockDim.x) {
    const int64_t col = first + threadIdx.x;
    const Key key = col < p.cols ? smaller(magnitude(row[col * p.col_stride]), nan) : Key{0};
    const bool equal = col < p.cols && key == kth;
    unsigned equals, chosens;
    const unsigned rank = equal_before + block_sum_before(equal, sums, &equals);
    const bool chosen = col < p.cols && (key > kth || (equal && rank < wanted));
    const unsigned slot = chosen_before + block_sum_before(chosen, sums, &chosens);
    if (chosen) in_global_memory(p.out)[number * p.k + slot] = static_cast<int32_t>(col);
    const unsigned word = __ballot_sync(kAllLanes, chosen);
    if (p.bits && lane_number() == 0 && col < p.cols) in_global_memory(p.bits)[number * words + col / 32] = word;
    if (chosen) each(number, static_cast<int>(slot), static_cast<uint32_t>(col));
    equal_before += equals;
    chosen_before += chosens;
  }
}

}  // namespace gradsel
