// The SIMD level in use, the macros by which code is compiled for several levels, and bit counts.
#pragma once

#include <cstdint>

#include "common/numbers.h"

// Intrinsics behind function-level target attributes, chosen at run time.
#if defined(__GNUC__) && defined(__x86_64__)
#define GRADSEL_X86 1
#include <immintrin.h>
#else
#define GRADSEL_X86 0
#endif

// Auto-vectorised loops are compiled once for each x86-64 level, and the loader picks one. That needs ifunc, hence
// glibc, and GCC 12, the first to know the levels; other compilers build one portable version. The cloned function must
// hold the loop itself: neither an OpenMP region nor a call that is not inlined.
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

inline int lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int at = 0;
  for (; !(bits & 1); bits >>= 1) ++at;
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

}  // namespace gradsel
