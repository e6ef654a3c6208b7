// Registers of magnitude keys for select_rows.inc: loads that drop the sign, maxima, and comparisons that yield one bit
// for each lane. count_above() adds one to the lanes of `count` where a > b.
#pragma once

#include "cpu/simd.h"

namespace gradsel {

// Magnitudes of floats order like their bits. The sign bit is cleared, so signed comparisons, which every instruction
// set has, are enough.
template <class Key>
struct KeyTraits;
template <>
struct KeyTraits<int32_t> {
  static constexpr int32_t magnitude = 0x7fffffff;
};
template <>
struct KeyTraits<int16_t> {
  static constexpr int16_t magnitude = 0x7fff;
};
template <>
struct KeyTraits<int64_t> {
  static constexpr int64_t magnitude = 0x7fffffffffffffff;
};

#if GRADSEL_X86
#define GRADSEL_TOPK_AVX512 __attribute__((target("avx512f,avx512bw,bmi,bmi2,popcnt,lzcnt")))
#define GRADSEL_TOPK_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt,lzcnt")))

namespace avx512 {

#define FN GRADSEL_TOPK_AVX512 static GRADSEL_INLINE
template <class Key>
struct KeyRegister;

template <>
struct KeyRegister<int32_t> {
  static constexpr int lanes = 16;
  __m512i v;
  FN KeyRegister load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  FN KeyRegister load_magnitude(const int32_t* p) {
    return {_mm512_and_si512(_mm512_loadu_si512(p), all(0x7fffffff).v)};
  }
  FN KeyRegister all(int32_t x) { return {_mm512_set1_epi32(x)}; }
  FN KeyRegister max(KeyRegister a, KeyRegister b) { return {_mm512_max_epi32(a.v, b.v)}; }
  FN KeyRegister min(KeyRegister a, KeyRegister b) { return {_mm512_min_epi32(a.v, b.v)}; }
  FN KeyRegister sub(KeyRegister a, KeyRegister b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  FN KeyRegister either(KeyRegister a, KeyRegister b) { return {_mm512_or_si512(a.v, b.v)}; }
  FN void store(int32_t* p, KeyRegister a) { _mm512_storeu_si512(p, a.v); }
  FN uint64_t at_least(KeyRegister a, KeyRegister b) { return _mm512_cmpge_epi32_mask(a.v, b.v); }
  FN KeyRegister count_above(KeyRegister count, KeyRegister a, KeyRegister b) {
    return {_mm512_mask_add_epi32(count.v, _mm512_cmpgt_epi32_mask(a.v, b.v), count.v, all(1).v)};
  }
};

template <>
struct KeyRegister<int16_t> {
  static constexpr int lanes = 32;
  __m512i v;
  FN KeyRegister load(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
  FN KeyRegister load_magnitude(const int16_t* p) { return {_mm512_and_si512(_mm512_loadu_si512(p), all(0x7fff).v)}; }
  FN KeyRegister all(int16_t x) { return {_mm512_set1_epi16(x)}; }
  FN KeyRegister max(KeyRegister a, KeyRegister b) { return {_mm512_max_epi16(a.v, b.v)}; }
  FN KeyRegister min(KeyRegister a, KeyRegister b) { return {_mm512_min_epi16(a.v, b.v)}; }
  FN KeyRegister sub(KeyRegister a, KeyRegister b) { return {_mm512_sub_epi16(a.v, b.v)}; }
  FN KeyRegister either(KeyRegister a, KeyRegister b) { return {_mm512_or_si512(a.v, b.v)}; }
  FN void store(int16_t* p, KeyRegister a) { _mm512_storeu_si512(p, a.v); }
  FN uint64_t at_least(KeyRegister a, KeyRegister b) { return _mm512_cmpge_epi16_mask(a.v, b.v); }
  FN KeyRegister count_above(KeyRegister count, KeyRegister a, KeyRegister b) {
    return {_mm512_mask_add_epi16(count.v, _mm512_cmpgt_epi16_mask(a.v, b.v), count.v, all(1).v)};
  }
};

template <>
struct KeyRegister<int64_t> {
  static constexpr int lanes = 8;
  __m512i v;
  FN KeyRegister load(const int64_t* p) { return {_mm512_loadu_si512(p)}; }
  FN KeyRegister load_magnitude(const int64_t* p) {
    return {_mm512_and_si512(_mm512_loadu_si512(p), all(KeyTraits<int64_t>::magnitude).v)};
  }
  FN KeyRegister all(int64_t x) { return {_mm512_set1_epi64(x)}; }
  FN KeyRegister max(KeyRegister a, KeyRegister b) { return {_mm512_max_epi64(a.v, b.v)}; }
  FN KeyRegister min(KeyRegister a, KeyRegister b) { return {_mm512_min_epi64(a.v, b.v)}; }
  FN KeyRegister sub(KeyRegister a, KeyRegister b) { return {_mm512_sub_epi64(a.v, b.v)}; }
  FN KeyRegister either(KeyRegister a, KeyRegister b) { return {_mm512_or_si512(a.v, b.v)}; }
  FN void store(int64_t* p, KeyRegister a) { _mm512_storeu_si512(p, a.v); }
  FN uint64_t at_least(KeyRegister a, KeyRegister b) { return _mm512_cmpge_epi64_mask(a.v, b.v); }
  FN KeyRegister count_above(KeyRegister count, KeyRegister a, KeyRegister b) {
    return {_mm512_mask_add_epi64(count.v, _mm512_cmpgt_epi64_mask(a.v, b.v), count.v, all(1).v)};
  }
};
#undef FN

}  // namespace avx512

namespace avx2 {

#define FN GRADSEL_TOPK_AVX2 static GRADSEL_INLINE
template <class Key>
struct KeyRegister;

// a >= b is "not b > a"; the masks are inverted after the movemask.
template <>
struct KeyRegister<int32_t> {
  static constexpr int lanes = 8;
  __m256i v;
  FN KeyRegister load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  FN KeyRegister load_magnitude(const int32_t* p) { return {_mm256_and_si256(load(p).v, all(0x7fffffff).v)}; }
  FN KeyRegister all(int32_t x) { return {_mm256_set1_epi32(x)}; }
  FN KeyRegister max(KeyRegister a, KeyRegister b) { return {_mm256_max_epi32(a.v, b.v)}; }
  FN KeyRegister min(KeyRegister a, KeyRegister b) { return {_mm256_min_epi32(a.v, b.v)}; }
  FN KeyRegister sub(KeyRegister a, KeyRegister b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  FN KeyRegister either(KeyRegister a, KeyRegister b) { return {_mm256_or_si256(a.v, b.v)}; }
  FN void store(int32_t* p, KeyRegister a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
  FN KeyRegister count_above(KeyRegister count, KeyRegister a, KeyRegister b) {
    return {_mm256_sub_epi32(count.v, _mm256_cmpgt_epi32(a.v, b.v))};
  }
  FN uint64_t at_least(KeyRegister a, KeyRegister b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v)))) ^ 0xffu;
  }
};

template <>
struct KeyRegister<int16_t> {
  static constexpr int lanes = 16;
  __m256i v;
  FN KeyRegister load(const int16_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  FN KeyRegister load_magnitude(const int16_t* p) { return {_mm256_and_si256(load(p).v, all(0x7fff).v)}; }
  FN KeyRegister all(int16_t x) { return {_mm256_set1_epi16(x)}; }
  FN KeyRegister max(KeyRegister a, KeyRegister b) { return {_mm256_max_epi16(a.v, b.v)}; }
  FN KeyRegister min(KeyRegister a, KeyRegister b) { return {_mm256_min_epi16(a.v, b.v)}; }
  FN KeyRegister sub(KeyRegister a, KeyRegister b) { return {_mm256_sub_epi16(a.v, b.v)}; }
  FN KeyRegister either(KeyRegister a, KeyRegister b) { return {_mm256_or_si256(a.v, b.v)}; }
  FN void store(int16_t* p, KeyRegister a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
  FN KeyRegister count_above(KeyRegister count, KeyRegister a, KeyRegister b) {
    return {_mm256_sub_epi16(count.v, _mm256_cmpgt_epi16(a.v, b.v))};
  }
  FN uint64_t at_least(KeyRegister a, KeyRegister b) {
    const unsigned bytes = static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpgt_epi16(b.v, a.v)));
    return _pext_u32(~bytes, 0x55555555u);
  }
};

template <>
struct KeyRegister<int64_t> {
  static constexpr int lanes = 4;
  __m256i v;
  FN KeyRegister load(const int64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  FN KeyRegister load_magnitude(const int64_t* p) {
    return {_mm256_and_si256(load(p).v, all(KeyTraits<int64_t>::magnitude).v)};
  }
  FN KeyRegister all(int64_t x) { return {_mm256_set1_epi64x(x)}; }
  FN KeyRegister max(KeyRegister a, KeyRegister b) {
    return {_mm256_blendv_epi8(a.v, b.v, _mm256_cmpgt_epi64(b.v, a.v))};
  }
  FN KeyRegister min(KeyRegister a, KeyRegister b) {
    return {_mm256_blendv_epi8(a.v, b.v, _mm256_cmpgt_epi64(a.v, b.v))};
  }
  FN KeyRegister sub(KeyRegister a, KeyRegister b) { return {_mm256_sub_epi64(a.v, b.v)}; }
  FN KeyRegister either(KeyRegister a, KeyRegister b) { return {_mm256_or_si256(a.v, b.v)}; }
  FN void store(int64_t* p, KeyRegister a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
  FN KeyRegister count_above(KeyRegister count, KeyRegister a, KeyRegister b) {
    return {_mm256_sub_epi64(count.v, _mm256_cmpgt_epi64(a.v, b.v))};
  }
  FN uint64_t at_least(KeyRegister a, KeyRegister b) {
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(b.v, a.v)))) ^ 0xfu;
  }
};
#undef FN

}  // namespace avx2
#endif  // GRADSEL_X86

}  // namespace gradsel
