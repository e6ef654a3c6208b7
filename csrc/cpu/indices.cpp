#include "cpu/indices.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace gradsel {
namespace {

template <class T>
GRADSEL_INLINE Range range_loop(const T* index, int64_t count) {
  T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::min();
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, index[i]);
    high = std::max(high, index[i]);
  }
  return count > 0 ? Range{low, high} : Range{};
}

template <class T>
GRADSEL_INLINE auto unsigned_max(const T* index, int64_t count) {
  std::make_unsigned_t<T> high = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto x = static_cast<std::make_unsigned_t<T>>(index[i]);
    high = high < x ? x : high;
  }
  return high;
}

}  // namespace

GRADSEL_CLONES Range range_of(const int32_t* index, int64_t count) { return range_loop(index, count); }
GRADSEL_CLONES Range range_of(const int64_t* index, int64_t count) { return range_loop(index, count); }

GRADSEL_CLONES bool all_below(const int32_t* index, int64_t count, int64_t end) {
  // A negative index is one from 2^31 up, which is out of range even of a row that has so many columns.
  return count <= 0 || static_cast<int64_t>(unsigned_max(index, count)) < std::min(end, int64_t{1} << 31);
}
GRADSEL_CLONES bool all_below(const int64_t* index, int64_t count, int64_t end) {
  return count <= 0 || unsigned_max(index, count) < static_cast<uint64_t>(end);
}

bool columns_below(const int32_t* columns, int64_t count, int64_t end, int threads, Range* found) {
  std::atomic<bool> good{true};
  parallel_ranges(count, threads_for(count, threads), [&](int64_t first, int64_t last, int) {
    if (!all_below(columns + first, last - first, end)) good = false;
  });
  if (!good) *found = range_of(columns, count);
  return good;
}

bool row_offsets_ascend(const int64_t* offsets, int64_t rows, int64_t nnz) {
  bool good = offsets[0] == 0 && offsets[rows] == nnz;
  for (int64_t r = 0; r < rows; ++r) good &= offsets[r] <= offsets[r + 1];
  return good;
}

}  // namespace gradsel
