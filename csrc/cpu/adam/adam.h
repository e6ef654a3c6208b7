// One masked Adam step of many tensors.
#pragma once

#include <cstdint>

#include "common/adam_item.h"
#include "cpu/indices.h"

namespace gradsel {

// Indices out of range.
struct AdamFault {
  int64_t item = -1;  // the first that has some; -1: none
  Range found;
  int64_t end = 0;  // indices must be below

  bool any() const { return item >= 0; }
};

AdamFault masked_adam(const AdamItem* items, int64_t count, const AdamHyperparameters& hyper, int threads);

}  // namespace gradsel
