// The two loops of selected_weight_grad. No include guard: weight_grad.cpp includes this once for each SIMD level,
// because a template cannot take its target attribute as a parameter. Needs SUMS_LEVEL (a namespace that has Reg) and
// SUMS_TARGET (the attribute).
//
// Vectors run over tokens, so no column has to be gathered: each sum is a dot product of two arrays that adjoin in
// memory, a row of the output's gradient and a column of the input. pack() brings both into that form.

namespace gradsel {
namespace SUMS_LEVEL {

constexpr int64_t kAhead = 64;  // tokens between a load and the request for what is loaded then

#define FN SUMS_TARGET static GRADSEL_INLINE

// lanes x lanes elements, whose features adjoin, to rows of adjoining tokens. Tokens past the last repeat it: what is
// written for them is never read.
template <class R, class T, class Sum>
FN void transpose_tile(const T* src, int64_t token_stride, int64_t tokens, Sum* dst, int64_t pitch) {
#if GRADSEL_X86
  // Tokens lie too far apart for the processor to see a pattern.
  if (tokens >= kAhead + R::lanes)
#pragma GCC unroll 16
    for (int t = 0; t < R::lanes; ++t) __builtin_prefetch(src + (kAhead + t) * token_stride, 0, 2);
#endif
  R tile[R::lanes];
#pragma GCC unroll 16
  for (int t = 0; t < R::lanes; ++t) {
    tile[t] = R::load(src);
    src += t + 1 < tokens ? token_stride : 0;
  }
  R::transpose(tile);
#pragma GCC unroll 16
  for (int f = 0; f < R::lanes; ++f) R::store(dst + f * pitch, tile[f]);
}

// Brings some features of a chunk into dst: one every `pitch` elements, each with the chunk's tokens adjoining. Up to
// a register past the last token may be overwritten.
template <class T, class Sum>
SUMS_TARGET void pack(const T* src, const Strides& stride, const Chunk& chunk, int64_t features, Sum* dst,
                      int64_t pitch) {
  using R = Reg<Sum>;
  const int64_t tokens = chunk.tokens;
  for (int64_t b = 0; b < chunk.batches; ++b, src += stride.batch, dst += tokens) {
    int64_t done = 0;
    if (stride.token == 1) {
      for (; done < features; ++done) {
        const T* from = src + done * stride.feature;
        Sum* to = dst + done * pitch;
        int64_t t = 0;
        for (; t + R::lanes <= tokens; t += R::lanes) R::store(to + t, R::load(from + t));
        for (; t < tokens; ++t) to[t] = convert<Sum>(from[t]);
      }
    } else if (stride.feature == 1) {
      for (int64_t t = 0; t < tokens; t += R::lanes)
        for (int64_t f = 0; f + R::lanes <= features; f += R::lanes)
          transpose_tile<R>(src + t * stride.token + f, stride.token, tokens - t, dst + f * pitch + t, pitch);
      done = features / R::lanes * R::lanes;
    }
    for (; done < features; ++done)
      for (int64_t t = 0; t < tokens; ++t)
        dst[done * pitch + t] = convert<Sum>(src[t * stride.token + done * stride.feature]);
  }
}

// Four dot products at once, two running sums each: enough independent additions to hide their latency, and few enough
// loads when all four have the same y.
template <bool same_y, class Sum>
FN void dot_products(const Sum* const (&y)[4], const Sum* const (&x)[4], int64_t tokens, Sum (&sums)[4]) {
  using R = Reg<Sum>;
  R even[4], odd[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) even[j] = odd[j] = R::zero();
  int64_t t = 0;
  for (; t + 2 * R::lanes <= tokens; t += 2 * R::lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Sum* from = y[same_y ? 0 : j] + t;
      even[j] = R::add_product(R::load(from), R::load(x[j] + t), even[j]);
      odd[j] = R::add_product(R::load(from + R::lanes), R::load(x[j] + t + R::lanes), odd[j]);
    }
  }
  for (; t < tokens; t += R::lanes) {
    const int64_t rest = std::min<int64_t>(R::lanes, tokens - t);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      even[j] = R::add_product(R::load_first(y[same_y ? 0 : j] + t, rest), R::load_first(x[j] + t, rest), even[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) even[j] = R::add(even[j], odd[j]);
  R::sums(even, sums);
}

template <class Sum>
FN void row_sums(const Sum* const (&y)[4], int64_t tokens, Sum (&sums)[4]) {
  using R = Reg<Sum>;
  R total[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) total[j] = R::zero();
  for (int64_t t = 0; t < tokens; t += R::lanes) {
    const int64_t rest = std::min<int64_t>(R::lanes, tokens - t);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) total[j] = R::add(total[j], R::load_first(y[j] + t, rest));
  }
  R::sums(total, sums);
}

// Adds a chunk's products to the entries of rows begin .. end - 1, and its sums to their bias unless that is null. Row
// `begin` is at y, column 0 at x.
template <class Sum>
SUMS_TARGET void add_rows(const Sum* y, int64_t y_pitch, const Sum* x, int64_t x_pitch, int64_t tokens,
                          const Entries& entries, int64_t begin, int64_t end, Sum* out, Sum* bias) {
  Sum sums[4];
  for (int64_t r = begin; bias && r < end; r += 4) {
    const int64_t count = std::min<int64_t>(4, end - r);
    const Sum* rows[4];
    for (int64_t j = 0; j < 4; ++j) rows[j] = y + (r - begin + std::min(j, count - 1)) * y_pitch;
    row_sums(rows, tokens, sums);
    for (int64_t j = 0; j < count; ++j) bias[r + j] += sums[j];
  }
  // Four entries of a row at a time; what is left of the rows is put together, also by four.
  const Sum *left_y[4], *left_x[4];
  Sum* left_out[4];
  int left = 0;
  const auto finish = [&](int count) SUMS_TARGET {
    dot_products<false>(left_y, left_x, tokens, sums);
    for (int j = 0; j < count; ++j) *left_out[j] += sums[j];
  };
  for (int64_t r = begin; r < end; ++r, y += y_pitch) {
    const int64_t last = entries.first(r + 1);
    int64_t e = entries.first(r);
    for (; e + 4 <= last; e += 4) {
      const int32_t* cols = entries.cols + e;
      dot_products<true>({y}, {x + cols[0] * x_pitch, x + cols[1] * x_pitch, x + cols[2] * x_pitch,
                         x + cols[3] * x_pitch}, tokens, sums);
      for (int j = 0; j < 4; ++j) out[e + j] += sums[j];
    }
    for (; e < last; ++e) {
      left_y[left] = y;
      left_x[left] = x + entries.cols[e] * x_pitch;
      left_out[left] = out + e;
      if (++left == 4) finish(4), left = 0;
    }
  }
  if (left == 0) return;
  for (int j = left; j < 4; ++j) left_y[j] = left_y[0], left_x[j] = left_x[0];
  finish(left);
}

#undef FN

}  // namespace SUMS_LEVEL
}  // namespace gradsel

#undef SUMS_LEVEL
#undef SUMS_TARGET
