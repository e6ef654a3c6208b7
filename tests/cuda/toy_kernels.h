#pragma once

#define GRADSEL_CUDA_KERNELS(X) \
  X(toy_sum)                    \
  X(toy_reverse)                \
  X(toy_collectives)            \
  X(toy_votes)                  \
  X(toy_early_exit)             \
  X(toy_vectors)                \
  X(toy_atomics)                \
  X(toy_blocks)                 \
  X(toy_struct)                 \
  X(toy_undefined)              \
  X(toy_rendezvous)
