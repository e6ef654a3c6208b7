// Checks of index arrays.
#pragma once

#include <cstdint>
#include <limits>

namespace gradsel {

// Smallest and largest element of an index array; {max, min} of the type when it is empty.
struct Range {
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
};
Range range_of(const int32_t* index, int64_t count);
Range range_of(const int64_t* index, int64_t count);
// Whether all indices lie in 0 .. end - 1. One unsigned comparison covers both ends.
bool all_below(const int32_t* index, int64_t count, int64_t end);
bool all_below(const int64_t* index, int64_t count, int64_t end);

// Whether all columns lie in 0 .. end - 1, with threads; `found` holds their extremes when they do not.
bool columns_below(const int32_t* columns, int64_t count, int64_t end, int threads, Range* found);

// Whether the offsets of sparse rows begin with 0, never descend, and end with nnz.
bool row_offsets_ascend(const int64_t* offsets, int64_t rows, int64_t nnz);

}  // namespace gradsel
