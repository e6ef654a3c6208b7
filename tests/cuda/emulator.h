// Runs kernels compiled with emulation.h on the CPU, behind the interface of csrc/cuda/launch.h.
//
// Blocks run one after the other, and so do the threads of a block: each is a fiber that runs until it must wait for
// others. A schedule says which goes on first, so that a missing barrier shows as a result that depends on it. What
// is undefined on a GPU, as far as it can be seen, is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace emulation {

struct Kernel {
  const char* name;
  void (*call)(void** params);
};
extern const Kernel kernels[];  // the last has no name

template <class... Args, size_t... i>
void call_with(void (*kernel)(Args...), void** params, std::index_sequence<i...>) {
  kernel(*static_cast<Args*>(params[i])...);
}
template <class... Args>
void call(void (*kernel)(Args...), void** params) {
  call_with(kernel, params, std::index_sequence_for<Args...>());
}

// Of blocks, and of the threads of a block that could go on. kRandom: another order at every rendezvous.
enum class Schedule { kInOrder = 0, kReversed = 1, kRandom = 2 };
void set_schedule(Schedule schedule, uint64_t seed);
void set_multiprocessors(int count);

// Writable memory that ends right before an unreadable page, and begins after one.
void* guarded(size_t bytes);
void release(void* memory);

}  // namespace emulation
