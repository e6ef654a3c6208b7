// The checks of a masked Adam step's indices, all of them before anything is written.
#pragma once

#include <vector>

#include "cpu/adam/adam.h"
#include "cpu/adam/blocks.h"

namespace gradsel {

// Whether all indices are in range, and bitmasks have as many set bits as their tasks have entries; what is wrong with
// the first task of which that is not true. Also finds the first entry of every unit of a bitmask.
AdamFault check_indices(const std::vector<Task>& tasks, std::vector<Unit>& units, int threads);

}  // namespace gradsel
