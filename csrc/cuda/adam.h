// The parameters of the masked Adam kernels for GPUs.
#pragma once

#include "common/adam_item.h"

namespace gradsel {

constexpr int kAdamThreads = 128;
constexpr int kPerThread = 4;
constexpr int kTile = kAdamThreads * kPerThread;  // entries
constexpr int kAdamBlocks = 6;                    // at most, for each multiprocessor: twice as many as fit at once
constexpr unsigned kAdamShared = 512;             // bytes

// A table in device memory: the items, for each the number of its first tile, the number of tiles, and a ticket that is
// 0 between two steps.
struct AdamTable {
  int64_t* words;
  int64_t count;

  static constexpr int64_t kItemWords = sizeof(AdamItem) / sizeof(int64_t);
  static GRADSEL_INLINE int64_t size(int64_t count) { return count * (kItemWords + 1) + 2; }

  GRADSEL_INLINE AdamItem* items() const { return reinterpret_cast<AdamItem*>(words); }
  GRADSEL_INLINE int64_t* first_tiles() const { return words + count * kItemWords; }  // [count + 1]
  GRADSEL_INLINE unsigned* ticket() const { return reinterpret_cast<unsigned*>(words + size(count) - 1); }
};

struct AdamStep {
  AdamTable table;
  AdamHyperparameters hyper;
  const float* grad_scale;  // or null
  const float* found_inf;   // or null
  const double* rates;      // or null: lr, beta1 and beta2, in place of those in hyper
};

// A part of a table on its way to the device, as a kernel's parameter. Unlike a copy, this needs no pinned memory that
// must outlive it, and a captured graph holds the contents. A kernel takes up to 32,764 bytes of parameters.
struct TablePart {
  static constexpr int kWords = 4000;
  int64_t* to;
  int count;
  int64_t words[kWords];
};

}  // namespace gradsel
