// Registers of sums for products.inc: loads that widen, multiply-add, the sums of four registers at once, and
// the transposition of as many registers as one has lanes.
#pragma once

#include <cstring>
#include <utility>

#include "cpu/simd.h"

namespace gradsel {

namespace portable {

// Small arrays that the compiler keeps in whatever vectors its target has.
template <class Sum>
struct SumRegister {
  static constexpr int lanes = 16 / static_cast<int>(sizeof(Sum));
  Sum v[lanes];
  template <class T>
  static GRADSEL_INLINE SumRegister load(const T* p) {
    SumRegister a;
    for (int i = 0; i < lanes; ++i) a.v[i] = convert<Sum>(p[i]);
    return a;
  }
  static GRADSEL_INLINE SumRegister load_first(const Sum* p, int64_t count) {
    SumRegister a{};
    for (int i = 0; i < count; ++i) a.v[i] = p[i];
    return a;
  }
  static GRADSEL_INLINE SumRegister zero() { return {}; }
  static GRADSEL_INLINE void store(Sum* p, SumRegister a) { std::memcpy(p, a.v, sizeof(a.v)); }
  static GRADSEL_INLINE SumRegister add(SumRegister a, SumRegister b) {
    for (int i = 0; i < lanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  static GRADSEL_INLINE SumRegister add_product(SumRegister a, SumRegister b, SumRegister c) {
    for (int i = 0; i < lanes; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static GRADSEL_INLINE void sums(const SumRegister (&a)[4], Sum (&sums)[4]) {
    for (int j = 0; j < 4; ++j) {
      sums[j] = 0;
      for (int i = 0; i < lanes; ++i) sums[j] += a[j].v[i];
    }
  }
  static GRADSEL_INLINE void transpose(SumRegister (&a)[lanes]) {
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < i; ++j) std::swap(a[i].v[j], a[j].v[i]);
  }
};

}  // namespace portable

#if GRADSEL_X86
#define GRADSEL_SUMS_AVX512 __attribute__((target("avx512f,avx512bw,avx2,fma,f16c")))
#define GRADSEL_SUMS_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace avx2 {

#define FN GRADSEL_SUMS_AVX2 static GRADSEL_INLINE
template <class Sum>
struct SumRegister;

template <>
struct SumRegister<float> {
  static constexpr int lanes = 8;
  __m256 v;
  FN SumRegister load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FN SumRegister load(const BFloat16* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_load(p)), 16))};
  }
  FN SumRegister load(const Float16* p) { return {_mm256_cvtph_ps(half_load(p))}; }
  FN __m128i half_load(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  FN SumRegister load_first(const float* p, int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane))};
  }
  FN SumRegister zero() { return {_mm256_setzero_ps()}; }
  FN void store(float* p, SumRegister a) { _mm256_storeu_ps(p, a.v); }
  FN SumRegister add(SumRegister a, SumRegister b) { return {_mm256_add_ps(a.v, b.v)}; }
  FN SumRegister add_product(SumRegister a, SumRegister b, SumRegister c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  FN void sums(const SumRegister (&a)[4], float (&sums)[4]) {
    const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
  }
  FN void transpose(SumRegister (&a)[8]) {
    __m256 b[8], c[8];
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i].v, a[i + 1].v);
      b[i + 1] = _mm256_unpackhi_ps(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
      c[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      c[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      c[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      c[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      a[i].v = _mm256_permute2f128_ps(c[i], c[i + 4], 0x20);
      a[i + 4].v = _mm256_permute2f128_ps(c[i], c[i + 4], 0x31);
    }
  }
};

template <>
struct SumRegister<double> {
  static constexpr int lanes = 4;
  __m256d v;
  FN SumRegister load(const double* p) { return {_mm256_loadu_pd(p)}; }
  FN SumRegister load_first(const double* p, int64_t count) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return {_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lane))};
  }
  FN SumRegister zero() { return {_mm256_setzero_pd()}; }
  FN void store(double* p, SumRegister a) { _mm256_storeu_pd(p, a.v); }
  FN SumRegister add(SumRegister a, SumRegister b) { return {_mm256_add_pd(a.v, b.v)}; }
  FN SumRegister add_product(SumRegister a, SumRegister b, SumRegister c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  FN void sums(const SumRegister (&a)[4], double (&sums)[4]) {
    const __m256d low = _mm256_hadd_pd(a[0].v, a[1].v), high = _mm256_hadd_pd(a[2].v, a[3].v);
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20),
                                         _mm256_permute2f128_pd(low, high, 0x31)));
  }
  FN void transpose(SumRegister (&a)[4]) {
    __m256d b[4];
    for (int i = 0; i < 4; i += 2) {
      b[i] = _mm256_unpacklo_pd(a[i].v, a[i + 1].v);
      b[i + 1] = _mm256_unpackhi_pd(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 2; ++i) {
      a[i].v = _mm256_permute2f128_pd(b[i], b[i + 2], 0x20);
      a[i + 2].v = _mm256_permute2f128_pd(b[i], b[i + 2], 0x31);
    }
  }
};
#undef FN

}  // namespace avx2

namespace avx512 {

#define FN GRADSEL_SUMS_AVX512 static GRADSEL_INLINE
template <class Sum>
struct SumRegister;

// Interleaving register i with register i + lanes / 2, for all i, moves the top bit of a register's number to the
// bottom of the lane's; after log2(lanes) rounds rows are columns.
template <class R>
FN void transpose_by_interleaving(R (&a)[R::lanes]) {
  R b[R::lanes];
#pragma GCC unroll 4
  for (int round = 1; round < R::lanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < R::lanes / 2; ++i) {
      b[2 * i] = R::interleave_low(a[i], a[i + R::lanes / 2]);
      b[2 * i + 1] = R::interleave_high(a[i], a[i + R::lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R::lanes; ++i) a[i] = b[i];
  }
}

template <>
struct SumRegister<float> {
  static constexpr int lanes = 16;
  __m512 v;
  FN SumRegister load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FN SumRegister load(const BFloat16* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_load(p)), 16))};
  }
  FN SumRegister load(const Float16* p) { return {_mm512_cvtph_ps(half_load(p))}; }
  FN __m256i half_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  FN SumRegister load_first(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p)};
  }
  FN SumRegister zero() { return {_mm512_setzero_ps()}; }
  FN void store(float* p, SumRegister a) { _mm512_storeu_ps(p, a.v); }
  FN SumRegister add(SumRegister a, SumRegister b) { return {_mm512_add_ps(a.v, b.v)}; }
  FN SumRegister add_product(SumRegister a, SumRegister b, SumRegister c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  FN void sums(const SumRegister (&a)[4], float (&sums)[4]) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m512 t = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0x0e));
    _mm_storeu_ps(sums, _mm_add_ps(_mm512_castps512_ps128(t), _mm512_extractf32x4_ps(t, 1)));
  }
  FN SumRegister interleave_low(SumRegister a, SumRegister b) {
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(a.v, from, b.v)};
  }
  FN SumRegister interleave_high(SumRegister a, SumRegister b) {
    const __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return {_mm512_permutex2var_ps(a.v, from, b.v)};
  }
  FN void transpose(SumRegister (&a)[16]) { transpose_by_interleaving(a); }
};

template <>
struct SumRegister<double> {
  static constexpr int lanes = 8;
  __m512d v;
  FN SumRegister load(const double* p) { return {_mm512_loadu_pd(p)}; }
  FN SumRegister load_first(const double* p, int64_t count) {
    return {_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p)};
  }
  FN SumRegister zero() { return {_mm512_setzero_pd()}; }
  FN void store(double* p, SumRegister a) { _mm512_storeu_pd(p, a.v); }
  FN SumRegister add(SumRegister a, SumRegister b) { return {_mm512_add_pd(a.v, b.v)}; }
  FN SumRegister add_product(SumRegister a, SumRegister b, SumRegister c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  FN void sums(const SumRegister (&a)[4], double (&sums)[4]) {
    for (int j = 0; j < 4; j += 2) {
      const __m512d low = _mm512_unpacklo_pd(a[j].v, a[j + 1].v), high = _mm512_unpackhi_pd(a[j].v, a[j + 1].v);
      const __m512d s = _mm512_add_pd(low, high);
      const __m256d t = _mm256_add_pd(_mm512_castpd512_pd256(s), _mm512_extractf64x4_pd(s, 1));
      _mm_storeu_pd(sums + j, _mm_add_pd(_mm256_castpd256_pd128(t), _mm256_extractf128_pd(t, 1)));
    }
  }
  FN SumRegister interleave_low(SumRegister a, SumRegister b) {
    return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b.v)};
  }
  FN SumRegister interleave_high(SumRegister a, SumRegister b) {
    return {_mm512_permutex2var_pd(a.v, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b.v)};
  }
  FN void transpose(SumRegister (&a)[8]) { transpose_by_interleaving(a); }
};
#undef FN

}  // namespace avx512
#endif  // GRADSEL_X86

}  // namespace gradsel
