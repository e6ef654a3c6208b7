// What is done to one run of entries: reading and writing it in any dtype, and the arithmetic of common/adam_math.h.
// Every function is compiled once for each SIMD level.
#pragma once

#include <cstdint>

#include "common/adam_math.h"

namespace gradsel {

inline int64_t size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

void load_contiguous(float* to, int64_t dtype, const void* from, int64_t count);
void load_contiguous(double* to, int64_t dtype, const void* from, int64_t count);
void store_contiguous(int64_t dtype, void* to, const float* from, int64_t count);
void store_contiguous(int64_t dtype, void* to, const double* from, int64_t count);

// These three are adam_math(), anchor_math() and unscale_loop().
void adam_run(float* p, const float* g, float* m, float* v, float* vmax, int64_t count, const AdamScalars<float>& s);
void adam_run(double* p, const double* g, double* m, double* v, double* vmax, int64_t count,
              const AdamScalars<double>& s);
AdamScalars<float> anchor_run(float* p, const float* g, float* pulled, const float* original, int64_t count,
                              const AdamScalars<float>& s);
AdamScalars<double> anchor_run(double* p, const double* g, double* pulled, const double* original, int64_t count,
                               const AdamScalars<double>& s);
void unscale_run(const float* g, float* scaled, int64_t count, float scale);
void unscale_run(const double* g, double* scaled, int64_t count, double scale);

void add_run(float* p, const float* term, int64_t count);

// Round parameters to a 16-bit dtype: at random, or leaving the rest in `compensation`. `entry` is the first one's
// number in mask order.
void round_stochastically(float* p, int64_t dtype, int64_t entry, int64_t count, RandomKeys keys);
void split_compensated(float* p, int64_t dtype, void* compensation, int64_t count);

}  // namespace gradsel
