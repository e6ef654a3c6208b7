// The checks of a masked Adam step's indices, all of them before anything is written.
#pragma once

#include <vector>

#include "cpu/adam/adam.h"
#include "cpu/adam/blocks.h"

namespace gradsel {

// Whether all indices are in range; otherwise what is wrong with the first task of which that is not true.
AdamFault check_indices(const std::vector<Task>& tasks, const std::vector<Unit>& units, int threads);

}  // namespace gradsel
