// The first step of a selection: top-K of each row, then Adam on what it selects.
#pragma once

#include <cstdint>

#include "common/adam_item.h"

namespace gradsel {

// Writes the columns that the items' indices point to, the packed masks unless `bits` is null (an address for each
// item), and new states. Gradients are dense, indices have the layout kCols. With `skip` no entry is updated.
void topk_masked_adam(const AdamItem* items, int64_t count, const int64_t* bits, const AdamHyperparameters& hyper,
                      bool skip, int threads);

}  // namespace gradsel
