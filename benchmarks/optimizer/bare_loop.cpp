// The least that a step on dense gradients can do: reads one weight and one gradient for each selected entry, and
// writes the weight. With moments it also reads and writes two numbers for each entry, in order, as Adam has to.
// What a masked step takes longer than this is its own.
#include <cstdint>

extern "C" void bare_loop(int64_t tensors, float* const* weights, const float* const* grads,
                          const int32_t* const* indices, float* const* moments, float* const* second_moments,
                          const int64_t* rows, const int64_t* cols, int64_t k, bool has_moments, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tensors; ++t)
    for (int64_t row = 0; row < rows[t]; ++row)
      for (int64_t j = 0; j < k; ++j) {
        const int64_t entry = row * k + j, at = row * cols[t] + indices[t][entry];
        const float grad = grads[t][at];
        weights[t][at] -= 1e-6f * grad;
        if (has_moments) {
          moments[t][entry] += grad;
          second_moments[t][entry] += grad;
        }
      }
}
