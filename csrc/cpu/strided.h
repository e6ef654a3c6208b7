// Making a strided view contiguous.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gradsel {

// Copies a [rows, cols] view with any strides into dst, one row every `pitch` elements. The loop order follows the
// smaller stride, so that each cache line of the source is used whole while it is at hand.
template <class T>
void pack_block(const T* src, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, T* dst,
                int64_t pitch) {
  if (col_stride <= row_stride || rows == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) dst[r * pitch + c] = src[r * row_stride + c * col_stride];
    return;
  }
  constexpr int64_t kTile = 16;  // columns: the destination lines a tile writes stay in the first-level cache
  for (int64_t c0 = 0; c0 < cols; c0 += kTile) {
    const int64_t c1 = std::min(c0 + kTile, cols);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int64_t r1 = std::min(r0 + kTile, rows);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = r0; r < r1; ++r) dst[r * pitch + c] = src[r * row_stride + c * col_stride];
    }
  }
}

}  // namespace gradsel
