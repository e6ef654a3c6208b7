// The bound of a step on dense gradients: one loop that reads every selected gradient and weight, updates both moments
// and writes the weight, with as little arithmetic as keeps a compiler from leaving anything out. No checks, no options.
#include <stdint.h>

typedef struct {
  float* weight;
  const float* grad;
  float *exp_avg, *exp_avg_sq;
  const int32_t* cols;
  int64_t rows, n, k;
} Matrix;

void bare_loop(const Matrix* matrices, int64_t count, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t t = 0; t < count; ++t) {
    const Matrix a = matrices[t];
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t i = r * a.k; i < (r + 1) * a.k; ++i) {
        const int64_t at = r * a.n + a.cols[i];
        const float g = a.grad[at];
        a.exp_avg[i] = 0.9f * a.exp_avg[i] + 0.1f * g;
        a.exp_avg_sq[i] = 0.999f * a.exp_avg_sq[i] + 0.001f * g * g;
        a.weight[at] -= 1e-6f * (a.exp_avg[i] + a.exp_avg_sq[i]);
      }
  }
}
