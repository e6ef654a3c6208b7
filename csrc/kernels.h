// The entry points that bindings.cpp exposes. Pointers come as integers; strides are in elements.
#pragma once

#include <cstdint>

#include "adam_item.h"
#include "common.h"

namespace gradsel {

// Selects min(k, cols) columns of each row; bits may be null.
void topk_rows(const void* grad, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
               int64_t k, int32_t* out, uint32_t* bits, int threads);

void pack_bits(const uint8_t* mask, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, uint32_t* bits,
               int threads);
void unpack_bits(const uint32_t* bits, int64_t rows, int64_t cols, uint8_t* mask, int threads);
void bits_to_cols(const uint32_t* bits, int64_t rows, int64_t words, int64_t k, int32_t* cols, int threads);

// Return false, having written nothing, when a column is out of range; `found` then holds the extremes.
bool gather_rows(const void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                 const int32_t* index, int64_t k, void* out, int threads, Range* found);
bool scatter_rows(void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                  const int32_t* index, int64_t k, const void* values, Dtype values_dtype, int threads, Range* found);

// Return whether indices are in order; `found` holds their extremes when they are not.
bool columns_below(const int32_t* columns, int64_t count, int64_t end, int threads, Range* found);
bool row_offsets_ascend(const int64_t* offsets, int64_t rows, int64_t nnz);

// Of an activation [batches, tokens, features].
struct Strides {
  int64_t batch, token, feature;
  int64_t at(int64_t b, int64_t t, int64_t f) const { return b * batch + t * token + f * feature; }
};

// out [batches, count, tokens]. Columns are trusted.
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

struct AdamFault {
  enum Kind : int { kNone = 0, kOutOfRange = 1, kBitsPastEnd = 2, kWrongCount = 3 } kind = kNone;
  int64_t item = 0;
  Range found;        // kOutOfRange
  int64_t end = 0;    // kOutOfRange: indices must be below; kBitsPastEnd: number of columns
  int64_t count = 0;  // kWrongCount: bits set
};

AdamFault masked_adam(const AdamItem* items, int64_t count, const AdamHyperparameters& hyper, int threads);

}  // namespace gradsel
