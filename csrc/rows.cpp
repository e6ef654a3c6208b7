// gather_rows and scatter_rows on any strides, and the range checks of index arrays.
#include <atomic>
#include <type_traits>

#include "kernels.h"

namespace gradsel {
namespace {

template <class T>
GRADSEL_INLINE Range range_loop(const T* index, int64_t count) {
  T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::min();
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, index[i]);
    high = std::max(high, index[i]);
  }
  Range range;
  if (count > 0) range.low = low, range.high = high;
  return range;
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

// 16-, 32- and 64-bit elements are copied as integers: a gather changes no bit.
template <class Bits>
void gather(const void* weight, int64_t k, int64_t row_stride, int64_t col_stride, const int32_t* index, void* out,
            int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Bits* row = static_cast<const Bits*>(weight) + r * row_stride;
    for (int64_t j = r * k; j < (r + 1) * k; ++j) static_cast<Bits*>(out)[j] = row[index[j] * col_stride];
  }
}

template <class To, class From>
void scatter(void* weight, int64_t k, int64_t row_stride, int64_t col_stride, const int32_t* index, const void* values,
             int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    To* row = static_cast<To*>(weight) + r * row_stride;
    for (int64_t j = r * k; j < (r + 1) * k; ++j)
      row[index[j] * col_stride] = convert<To>(static_cast<const From*>(values)[j]);
  }
}

using Scatter = decltype(&scatter<float, float>);

template <class To>
Scatter scatter_from(Dtype from) {
  switch (from) {
    case kBFloat16: return &scatter<To, BFloat16>;
    case kFloat16: return &scatter<To, Float16>;
    case kFloat64: return &scatter<To, double>;
    default: return &scatter<To, float>;
  }
}

Scatter scatter_for(Dtype to, Dtype from) {
  switch (to) {
    case kBFloat16: return scatter_from<BFloat16>(from);
    case kFloat16: return scatter_from<Float16>(from);
    case kFloat64: return scatter_from<double>(from);
    default: return scatter_from<float>(from);
  }
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

bool gather_rows(const void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                 const int32_t* index, int64_t k, void* out, int threads, Range* found) {
  if (!columns_below(index, rows * k, cols, threads, found)) return false;
  parallel_ranges(rows, threads_for(rows * k, threads), [&](int64_t begin, int64_t end, int) {
    const auto kernel = dtype == kFloat64   ? &gather<uint64_t>
                        : dtype == kFloat32 ? &gather<uint32_t>
                                            : &gather<uint16_t>;
    kernel(weight, k, row_stride, col_stride, index, out, begin, end);
  });
  return true;
}

bool scatter_rows(void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                  const int32_t* index, int64_t k, const void* values, Dtype values_dtype, int threads, Range* found) {
  if (!columns_below(index, rows * k, cols, threads, found)) return false;
  const Scatter kernel = scatter_for(dtype, values_dtype);
  parallel_ranges(rows, threads_for(rows * k, threads), [&](int64_t begin, int64_t end, int) {
    kernel(weight, k, row_stride, col_stride, index, values, begin, end);
  });
  return true;
}

}  // namespace gradsel
