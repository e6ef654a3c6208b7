// Addresses come from Python as integers.
#pragma once

#include <cstdint>

namespace gradsel {

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

}  // namespace gradsel
