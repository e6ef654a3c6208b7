// The selected entries of a weight gradient, each a dot product over tokens: chunks, scratch memory and threads.
//
// Work goes through chunks of tokens. The columns of the input that a chunk needs are packed into a panel with
// adjoining tokens, small enough to stay in a second-level cache while all rows pass by; rows of the gradient are
// packed a cache line's width at a time into a buffer of the first level. What is added to what, and in which order,
// depends on shapes and columns only, not on the number of threads.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header trips it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/weight_grad/weight_grad.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/weight_grad/plan.h"
#include "cpu/weight_grad/registers.h"

#define SUMS_LEVEL portable
#define SUMS_TARGET
#include "cpu/weight_grad/products.inc"

#if GRADSEL_X86
#define SUMS_LEVEL avx2
#define SUMS_TARGET GRADSEL_SUMS_AVX2
#include "cpu/weight_grad/products.inc"

#define SUMS_LEVEL avx512
#define SUMS_TARGET GRADSEL_SUMS_AVX512
#include "cpu/weight_grad/products.inc"
#endif

namespace gradsel {
namespace {

template <class T, class Sum>
struct Kernels {
  void (*pack)(const T*, const Strides&, const TokenChunk&, int64_t, Sum*, int64_t);
  void (*add_rows)(const Sum*, int64_t, const Sum*, int64_t, int64_t, const SelectedColumns&, int64_t, int64_t, Sum*,
                   Sum*);
};

template <class T, class Sum>
Kernels<T, Sum> kernels_for(Simd level) {
#if GRADSEL_X86
  if (level == Simd::kAvx512) return {&avx512::pack<T, Sum>, &avx512::add_rows<Sum>};
  // All processors known to have AVX2 have these too, but they are features of their own.
  if (level == Simd::kAvx2 && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return {&avx2::pack<T, Sum>, &avx2::add_rows<Sum>};
#endif
  (void)level;
  return {&portable::pack<T, Sum>, &portable::add_rows<Sum>};
}

constexpr int64_t kLongChunk = 256;               // tokens: 16 rows of them take half of a first-level cache
constexpr int64_t kShortChunk = 128;              // fewer would be lost in starting and ending each sum
constexpr int64_t kChunkBytes = 768 * 1024;       // of a chunk's columns: most of a second-level cache
constexpr int64_t kPanelBytes = 2 * 1024 * 1024;  // of the chunks packed between two barriers
constexpr int64_t kItems = 32;                    // pieces of work that there should be for threads to share

// The call with batches that adjoin in both activations seen as one.
WeightGrad merge_batches(WeightGrad p) {
  Strides &y = p.grad_output_stride, &x = p.input_stride;
  if (p.tokens == 1) {
    y.token = y.batch;
    x.token = x.batch;
  } else if (y.batch != p.tokens * y.token || x.batch != p.tokens * x.token) {
    return p;
  }
  p.tokens *= p.batches;
  p.batches = 1;
  return p;
}

template <class T, class Sum>
class Products {
 public:
  Products(const WeightGrad& p, int64_t nnz, int threads)
      : p_(p),
        nnz_(nnz),
        threads_(threads_for(p.batches * p.tokens * (p.rows + nnz), threads)),
        used_({p.cols, p.row_offsets, p.k}, nnz, p.n),
        chunks_(p.batches, p.tokens, chunk_target(used_.count() * kBlock)),
        // An odd number of cache lines, so that the rows of a block do not meet in the same cache sets.
        pitch_((divide_up(chunks_.longest() + kVector, kBlock) | 1) * kBlock),
        chunk_size_(used_.count() * kBlock * pitch_),
        panel_chunks_(std::min(fit(kPanelBytes, chunk_size_), chunks_.count())),
        row_blocks_(divide_up(p.rows, kBlock)),
        parts_(std::min(panel_chunks_, divide_up(kItems, row_blocks_))),
        panel_(panel_chunks_ * chunk_size_),
        rows_(threads_ * kBlock * pitch_),
        partial_(static_cast<size_t>(parts_ > 1 ? parts_ * result() : 0)) {}

  // Adds to out and bias.
  void run() {
    for (int64_t first = 0; first < chunks_.count(); first += panel_chunks_) {
      const int64_t count = std::min(panel_chunks_, chunks_.count() - first);
      parallel_ranges(count * used_.count(), threads_, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {  // in the order in which the input lies in memory
          if (p_.input_stride.token == 1)
            pack_columns(first, i % count, i / count);
          else
            pack_columns(first, i / used_.count(), i % used_.count());
        }
      });
      // All row blocks of the first part of the panel's chunks, then all of the second, ...
      parallel_ranges(parts_ * row_blocks_, threads_, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t part = begin / row_blocks_; part * row_blocks_ < end; ++part) {
          const int64_t start = part * row_blocks_;
          for (int64_t c = count * part / parts_; c < count * (part + 1) / parts_; ++c)
            for (int64_t i = std::max(begin, start); i < std::min(end, start + row_blocks_); ++i)
              add_block(first, c, i - start, part, rows_.get() + thread * kBlock * pitch_);
        }
      });
    }
    if (parts_ > 1) add_parts();
  }

 private:
  static constexpr int64_t kBlock = kLine / static_cast<int64_t>(sizeof(Sum));  // rows or columns packed at once

  // How often `count` sums go into `bytes`, but at least once.
  static int64_t fit(int64_t bytes, int64_t count) {
    return std::max<int64_t>(bytes / (std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(Sum))), 1);
  }
  static int64_t chunk_target(int64_t columns) {
    return std::min(std::max(fit(kChunkBytes, columns), kShortChunk), kLongChunk);
  }
  int64_t result() const { return nnz_ + (p_.bias ? p_.rows : 0); }

  // `c` counts from the panel's first chunk.
  void pack_columns(int64_t first, int64_t c, int64_t block) {
    const TokenChunk chunk = chunks_[first + c];
    const int64_t column = used_.column(block);
    const T* const from = static_cast<const T*>(p_.input) + p_.input_stride.at(chunk.batch, chunk.token, column);
    kernels_.pack(from, p_.input_stride, chunk, std::min(kBlock, p_.n - column),
                  panel_.get() + c * chunk_size_ + block * kBlock * pitch_, pitch_);
  }

  void add_block(int64_t first, int64_t c, int64_t block, int64_t part, Sum* buffer) {
    const TokenChunk chunk = chunks_[first + c];
    const Strides& stride = p_.grad_output_stride;
    const int64_t row = block * kBlock, end = std::min(row + kBlock, p_.rows);
    const T* const from = static_cast<const T*>(p_.grad_output) + stride.at(chunk.batch, chunk.token, row);
    const bool in_place = std::is_same<T, Sum>::value && stride.token == 1 && chunk.batches == 1;
    if (!in_place) kernels_.pack(from, stride, chunk, end - row, buffer, pitch_);
    Sum* out = static_cast<Sum*>(p_.out);
    Sum* bias = static_cast<Sum*>(p_.bias);
    if (parts_ > 1) {
      out = partial_.data() + part * result();
      if (bias) bias = out + nnz_;
    }
    kernels_.add_rows(in_place ? reinterpret_cast<const Sum*>(from) : buffer, in_place ? stride.feature : pitch_,
                      panel_.get() + c * chunk_size_, pitch_, chunk.size(), used_.selected(), row, end, out, bias);
  }

  void add_parts() {
    Sum* const out = static_cast<Sum*>(p_.out);
    Sum* const bias = static_cast<Sum*>(p_.bias);
    for (int64_t part = 0; part < parts_; ++part) {
      const Sum* const from = partial_.data() + part * result();
      for (int64_t e = 0; e < nnz_; ++e) out[e] += from[e];
      for (int64_t r = 0; bias && r < p_.rows; ++r) bias[r] += from[nnz_ + r];
    }
  }

  const WeightGrad p_;
  const int64_t nnz_;
  const int threads_;
  const Kernels<T, Sum> kernels_ = kernels_for<T, Sum>(simd());
  const UsedBlocks<kBlock> used_;
  const TokenChunks chunks_;
  const int64_t pitch_;         // of a row of the gradient or a column of the input, both packed
  const int64_t chunk_size_;    // of the columns of one chunk
  const int64_t panel_chunks_;  // packed together
  const int64_t row_blocks_;
  const int64_t parts_;  // of each panel, with sums of their own: where rows are too few for the threads
  const Scratch<Sum> panel_, rows_;
  std::vector<Sum> partial_;
};

template <class T, class Sum>
void run(const WeightGrad& problem, int threads) {
  const int64_t nnz = SelectedColumns{problem.cols, problem.row_offsets, problem.k}.first(problem.rows);
  std::fill_n(static_cast<Sum*>(problem.out), nnz, Sum{0});
  if (problem.bias) std::fill_n(static_cast<Sum*>(problem.bias), problem.rows, Sum{0});
  const bool nothing = problem.batches * problem.tokens * problem.rows == 0 || (nnz == 0 && !problem.bias);
  if (!nothing) Products<T, Sum>(merge_batches(problem), nnz, threads).run();
}

}  // namespace

void selected_weight_grad(const WeightGrad& problem, int threads) {
  switch (problem.dtype) {
    case kFloat32: return run<float, float>(problem, threads);
    case kBFloat16: return run<BFloat16, float>(problem, threads);
    case kFloat16: return run<Float16, float>(problem, threads);
    case kFloat64: return run<double, double>(problem, threads);
  }
}

}  // namespace gradsel
