// The arguments of a masked Adam step, on the CPU and on GPUs.
#pragma once

#include "common/numbers.h"

namespace gradsel {

enum Layout : int64_t { kAll = 0, kCols = 1, kFlat = 2 };  // those of _checks.py

// One tensor of a masked Adam step. gradsel_kernels/adam_item.py has the same fields; native.py compares the two.
struct AdamItem {
  int64_t layout, nnz, rows, cols;
  int64_t weight, weight_dtype, weight_row_stride, weight_col_stride;  // weight 0: there is none
  int64_t values;                                                      // 0: the weight is the parameter
  int64_t grad, grad_dtype, grad_is_dense, grad_row_stride, grad_col_stride;
  int64_t exp_avg, exp_avg_sq;
  int64_t max_exp_avg_sq;  // 0: no AMSGrad
  int64_t original;        // 0: no anchor
  int64_t state_dtype;
  int64_t step, step_dtype;
  int64_t index, index_is_64, index_width;  // width of a row of the index (COLS): its columns
  int64_t stochastic, seed;                 // stochastic 0: the weight is rounded to nearest
  int64_t compensation;                     // 0: what rounding the weight loses is lost
};

// Every field above, in order, as X(name).
#define GRADSEL_ADAM_ITEM_FIELDS(X)                                                                               \
  X(layout) X(nnz) X(rows) X(cols)                                                                                \
  X(weight) X(weight_dtype) X(weight_row_stride) X(weight_col_stride)                                             \
  X(values)                                                                                                       \
  X(grad) X(grad_dtype) X(grad_is_dense) X(grad_row_stride) X(grad_col_stride)                                    \
  X(exp_avg) X(exp_avg_sq)                                                                                        \
  X(max_exp_avg_sq)                                                                                               \
  X(original)                                                                                                     \
  X(state_dtype)                                                                                                  \
  X(step) X(step_dtype)                                                                                           \
  X(index) X(index_is_64) X(index_width)                                                                          \
  X(stochastic) X(seed)                                                                                           \
  X(compensation)

struct AdamHyperparameters {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled_weight_decay, maximize;
  double anchor;
  bool anchor_l1, anchor_decoupled;
  double grad_scale;  // gradients are divided by it
};

// A neuron view in memory: element (r, c) is at r * row_stride + c * col_stride.
struct View {
  int64_t cols, row_stride, col_stride;
  bool collapses;   // entry i in row-major order is at i * col_stride
  bool contiguous;  // ... and col_stride is 1

  GRADSEL_INLINE View(int64_t rows, int64_t cols_, int64_t row_stride_, int64_t col_stride_)
      : cols(cols_), row_stride(row_stride_), col_stride(cols_ == 1 ? row_stride_ : col_stride_) {
    collapses = rows == 1 || cols == 1 || row_stride == cols * col_stride;
    if (rows == 1) col_stride = col_stride_;
    contiguous = collapses && (col_stride == 1 || rows * cols == 1);
  }

  GRADSEL_INLINE int64_t offset(int64_t flat) const {
    return collapses ? flat * col_stride : flat / cols * row_stride + flat % cols * col_stride;
  }
};

}  // namespace gradsel
