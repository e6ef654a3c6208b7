#include "cpu/adam/runs.h"

#include "cpu/simd.h"

namespace gradsel {
namespace {

template <class T, class Stored>
GRADSEL_INLINE void load_loop(T* GRADSEL_RESTRICT to, const void* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(static_cast<const Stored*>(from)[i]);
}

template <class T>
GRADSEL_INLINE void load_run(T* to, int64_t dtype, const void* from, int64_t count) {
  switch (dtype) {
    case kBFloat16: return load_loop<T, BFloat16>(to, from, count);
    case kFloat16: return load_loop<T, Float16>(to, from, count);
    case kFloat64: return load_loop<T, double>(to, from, count);
    default: return load_loop<T, float>(to, from, count);
  }
}

template <class T, class Stored>
GRADSEL_INLINE void store_loop(void* to, const T* GRADSEL_RESTRICT from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<Stored*>(to)[i] = convert<Stored>(from[i]);
}

template <class T>
GRADSEL_INLINE void store_run(int64_t dtype, void* to, const T* from, int64_t count) {
  switch (dtype) {
    case kBFloat16: return store_loop<T, BFloat16>(to, from, count);
    case kFloat16: return store_loop<T, Float16>(to, from, count);
    case kFloat64: return store_loop<T, double>(to, from, count);
    default: return store_loop<T, float>(to, from, count);
  }
}

}  // namespace

GRADSEL_CLONES void load_contiguous(float* to, int64_t dtype, const void* from, int64_t count) {
  load_run(to, dtype, from, count);
}
GRADSEL_CLONES void load_contiguous(double* to, int64_t dtype, const void* from, int64_t count) {
  load_run(to, dtype, from, count);
}
GRADSEL_CLONES void store_contiguous(int64_t dtype, void* to, const float* from, int64_t count) {
  store_run(dtype, to, from, count);
}
GRADSEL_CLONES void store_contiguous(int64_t dtype, void* to, const double* from, int64_t count) {
  store_run(dtype, to, from, count);
}
GRADSEL_CLONES void adam_run(float* p, const float* g, float* m, float* v, float* vmax, int64_t count,
                             const AdamScalars<float>& s) {
  adam_math(p, g, m, v, vmax, count, s);
}
GRADSEL_CLONES void adam_run(double* p, const double* g, double* m, double* v, double* vmax, int64_t count,
                             const AdamScalars<double>& s) {
  adam_math(p, g, m, v, vmax, count, s);
}
GRADSEL_CLONES AdamScalars<float> anchor_run(float* p, const float* g, float* pulled, const float* original,
                                             int64_t count, const AdamScalars<float>& s) {
  return anchor_math(p, g, pulled, original, count, s);
}
GRADSEL_CLONES AdamScalars<double> anchor_run(double* p, const double* g, double* pulled, const double* original,
                                              int64_t count, const AdamScalars<double>& s) {
  return anchor_math(p, g, pulled, original, count, s);
}

GRADSEL_CLONES void unscale_run(const float* g, float* scaled, int64_t count, float scale) {
  unscale_loop(g, scaled, count, scale);
}
GRADSEL_CLONES void unscale_run(const double* g, double* scaled, int64_t count, double scale) {
  unscale_loop(g, scaled, count, scale);
}
GRADSEL_CLONES void round_stochastically(float* p, int64_t dtype, int64_t entry, int64_t count, RandomKeys keys) {
  if (dtype == kBFloat16)
    stochastic_loop<stochastic_bfloat16>(p, entry, count, keys);
  else
    stochastic_loop<stochastic_float16>(p, entry, count, keys);
}
GRADSEL_CLONES void add_run(float* GRADSEL_RESTRICT p, const float* GRADSEL_RESTRICT term, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] += term[i];
}
GRADSEL_CLONES void split_compensated(float* p, int64_t dtype, void* compensation, int64_t count) {
  if (dtype == kBFloat16)
    compensated_loop<BFloat16>(p, compensation, count);
  else
    compensated_loop<Float16>(p, compensation, count);
}

}  // namespace gradsel
