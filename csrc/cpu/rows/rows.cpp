// gather_rows and scatter_rows on any strides.
#include "cpu/rows/rows.h"

#include "cpu/parallel.h"

namespace gradsel {
namespace {

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
