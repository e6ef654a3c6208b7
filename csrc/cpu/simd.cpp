// Which SIMD level the hand-written kernels use. For auto-vectorised loops the loader chooses (GRADSEL_CLONES).
#include "cpu/simd.h"

#include <algorithm>
#include <atomic>

namespace gradsel {
namespace {

Simd supported() {
#if GRADSEL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("bmi2"))
    return Simd::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return Simd::kAvx2;
#endif
  return Simd::kPortable;
}

std::atomic<int> limit{static_cast<int>(Simd::kAvx512)};

}  // namespace

Simd simd() {
  static const int best = static_cast<int>(supported());
  return static_cast<Simd>(std::min(best, limit.load(std::memory_order_relaxed)));
}

void limit_simd(Simd most) { limit = static_cast<int>(most); }

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::kAvx512: return "avx512";
    case Simd::kAvx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace gradsel
