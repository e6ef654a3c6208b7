// Row-wise top-K of magnitudes: dtype and SIMD dispatch, threads, and rows whose columns are not contiguous.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header trips them (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/topk/topk.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/topk/registers.h"

#define TOPK_LEVEL portable
#define TOPK_TARGET
#define TOPK_REGISTERS 0
#include "cpu/topk/select_rows.inc"

#if GRADSEL_X86
#define TOPK_LEVEL avx2
#define TOPK_TARGET GRADSEL_TOPK_AVX2
#define TOPK_REGISTERS 1
#include "cpu/topk/select_rows.inc"

#define TOPK_LEVEL avx512
#define TOPK_TARGET GRADSEL_TOPK_AVX512
#define TOPK_REGISTERS 1
#include "cpu/topk/select_rows.inc"
#endif

namespace gradsel {
namespace {

template <class Key>
using SelectRows = void (*)(const Key*, int64_t, int64_t, int64_t, int64_t, Key, int32_t*, uint32_t*);

template <class Key>
SelectRows<Key> select_rows_for(Simd level) {
#if GRADSEL_X86
  if (level == Simd::kAvx512) return &avx512::select_rows<Key>;
  if (level == Simd::kAvx2) return &avx2::select_rows<Key>;
#endif
  (void)level;
  return &portable::select_rows<Key>;
}

constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kPackBytes = 256 * 1024;  // of rows made contiguous at once: well inside a second-level cache

template <class Key>
void select(const Key* grad, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride, int64_t k, Key nan,
            int32_t* cols, uint32_t* bits, int threads) {
  const SelectRows<Key> select_rows = select_rows_for<Key>(simd());
  const int64_t words = (n + 31) / 32;
  threads = threads_for(rows * n, threads);
  const auto bits_of = [&](int64_t r) { return bits ? bits + r * words : nullptr; };
  if (col_stride == 1 || n == 1) {
    parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int) {
      select_rows(grad + begin * row_stride, row_stride, end - begin, n, k, nan, cols + begin * k, bits_of(begin));
    });
    return;
  }
  // At least a cache line of rows, because in a transposed view a line holds neighbouring rows. The odd number of
  // lines in the pitch keeps the rows of a block out of one another's cache sets.
  constexpr int64_t kLineRows = kLine / static_cast<int64_t>(sizeof(Key));
  const int64_t pitch = (n / kLineRows | 1) * kLineRows + 2 * kLineRows;
  const int64_t fit = kPackBytes / (pitch * static_cast<int64_t>(sizeof(Key))) / kLineRows * kLineRows;
  const int64_t height = std::min({std::max(fit, kLineRows), 4 * kLineRows, rows});
  const int64_t blocks = (rows + height - 1) / height;
  threads = static_cast<int>(std::min<int64_t>(threads, blocks));
  const std::unique_ptr<Key[]> packed(new Key[static_cast<size_t>(threads * height * pitch)]);
  parallel_ranges(blocks, threads, [&](int64_t begin, int64_t end, int thread) {
    Key* own = packed.get() + thread * height * pitch;
    for (int64_t r = begin * height; r < std::min(end * height, rows); r += height) {
      const int64_t count = std::min(height, rows - r);
      pack_block(grad + r * row_stride, row_stride, col_stride, count, n, own, pitch);
      select_rows(own, pitch, count, n, k, nan, cols + r * k, bits_of(r));
    }
  });
}

}  // namespace

void topk_rows(const void* grad, Dtype dtype, int64_t rows, int64_t n, int64_t row_stride, int64_t col_stride,
               int64_t k, int32_t* cols, uint32_t* bits, int threads) {
  if (rows == 0 || n == 0) return;
  const auto run = [&](auto nan) {
    using Key = decltype(nan);
    select(static_cast<const Key*>(grad), rows, n, row_stride, col_stride, k, nan, cols, bits, threads);
  };
  switch (dtype) {  // one above the bits of infinity
    case kFloat32: return run(int32_t{0x7f800001});
    case kBFloat16: return run(int16_t{0x7f81});
    case kFloat16: return run(int16_t{0x7c01});
    case kFloat64: return run(int64_t{0x7ff0000000000001});
  }
}

}  // namespace gradsel
