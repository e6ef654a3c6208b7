// Tokens are taken 16 at a time. Their inputs are packed so that those of a column are adjacent: an entry then costs one
// short loop over consecutive numbers, and a single token, as in generation, one multiplication.
#include "cpu/product/product.h"

#include <algorithm>
#include <memory>

#include "cpu/parallel.h"

namespace gradsel {
namespace {

constexpr int kTokens = 16;
constexpr int kRows = 16;  // whose sums are added to the output together: one cache line of a token

// Packs inputs of `count` tokens as [n, width]; tokens that do not exist are zero.
template <int width, class T, class Sum>
void pack(const SelectedProduct& p, int64_t first, int count, int64_t begin, int64_t end, Sum* packed) {
  const T* input = static_cast<const T*>(p.input) + first * p.input_token_stride;
  for (int64_t c = begin; c < end; ++c)
    for (int t = 0; t < width; ++t)
      packed[c * width + t] =
          t < count ? convert<Sum>(input[t * p.input_token_stride + c * p.input_col_stride]) : Sum{0};
}

template <int width, class T, class Sum>
void add(const SelectedProduct& p, int64_t first, int count, int64_t begin, int64_t end, const Sum* packed) {
  const Sum* values = static_cast<const Sum*>(p.values);
  for (int64_t row = begin; row < end; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, end - row));
    Sum sums[width][kRows];
    for (int i = 0; i < rows; ++i) {
      const int64_t from = p.row_offsets ? p.row_offsets[row + i] : (row + i) * p.k;
      const int64_t to = p.row_offsets ? p.row_offsets[row + i + 1] : from + p.k;
      Sum own[width] = {};
      for (int64_t j = from; j < to; ++j) {
        const Sum* inputs = packed + p.cols[j] * static_cast<int64_t>(width);
        for (int t = 0; t < width; ++t) own[t] += values[j] * inputs[t];
      }
      for (int t = 0; t < width; ++t) sums[t][i] = own[t];
    }
    for (int t = 0; t < count; ++t) {
      T* out = static_cast<T*>(p.output) + (first + t) * p.output_token_stride + row * p.output_row_stride;
      for (int i = 0; i < rows; ++i) {
        T& to = out[i * p.output_row_stride];
        to = convert<T>(convert<Sum>(to) + sums[t][i]);
      }
    }
  }
}

template <int width, class T, class Sum>
void run(const SelectedProduct& p, int64_t entries, int threads) {
  const std::unique_ptr<Sum[]> packed(new Sum[static_cast<size_t>(p.n * width)]);
  for (int64_t first = 0; first < p.tokens; first += width) {
    const int count = static_cast<int>(std::min<int64_t>(width, p.tokens - first));
    parallel_ranges(p.n, threads_for(p.n * count, threads), [&](int64_t begin, int64_t end, int) {
      pack<width, T>(p, first, count, begin, end, packed.get());
    });
    parallel_ranges(p.rows, threads_for((entries + p.rows) * count, threads), [&](int64_t begin, int64_t end, int) {
      add<width, T>(p, first, count, begin, end, packed.get());
    });
  }
}

template <class T, class Sum>
void run(const SelectedProduct& p, int64_t entries, int threads) {
  if (p.tokens == 1)
    run<1, T, Sum>(p, entries, threads);
  else
    run<kTokens, T, Sum>(p, entries, threads);
}

}  // namespace

bool selected_addmm(const SelectedProduct& product, int threads, Range* found) {
  const int64_t entries = product.row_offsets ? product.row_offsets[product.rows] : product.rows * product.k;
  if (!columns_below(product.cols, entries, product.n, threads, found)) return false;
  switch (product.dtype) {
    case kFloat32: run<float, float>(product, entries, threads); break;
    case kBFloat16: run<BFloat16, float>(product, entries, threads); break;
    case kFloat16: run<Float16, float>(product, entries, threads); break;
    case kFloat64: run<double, double>(product, entries, threads); break;
  }
  return true;
}

}  // namespace gradsel
