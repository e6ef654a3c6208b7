// The parameters of the top-K kernels for GPUs.
#pragma once

#include "common/numbers.h"

namespace gradsel {

constexpr int kMostFew = 64;       // the largest K of topk_few
constexpr int kFewDelegates = 16;  // up to this K a lane has two delegates, above four
constexpr int kCandidates = 192;   // room in a warp's list: the first chunk's candidates at K = 64, and slack
constexpr int kSlack = 32;         // candidates over K after which the list is cut
constexpr int kTopKThreads = 128;
constexpr int kTopKManyThreads = 256;  // one for each digit

// Columns of a chunk that a lane holds, given the bytes of an element: as many as leave registers for enough warps.
constexpr int columns_of_lane(int64_t size) { return size == 8 ? 16 : 32; }

struct TopK {
  const void* grad;
  int64_t rows, cols, row_stride, col_stride;
  int32_t* out;    // [rows, k]
  uint32_t* bits;  // [rows, ceil(cols / 32)], or null
  uint64_t nan;    // the key of NaN
  int k;           // at most cols
  int log2_warps;  // of how many warps share a row: 1, 2 or 4
  bool vectors;    // rows are contiguous, and all begin at an address divisible by 16
};

GRADSEL_INLINE int64_t bytes_of(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// The magnitude, as an integer, that stands for every NaN: infinity's plus one.
GRADSEL_INLINE uint64_t nan_key(Dtype dtype) {
  switch (dtype) {
    case kFloat64: return 0x7ff0000000000001;
    case kBFloat16: return 0x7f81;
    case kFloat16: return 0x7c01;
    default: return 0x7f800001;
  }
}

}  // namespace gradsel
