// The parameters of the kernels for the fused first step: top-K, new states, masked Adam.
#pragma once

#include "common/adam_math.h"
#include "cuda/topk.h"

namespace gradsel {

// One tensor: where its entries are chosen, and what is made of them. The index of the item is choice.out.
struct FirstStepItem {
  TopK choice;
  AdamItem item;
};

// The tensors of one launch, in device memory, and for each the number of its first block.
struct FirstStepTable {
  int64_t* words;
  int64_t count;

  static constexpr int64_t kItemWords = sizeof(FirstStepItem) / sizeof(int64_t);
  static GRADSEL_INLINE int64_t size(int64_t count) { return count * (kItemWords + 1) + 1; }

  GRADSEL_INLINE FirstStepItem* items() const { return reinterpret_cast<FirstStepItem*>(words); }
  GRADSEL_INLINE int64_t* first_blocks() const { return words + count * kItemWords; }  // [count + 1]
};
constexpr unsigned kFirstStepShared = (sizeof(FirstStepItem) + 15) / 16 * 16;  // bytes of a block's item

// In a first step the bias corrections of all tensors are 1 - beta1 and 1 - beta2, so the host computes the scalars.
struct FirstStep {
  FirstStepTable table;
  AdamScalars<float> scalars32;
  AdamScalars<double> scalars64;
  const float* grad_scale;  // or null
  const float* found_inf;   // or null
};

}  // namespace gradsel
