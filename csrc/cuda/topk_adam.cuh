// The fused first step over many tensors in one launch: the thread that stores a chosen column makes the states of its
// entry and updates it. What is read of the gradient once more is still in the cache.
//
// A block works on rows of one tensor. The selections are those of topk.cuh, the arithmetic is that of adam.cuh.
#pragma once

#include "cuda/adam.cuh"
#include "cuda/topk.cuh"
#include "cuda/topk_adam.h"

namespace gradsel {

__device__ __forceinline__ const AdamScalars<float>& scalars_of(const FirstStep& step, float) { return step.scalars32; }
__device__ __forceinline__ const AdamScalars<double>& scalars_of(const FirstStep& step, double) {
  return step.scalars64;
}

// Entry `number` in mask order, whose weight and gradient lie at these offsets. With `skipped` its state is made, and
// nothing is updated.
template <class T>
__device__ __forceinline__ void first_update(const FirstStep& step, const AdamItem& item, bool skipped, int64_t number,
                                             int64_t weight_offset, int64_t grad_offset) {
  constexpr Dtype kOwn = sizeof(T) == 8 ? kFloat64 : kFloat32;
  const T before = read_one<T>(item.weight_dtype, item.weight, weight_offset);
  T p[1] = {before}, m[1] = {0}, v[1] = {0}, v_max[1] = {0};
  if (!skipped) {
    T g[1] = {read_one<T>(item.grad_dtype, item.grad, grad_offset)};
    AdamScalars<T> scalars = scalars_of(step, T(0));
    scalars.grad_scale = static_cast<T>(step.grad_scale ? *step.grad_scale : 1.0f);
    if (item.compensation) p[0] += T(0);  // the compensation so far, which turns -0.0 into 0.0
    step_entries(scalars, item.original != 0, item.max_exp_avg_sq != 0, p, g, m, v, v_max,
                 [&](T(&original)[1]) { original[0] = before; });
  }
  write_one(item.state_dtype, item.exp_avg, m[0], number);
  write_one(item.state_dtype, item.exp_avg_sq, v[0], number);
  if (item.max_exp_avg_sq) write_one(item.state_dtype, item.max_exp_avg_sq, v_max[0], number);
  if (item.original) write_one(kOwn, item.original, before, number);
  if (item.values) write_one(kOwn, item.values, p[0], number);
  if (skipped) {
    if (item.compensation) write_one(item.weight_dtype, item.compensation, T(0), number);
    return;
  }
  if (item.stochastic || item.compensation) round_param(item, RandomKeys(item.seed, 1), p[0], number);
  write_one(item.weight_dtype, item.weight, p[0], weight_offset);
}

// `choose` is one of the selections, whose shared memory lies behind the item that it is for.
template <class Choose>
__device__ __forceinline__ void topk_adam(const FirstStep& step, const Choose& choose) {
  const int64_t* first_blocks = step.table.first_blocks();
  const int64_t number = item_of(first_blocks, step.table.count, blockIdx.x);
  int64_t* words = reinterpret_cast<int64_t*>(shared_memory());
  if (threadIdx.x < FirstStepTable::kItemWords)
    words[threadIdx.x] = step.table.words[number * FirstStepTable::kItemWords + threadIdx.x];
  __syncthreads();
  const FirstStepItem& own = *reinterpret_cast<const FirstStepItem*>(words);
  const AdamItem& item = own.item;
  const int64_t block = blockIdx.x - first_blocks[number];
  const bool skipped = step.found_inf && *step.found_inf != 0;
  if (block == 0 && threadIdx.x == 0) write_one(item.step_dtype, item.step, skipped ? 0.0 : 1.0, 0);
  if (own.choice.rows == 0 || own.choice.k == 0) return;  // it has a block for its step alone
  choose(own.choice, block, shared_memory() + kFirstStepShared, [&](int64_t row, int position, uint32_t col) {
    const int64_t entry = row * own.choice.k + position;
    const int64_t weight = row * item.weight_row_stride + col * item.weight_col_stride;
    const int64_t grad = row * item.grad_row_stride + col * item.grad_col_stride;
    if (item.state_dtype == kFloat64)
      first_update<double>(step, item, skipped, entry, weight, grad);
    else
      first_update<float>(step, item, skipped, entry, weight, grad);
  });
}

}  // namespace gradsel

#define GRADSEL_TOPK_ADAM(kind, size, threads, blocks)                                                      \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                             \
      gradsel_topk_adam_##kind##_##size(const __grid_constant__ gradsel::FirstStep step) {                  \
    gradsel::topk_adam(step, [](const auto& p, int64_t block, unsigned char* shared, const auto& each) {    \
      gradsel::topk_##kind<uint##size##_t>(p, block, shared, each);                                         \
    });                                                                                                     \
  }
GRADSEL_TOPK_ADAM(one, 16, gradsel::kTopKThreads, 6)
GRADSEL_TOPK_ADAM(one, 32, gradsel::kTopKThreads, 6)
GRADSEL_TOPK_ADAM(one, 64, gradsel::kTopKThreads, 6)
GRADSEL_TOPK_ADAM(few, 16, gradsel::kTopKThreads, 6)
GRADSEL_TOPK_ADAM(few, 32, gradsel::kTopKThreads, 6)
GRADSEL_TOPK_ADAM(few, 64, gradsel::kTopKThreads, 4)
GRADSEL_TOPK_ADAM(many, 16, gradsel::kTopKManyThreads, 3)
GRADSEL_TOPK_ADAM(many, 32, gradsel::kTopKManyThreads, 3)
GRADSEL_TOPK_ADAM(many, 64, gradsel::kTopKManyThreads, 3)
#undef GRADSEL_TOPK_ADAM
