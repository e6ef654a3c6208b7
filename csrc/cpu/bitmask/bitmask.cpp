#include "cpu/bitmask/bitmask.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/strided.h"

namespace gradsel {
namespace {

constexpr int64_t kChunk = 64;  // bytes of a mask taken at once: two words

GRADSEL_INLINE uint64_t chunk_to_bits(const uint8_t* mask) {
  uint64_t bits = 0;
  for (int byte = 0; byte < 8; ++byte) {
    uint8_t packed = 0;
    for (int j = 0; j < 8; ++j) packed = static_cast<uint8_t>(packed | (mask[8 * byte + j] != 0) << j);
    bits |= static_cast<uint64_t>(packed) << (8 * byte);
  }
  return bits;
}

// `store` must not write past the row's last word, `load` must not read past its last byte: a row may end a buffer.
GRADSEL_INLINE void store_words(uint32_t* words, uint64_t bits, int64_t columns) {
  words[0] = static_cast<uint32_t>(bits);
  if (columns > 32) words[1] = static_cast<uint32_t>(bits >> 32);
}

GRADSEL_INLINE uint64_t load_words(const uint32_t* words, int64_t columns) {
  return words[0] | (columns > 32 ? static_cast<uint64_t>(words[1]) << 32 : 0);
}

using PackRow = void (*)(const uint8_t* mask, int64_t cols, uint32_t* words);
using UnpackRow = void (*)(const uint32_t* words, int64_t cols, uint8_t* mask);

void pack_row_portable(const uint8_t* mask, int64_t cols, uint32_t* words) {
  int64_t c = 0;
  for (; c + kChunk <= cols; c += kChunk) store_words(words + c / 32, chunk_to_bits(mask + c), kChunk);
  if (c < cols) {
    uint8_t tail[kChunk] = {};
    std::memcpy(tail, mask + c, static_cast<size_t>(cols - c));
    store_words(words + c / 32, chunk_to_bits(tail), cols - c);
  }
}

GRADSEL_CLONES void unpack_row_portable(const uint32_t* words, int64_t cols, uint8_t* mask) {
  for (int64_t c = 0; c < cols; c += 32) {
    const uint32_t word = words[c / 32];
    const int count = static_cast<int>(std::min<int64_t>(32, cols - c));
    for (int j = 0; j < count; ++j) mask[c + j] = static_cast<uint8_t>((word >> j) & 1u);
  }
}

#if GRADSEL_X86
#define GRADSEL_AVX512 __attribute__((target("avx512f,avx512bw,bmi,bmi2")))
#define GRADSEL_AVX2 __attribute__((target("avx2,bmi,bmi2")))

GRADSEL_AVX512 void pack_row_avx512(const uint8_t* mask, int64_t cols, uint32_t* words) {
  int64_t c = 0;
  for (; c + kChunk <= cols; c += kChunk) {
    const __m512i x = _mm512_loadu_si512(mask + c);
    store_words(words + c / 32, _mm512_test_epi8_mask(x, x), kChunk);
  }
  if (c < cols) {
    const __m512i x = _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, static_cast<unsigned>(cols - c)), mask + c);
    store_words(words + c / 32, _mm512_test_epi8_mask(x, x), cols - c);
  }
}

GRADSEL_AVX512 void unpack_row_avx512(const uint32_t* words, int64_t cols, uint8_t* mask) {
  const __m512i one = _mm512_set1_epi8(1);
  int64_t c = 0;
  for (; c + kChunk <= cols; c += kChunk)
    _mm512_storeu_si512(mask + c, _mm512_maskz_mov_epi8(load_words(words + c / 32, kChunk), one));
  if (c < cols)
    _mm512_mask_storeu_epi8(mask + c, _bzhi_u64(~0ull, static_cast<unsigned>(cols - c)),
                            _mm512_maskz_mov_epi8(load_words(words + c / 32, cols - c), one));
}

GRADSEL_AVX2 void pack_row_avx2(const uint8_t* mask, int64_t cols, uint32_t* words) {
  const __m256i zero = _mm256_setzero_si256();
  int64_t c = 0;
  for (; c + 32 <= cols; c += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + c));
    words[c / 32] = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, zero)));
  }
  if (c < cols) pack_row_portable(mask + c, cols - c, words + c / 32);
}

GRADSEL_AVX2 void unpack_row_avx2(const uint32_t* words, int64_t cols, uint8_t* mask) {
  // Byte j of the register takes byte j / 8 of the word, then keeps bit j % 8 of it.
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                          3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ull));
  const __m256i one = _mm256_set1_epi8(1);
  int64_t c = 0;
  for (; c + 32 <= cols; c += 32) {
    const __m256i word = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(words[c / 32])), spread);
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(word, bit), bit);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + c), _mm256_and_si256(set, one));
  }
  if (c < cols) unpack_row_portable(words + c / 32, cols - c, mask + c);
}
#endif

PackRow pack_row_for(Simd level) {
#if GRADSEL_X86
  if (level == Simd::kAvx512) return &pack_row_avx512;
  if (level == Simd::kAvx2) return &pack_row_avx2;
#endif
  (void)level;
  return &pack_row_portable;
}

UnpackRow unpack_row_for(Simd level) {
#if GRADSEL_X86
  if (level == Simd::kAvx512) return &unpack_row_avx512;
  if (level == Simd::kAvx2) return &unpack_row_avx2;
#endif
  (void)level;
  return &unpack_row_portable;
}

}  // namespace

void pack_bits(const uint8_t* mask, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, uint32_t* bits,
               int threads) {
  if (rows == 0 || cols == 0) return;
  const int64_t words = (cols + 31) / 32;
  const PackRow pack_row = pack_row_for(simd());
  threads = threads_for(rows * cols / 4, threads);
  if (col_stride == 1 || cols == 1) {
    parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) pack_row(mask + r * row_stride, cols, bits + r * words);
    });
    return;
  }
  // Other strides: squares of 64 x 64 bytes, a cache line in either direction, made contiguous first.
  parallel_ranges((rows + kChunk - 1) / kChunk, threads, [&](int64_t begin, int64_t end, int) {
    uint8_t square[kChunk * kChunk];
    for (int64_t r = begin * kChunk; r < std::min(end * kChunk, rows); r += kChunk) {
      const int64_t height = std::min(kChunk, rows - r);
      for (int64_t c = 0; c < cols; c += kChunk) {
        const int64_t width = std::min(kChunk, cols - c);
        pack_block(mask + r * row_stride + c * col_stride, row_stride, col_stride, height, width, square, kChunk);
        for (int64_t i = 0; i < height; ++i) pack_row(square + i * kChunk, width, bits + (r + i) * words + c / 32);
      }
    }
  });
}

void unpack_bits(const uint32_t* bits, int64_t rows, int64_t cols, uint8_t* mask, int threads) {
  if (rows == 0 || cols == 0) return;
  const int64_t words = (cols + 31) / 32;
  const UnpackRow unpack_row = unpack_row_for(simd());
  parallel_ranges(rows, threads_for(rows * cols / 4, threads), [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) unpack_row(bits + r * words, cols, mask + r * cols);
  });
}

}  // namespace gradsel
