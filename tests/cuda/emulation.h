// CUDA C++ for g++: what device code may use, for kernels that emulator.cpp runs on the CPU. Only what CUDA has for the
// same types is here, so that what compiles here is likely to compile with nvcc. Included before everything else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ __inline__
#define __noinline__  // nothing, because libstdc++ has it inside __attribute__((...))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ _Pragma("GCC error \"only dynamic shared memory is emulated\"")

namespace emulation {

// As the sanitizers of GCC and Clang lay it out.
struct Site {
  const char* file;
  uint32_t line, column;
};

enum class Op { kSync, kVote, kShuffle, kAdd, kMin, kMax };

// Both wait for the other threads. What has another name, or another mask, never meets.
uint64_t meet_warp(Op op, const char* name, unsigned mask, uint64_t value, unsigned source, Site here);
unsigned meet_block(const char* name, bool predicate, Site here);

// Ends the launch with an error that names kernel, block, thread and site.
[[noreturn]] void fail(Site here, const char* format, ...) __attribute__((format(printf, 2, 3)));

template <class T, class... Allowed>
constexpr bool kOneOf = (std::is_same_v<T, Allowed> || ...);
template <class T>
using Same = std::common_type_t<T>;  // takes no part in deducing T

}  // namespace emulation

unsigned char* emulated_shared_memory();  // 16-byte aligned

// Vectors. Their alignment matters: the kernels are compiled with a check of every access.
#define EMULATED_VECTOR2(V, T)                 \
  struct alignas(2 * sizeof(T)) V {            \
    T x, y;                                    \
  };                                           \
  inline V make_##V(T x, T y) { return {x, y}; }
#define EMULATED_VECTOR4(V, T)                                         \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) V {          \
    T x, y, z, w;                                                      \
  };                                                                   \
  inline V make_##V(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR2(uchar2, unsigned char)
EMULATED_VECTOR2(ushort2, unsigned short)
EMULATED_VECTOR2(int2, int)
EMULATED_VECTOR2(uint2, unsigned)
EMULATED_VECTOR2(float2, float)
EMULATED_VECTOR2(double2, double)
EMULATED_VECTOR2(longlong2, long long)
EMULATED_VECTOR2(ulonglong2, unsigned long long)
EMULATED_VECTOR4(uchar4, unsigned char)
EMULATED_VECTOR4(ushort4, unsigned short)
EMULATED_VECTOR4(int4, int)
EMULATED_VECTOR4(uint4, unsigned)
EMULATED_VECTOR4(float4, float)

struct uint3 {
  unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

// Rendezvous. The default argument is the caller's place in its file.
#define HERE emulation::Site here = {__builtin_FILE(), static_cast<uint32_t>(__builtin_LINE()), 0}

inline void __syncthreads(HERE) { emulation::meet_block("__syncthreads", false, here); }
inline int __syncthreads_count(int p, HERE) { return emulation::meet_block("__syncthreads_count", p != 0, here); }
inline int __syncthreads_or(int p, HERE) { return emulation::meet_block("__syncthreads_or", p != 0, here) != 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu, HERE) {
  emulation::meet_warp(emulation::Op::kSync, "__syncwarp", mask, 0, 0, here);
}
inline unsigned __ballot_sync(unsigned mask, int p, HERE) {
  return emulation::meet_warp(emulation::Op::kVote, "__ballot_sync", mask, p != 0, 0, here);
}
inline int __any_sync(unsigned mask, int p, HERE) {
  return emulation::meet_warp(emulation::Op::kVote, "__any_sync", mask, p != 0, 0, here) != 0;
}
inline int __all_sync(unsigned mask, int p, HERE) {
  return emulation::meet_warp(emulation::Op::kVote, "__all_sync", mask, p != 0, 0, here) == mask;
}

namespace emulation {

template <class T>
T shuffle(const char* name, const char* name_of_8, unsigned mask, T value, unsigned source, Site here) {
  static_assert(kOneOf<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(Op::kShuffle, sizeof(T) == 8 ? name_of_8 : name, mask, bits, source, here);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T reduce(Op op, const char* name, const char* name_of_int, unsigned mask, T value, Site here) {
  static_assert(kOneOf<T, int, unsigned>);
  // Widened, so that one comparison of 64-bit integers serves both signs.
  const auto wide = static_cast<uint64_t>(static_cast<int64_t>(value));
  return static_cast<T>(meet_warp(op, std::is_signed_v<T> ? name_of_int : name, mask, wide, 0, here));
}

// The first lane of this one's segment of `width` lanes.
inline unsigned segment(int width, Site here) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail(here, "a shuffle's width is %d", width);
  return threadIdx.x % 32 & -static_cast<unsigned>(width);
}

}  // namespace emulation

// Offsets count modulo 32; a lane whose source is in another segment keeps its own value.
#define EMULATED_SHUFFLE(name, Lane, expression)                                         \
  template <class T>                                                                     \
  T name(unsigned mask, T value, Lane offset, int width = 32, HERE) {                    \
    [[maybe_unused]] const unsigned lane = threadIdx.x % 32;                             \
    const unsigned first = emulation::segment(width, here), by = offset & 31;            \
    [[maybe_unused]] const unsigned last = first + static_cast<unsigned>(width) - 1;     \
    return emulation::shuffle(#name, #name " of 8 bytes", mask, value, expression, here); \
  }
EMULATED_SHUFFLE(__shfl_sync, int, first | (by & (last - first)))
EMULATED_SHUFFLE(__shfl_up_sync, unsigned, lane >= first + by ? lane - by : lane)
EMULATED_SHUFFLE(__shfl_down_sync, unsigned, lane + by <= last ? lane + by : lane)
EMULATED_SHUFFLE(__shfl_xor_sync, int, (lane ^ by) <= last ? lane ^ by : lane)

#define EMULATED_REDUCE(name, op)                                                                         \
  template <class T>                                                                                      \
  T name(unsigned mask, T value, HERE) {                                                                  \
    return emulation::reduce(emulation::Op::op, #name " of unsigned", #name " of int", mask, value, here); \
  }
EMULATED_REDUCE(__reduce_add_sync, kAdd)
EMULATED_REDUCE(__reduce_min_sync, kMin)
EMULATED_REDUCE(__reduce_max_sync, kMax)
#undef HERE

inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }

// Atomics: only one thread runs at a time.
#define EMULATED_ATOMIC(name, expression, ...)                   \
  template <class T>                                             \
  T name(T* address, emulation::Same<T> value) {                 \
    static_assert(emulation::kOneOf<T, int, unsigned, ##__VA_ARGS__>); \
    const T old = *address;                                      \
    *address = expression;                                       \
    return old;                                                  \
  }
EMULATED_ATOMIC(atomicAdd, old + value, unsigned long long)
EMULATED_ATOMIC(atomicOr, old | value)
EMULATED_ATOMIC(atomicAnd, old & value)
EMULATED_ATOMIC(atomicMax, old < value ? value : old)
EMULATED_ATOMIC(atomicMin, value < old ? value : old)
EMULATED_ATOMIC(atomicExch, value)
template <class T>
T atomicCAS(T* address, emulation::Same<T> expected, emulation::Same<T> value) {
  static_assert(emulation::kOneOf<T, int, unsigned>);
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// clang-format off
template <class T> T __ldg(const T* address) { return *address; }
template <class T> T __ldcs(const T* address) { return *address; }
template <class T> T __ldcg(const T* address) { return *address; }
template <class T> void __stwb(T* address, emulation::Same<T> value) { *address = value; }
template <class T> void __stcs(T* address, emulation::Same<T> value) { *address = value; }
template <class T> void __stcg(T* address, emulation::Same<T> value) { *address = value; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}

// Exactly rounded, as the build has neither contraction nor fast-math.
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __dsqrt_rn(double x) { return __builtin_sqrt(x); }

#define EMULATED_BITS(name, To, From) \
  inline To name(From from) { To to; std::memcpy(&to, &from, sizeof(to)); return to; }
EMULATED_BITS(__double_as_longlong, long long, double)
EMULATED_BITS(__longlong_as_double, double, long long)
EMULATED_BITS(__float_as_uint, unsigned, float)
EMULATED_BITS(__uint_as_float, float, unsigned)
EMULATED_BITS(__float_as_int, int, float)
EMULATED_BITS(__int_as_float, float, int)

// The overloads of CUDA, so that a call that is ambiguous there is so here.
#define EMULATED_MIN_MAX(A, B, C)                                                     \
  inline C min(A a, B b) { return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b); } \
  inline C max(A a, B b) { return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a); }
#define EMULATED_MIN_MAX_OF(T)                    \
  EMULATED_MIN_MAX(T, T, T)                       \
  EMULATED_MIN_MAX(unsigned T, T, unsigned T)     \
  EMULATED_MIN_MAX(T, unsigned T, unsigned T)     \
  EMULATED_MIN_MAX(unsigned T, unsigned T, unsigned T)
EMULATED_MIN_MAX_OF(int)
EMULATED_MIN_MAX_OF(long)
EMULATED_MIN_MAX_OF(long long)
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
// clang-format on
