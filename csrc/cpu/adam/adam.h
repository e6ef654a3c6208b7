// One masked Adam step of many tensors.
#pragma once

#include <cstdint>

#include "common/adam_item.h"
#include "cpu/indices.h"

namespace gradsel {

struct AdamFault {
  enum Kind : int { kNone = 0, kOutOfRange = 1, kBitsPastEnd = 2, kWrongCount = 3 } kind = kNone;
  int64_t item = 0;
  Range found;        // kOutOfRange
  int64_t end = 0;    // kOutOfRange: indices must be below; kBitsPastEnd: number of columns
  int64_t count = 0;  // kWrongCount: bits set
};

AdamFault masked_adam(const AdamItem* items, int64_t count, const AdamHyperparameters& hyper, int threads);

}  // namespace gradsel
