// Gathering and scattering selected columns of each row. Strides are in elements.
#pragma once

#include <cstdint>

#include "common/numbers.h"
#include "cpu/indices.h"

namespace gradsel {

// Return false, having written nothing, when a column is out of range; `found` then holds the extremes.
bool gather_rows(const void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                 const int32_t* index, int64_t k, void* out, int threads, Range* found);
bool scatter_rows(void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                  const int32_t* index, int64_t k, const void* values, Dtype values_dtype, int threads, Range* found);

}  // namespace gradsel
