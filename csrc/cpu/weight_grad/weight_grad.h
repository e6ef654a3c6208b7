// The selected entries of a weight gradient. Strides are in elements.
#pragma once

#include <cstdint>

#include "common/numbers.h"

namespace gradsel {

// The strides of an activation [batches, tokens, features].
struct Strides {
  int64_t batch, token, feature;
  int64_t at(int64_t b, int64_t t, int64_t f) const { return b * batch + t * token + f * feature; }
};

// Copies columns of an activation, each with adjoining tokens: out [batches, count, tokens]. Columns are trusted.
void take_columns(const void* input, Dtype dtype, const Strides& stride, int64_t batches, int64_t tokens,
                  const int32_t* columns, int64_t count, void* out, int threads);

struct WeightGrad {
  Dtype dtype;
  int64_t batches, tokens, rows, n;
  const void* grad_output;
  Strides grad_output_stride;
  const void* input;
  Strides input_stride;
  const int32_t* cols;
  const int64_t* row_offsets;  // null: k columns to a row
  int64_t k;
  void* out;   // [nnz] of float, or of double for double
  void* bias;  // [rows] of the same, or null
};

// Columns and offsets are trusted.
void selected_weight_grad(const WeightGrad& problem, int threads);

}  // namespace gradsel
