// Sharing work among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gradsel {

// Below this many elements to visit, waking the other threads costs more than they save.
constexpr int64_t kSerialElements = 32768;

inline int threads_for(int64_t elements, int threads) { return elements < kSerialElements ? 1 : std::max(threads, 1); }

// Calls body(begin, end, thread) on contiguous ranges of 0 .. count - 1, one for each thread. body must not throw.
template <class Body>
void parallel_ranges(int64_t count, int threads, const Body& body) {
  if (count <= 0) return;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), count));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
      // Split so that nothing overflows for any count.
      const int64_t share = count / team, rest = count % team;
      const int64_t begin = thread * share + std::min(thread, rest);
      body(begin, begin + share + (thread < rest ? 1 : 0), static_cast<int>(thread));
    }
    return;
  }
#endif
  body(0, count, 0);
}

}  // namespace gradsel
