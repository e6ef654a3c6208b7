// Products with matrices of which few entries are not zero. Strides are in elements.
#pragma once

#include <cstdint>

#include "common/numbers.h"
#include "cpu/indices.h"

namespace gradsel {

// output [tokens, rows] += input [tokens, n] times the transpose of D [rows, n], which has `values` at `cols`.
struct SelectedProduct {
  Dtype dtype;  // of output and input; values are float, or double for kFloat64
  int64_t tokens, rows, n;
  void* output;
  int64_t output_token_stride, output_row_stride;
  const void* input;
  int64_t input_token_stride, input_col_stride;
  const int32_t* cols;
  const int64_t* row_offsets;  // [rows + 1], or null: every row has k entries
  int64_t k;
  const void* values;
};

// Returns false, having written nothing, when a column is out of range; `found` then holds the extremes.
bool selected_addmm(const SelectedProduct& product, int threads, Range* found);

}  // namespace gradsel
