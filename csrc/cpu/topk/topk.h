// Row-wise top-K of magnitudes. Strides are in elements.
#pragma once

#include <cstdint>

#include "common/numbers.h"

namespace gradsel {

// Selects min(k, cols) columns of each row; `bits`, their packed mask, may be null.
void topk_rows(const void* grad, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
               int64_t k, int32_t* out, uint32_t* bits, int threads);

}  // namespace gradsel
