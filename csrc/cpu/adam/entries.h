// Where the entries of a block lie in dense tensors, and reading and writing them there in any dtype.
//
// Offsets are worked out as they are needed, also a second time for the scatter: with a list of offsets in between, a
// block of 10 entries a row took 1.3 times as long (Zen 5). Nothing here is compiled for several SIMD levels, because
// it waits for memory.
#pragma once

#include "cpu/adam/blocks.h"

namespace gradsel {

// Calls visit(i, weight_offset, grad_offset) for every entry of a block; offsets are in elements.
template <class Visit>
GRADSEL_INLINE void visit_entries(const Block& block, const Visit& visit) {
  const Task& task = *block.task;
  const AdamItem& item = task.item;
  const View &weight = task.weight, &grad = task.grad;
  const int64_t begin = block.begin;
  const int count = block.count;
  const auto visit_flat = [&](int i, int64_t flat) {
    const int64_t at = weight.offset(flat);
    visit(i, at, task.shared ? at : grad.offset(flat));
  };
  if (item.layout == kCols) {
    const int32_t* cols = pointer<const int32_t>(item.index) + begin;
    const int64_t k = item.index_width;
    int64_t left = k - begin % k;
    int64_t weight_row = begin / k * weight.row_stride, grad_row = begin / k * grad.row_stride;
    for (int i = 0; i < count; ++i) {
      visit(i, weight_row + cols[i] * weight.col_stride, grad_row + cols[i] * grad.col_stride);
      if (--left == 0) {
        weight_row += weight.row_stride;
        grad_row += grad.row_stride;
        left = k;
      }
    }
  } else if (item.layout == kFlat && item.index_is_64) {
    for (int i = 0; i < count; ++i) visit_flat(i, pointer<const int64_t>(item.index)[begin + i]);
  } else if (item.layout == kFlat) {
    for (int i = 0; i < count; ++i) visit_flat(i, pointer<const int32_t>(item.index)[begin + i]);
  } else {
    for (int i = 0; i < count; ++i) visit_flat(i, begin + i);
  }
}

// Calls with_type(a number of the type that a dtype stores).
template <class Function>
void for_dtype(int64_t dtype, const Function& with_type) {
  switch (dtype) {
    case kBFloat16: return with_type(BFloat16{});
    case kFloat16: return with_type(Float16{});
    case kFloat64: return with_type(double{});
    default: return with_type(float{});
  }
}

// The entries of the weight.
template <class T>
void gather_weight(const Block& block, T* to) {
  for_dtype(block.task->item.weight_dtype, [&](auto stored) {
    const auto* weight = pointer<const decltype(stored)>(block.task->item.weight);
    visit_entries(block, [&](int i, int64_t at, int64_t) { to[i] = convert<T>(weight[at]); });
  });
}

// The entries of the gradient.
template <class T>
void gather_grad(const Block& block, T* to) {
  for_dtype(block.task->item.grad_dtype, [&](auto stored) {
    const auto* grad = pointer<const decltype(stored)>(block.task->item.grad);
    visit_entries(block, [&](int i, int64_t, int64_t at) { to[i] = convert<T>(grad[at]); });
  });
}

// Both, which have one dtype: twice as many loads are in flight at once.
template <class T>
void gather_both(const Block& block, T* params, T* grads) {
  for_dtype(block.task->item.weight_dtype, [&](auto stored) {
    const auto* weight = pointer<const decltype(stored)>(block.task->item.weight);
    const auto* grad = pointer<const decltype(stored)>(block.task->item.grad);
    visit_entries(block, [&](int i, int64_t weight_at, int64_t grad_at) {
      params[i] = convert<T>(weight[weight_at]);
      grads[i] = convert<T>(grad[grad_at]);
    });
  });
}

template <class T>
void scatter_weight(const Block& block, const T* from) {
  for_dtype(block.task->item.weight_dtype, [&](auto stored) {
    auto* weight = pointer<decltype(stored)>(block.task->item.weight);
    visit_entries(block, [&](int i, int64_t at, int64_t) { weight[at] = convert<decltype(stored)>(from[i]); });
  });
}

}  // namespace gradsel
