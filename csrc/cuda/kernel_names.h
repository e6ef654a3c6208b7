// Every kernel of kernels.cu, as X(name).
#pragma once

#define GRADSEL_CUDA_KERNELS(X) \
  X(gradsel_topk_one_16)        \
  X(gradsel_topk_one_32)        \
  X(gradsel_topk_one_64)        \
  X(gradsel_topk_few_16)        \
  X(gradsel_topk_few_32)        \
  X(gradsel_topk_few_64)        \
  X(gradsel_topk_many_16)       \
  X(gradsel_topk_many_32)       \
  X(gradsel_topk_many_64)       \
  X(gradsel_topk_adam_one_16)   \
  X(gradsel_topk_adam_one_32)   \
  X(gradsel_topk_adam_one_64)   \
  X(gradsel_topk_adam_few_16)   \
  X(gradsel_topk_adam_few_32)   \
  X(gradsel_topk_adam_few_64)   \
  X(gradsel_topk_adam_many_16)  \
  X(gradsel_topk_adam_many_32)  \
  X(gradsel_topk_adam_many_64)  \
  X(gradsel_write_table)        \
  X(gradsel_adam_step_32)       \
  X(gradsel_adam_step_64)
