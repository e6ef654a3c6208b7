// What the kernels for the CPU share: run-time SIMD choice, the thread helper, strided copies, ranges of indices.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "numbers.h"

#ifdef _OPENMP
#include <omp.h>
#endif

// Intrinsics behind function-level target attributes, chosen at run time.
#if defined(__GNUC__) && defined(__x86_64__)
#define GRADSEL_X86 1
#include <immintrin.h>
#else
#define GRADSEL_X86 0
#endif

// Auto-vectorised loops compiled once for each x86-64 level; the loader picks. Needs ifunc, so glibc, and GCC 12, the
// first that knows the levels; other compilers build one portable version. The
// cloned function must hold the loop itself: neither an OpenMP region nor a call that is not inlined.
#if GRADSEL_X86 && !defined(__clang__) && defined(__linux__) && defined(__GLIBC__) && __GNUC__ >= 12
#define GRADSEL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GRADSEL_CLONES
#endif

namespace gradsel {

enum class Simd : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The level in use: what the processor has, or less after limit_simd().
Simd simd();
void limit_simd(Simd most);
const char* simd_name(Simd level);

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

inline int lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int at = 0;
  while (!(bits & 1)) bits >>= 1, ++at;
  return at;
#endif
}

GRADSEL_INLINE int popcount(uint64_t x) {
#if defined(__GNUC__)
  return __builtin_popcountll(x);
#else
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  return static_cast<int>((((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
#endif
}

// Copies a [rows, cols] view with any strides into dst, one row every `pitch` elements. The loop order follows the
// smaller stride, so that each cache line of the source is used whole while it is at hand.
template <class T>
void pack_block(const T* src, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, T* dst,
                int64_t pitch) {
  if (col_stride <= row_stride || rows == 1) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) dst[r * pitch + c] = src[r * row_stride + c * col_stride];
    return;
  }
  constexpr int64_t kTile = 16;  // columns: the destination lines a tile writes stay in the first-level cache
  for (int64_t c0 = 0; c0 < cols; c0 += kTile) {
    const int64_t c1 = std::min(c0 + kTile, cols);
    for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
      const int64_t r1 = std::min(r0 + kTile, rows);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = r0; r < r1; ++r) dst[r * pitch + c] = src[r * row_stride + c * col_stride];
    }
  }
}

// Smallest and largest element of an index array; {max, min} of the type when it is empty.
struct Range {
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
};
Range range_of(const int32_t* index, int64_t count);
Range range_of(const int64_t* index, int64_t count);
// Whether all indices lie in 0 .. end - 1. One unsigned comparison covers both ends.
bool all_below(const int32_t* index, int64_t count, int64_t end);
bool all_below(const int64_t* index, int64_t count, int64_t end);

}  // namespace gradsel
