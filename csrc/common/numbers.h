// Dtype codes and conversions, for the CPU and for GPUs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GRADSEL_INLINE __host__ __device__ __forceinline__
#define GRADSEL_RESTRICT __restrict__
#elif defined(__GNUC__) || defined(__clang__)
#define GRADSEL_INLINE inline __attribute__((always_inline))
#define GRADSEL_RESTRICT __restrict__
#elif defined(_MSC_VER)
#define GRADSEL_INLINE __forceinline
#define GRADSEL_RESTRICT __restrict
#else
#define GRADSEL_INLINE inline
#define GRADSEL_RESTRICT
#endif

namespace gradsel {

// The dtype codes of adam_item.py.
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

template <class To, class From>
GRADSEL_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The 16-bit floats as stored. Conversions are branch-free integer code, so that loops over them vectorise everywhere.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

GRADSEL_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

GRADSEL_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t rebias = 112u << 23;  // 127 - 15
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  // Converting the mantissa, unlike multiplying with a subnormal, is exact even with flush-to-zero.
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bit_cast<float>((magnitude < 0x400u ? subnormal : normal) | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

GRADSEL_INLINE BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

GRADSEL_INLINE Float16 to_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 lines the subnormal mantissa up at the low end of the sum and rounds it to nearest even.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return {static_cast<uint16_t>((magnitude >= 0x47800000u ? large : finite) | ((bits >> 16) & 0x8000u))};
}

// convert<To>(x) converts between any two element types, rounding to nearest even. From 64 to 16 bits it goes through
// float, as in torch.
template <class To>
struct Convert;
template <>
struct Convert<float> {
  GRADSEL_INLINE static float from(float x) { return x; }
  GRADSEL_INLINE static float from(double x) { return static_cast<float>(x); }
  GRADSEL_INLINE static float from(BFloat16 x) { return to_float(x); }
  GRADSEL_INLINE static float from(Float16 x) { return to_float(x); }
};
template <>
struct Convert<double> {
  template <class From>
  GRADSEL_INLINE static double from(From x) {
    return Convert<float>::from(x);
  }
  GRADSEL_INLINE static double from(double x) { return x; }
};
template <>
struct Convert<BFloat16> {
  template <class From>
  GRADSEL_INLINE static BFloat16 from(From x) {
    return to_bfloat16(Convert<float>::from(x));
  }
  GRADSEL_INLINE static BFloat16 from(BFloat16 x) { return x; }
};
template <>
struct Convert<Float16> {
  template <class From>
  GRADSEL_INLINE static Float16 from(From x) {
    return to_float16(Convert<float>::from(x));
  }
  GRADSEL_INLINE static Float16 from(Float16 x) { return x; }
};

template <class To, class From>
GRADSEL_INLINE To convert(From x) {
  return Convert<To>::from(x);
}

}  // namespace gradsel
