#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/weight_grad/weight_grad.h"

namespace gradsel {
namespace {

constexpr int64_t kBlock = 32;  // tokens: whole cache lines are written, and the lines read stay in cache meanwhile

// Columns of tokens begin .. end - 1 of one batch. Elements are copied as integers: no bit changes.
template <class Bits>
void take(const Bits* src, const Strides& stride, const int32_t* columns, int64_t count, int64_t begin, int64_t end,
          Bits* dst, int64_t pitch) {
  for (int64_t j = 0; j < count; ++j) {
    const Bits* from = src + columns[j] * stride.feature;
    Bits* to = dst + j * pitch;
    if (stride.token == 1) {
      std::memcpy(to + begin, from + begin, static_cast<size_t>(end - begin) * sizeof(Bits));
    } else {
      for (int64_t t = begin; t < end; ++t) to[t] = from[t * stride.token];
    }
  }
}

template <class Bits>
void run(const void* input, const Strides& stride, int64_t batches, int64_t tokens, const int32_t* columns,
         int64_t count, void* out, int threads) {
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  threads = threads_for(batches * tokens * count, threads);
  parallel_ranges(batches * blocks, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / blocks, token = i % blocks * kBlock;
      take(static_cast<const Bits*>(input) + batch * stride.batch, stride, columns, count, token,
           std::min(token + kBlock, tokens), static_cast<Bits*>(out) + batch * count * tokens, tokens);
    }
  });
}

}  // namespace

void take_columns(const void* input, Dtype dtype, const Strides& stride, int64_t batches, int64_t tokens,
                  const int32_t* columns, int64_t count, void* out, int threads) {
  const auto kernel = dtype == kFloat64 ? &run<uint64_t> : dtype == kFloat32 ? &run<uint32_t> : &run<uint16_t>;
  kernel(input, stride, batches, tokens, columns, count, out, threads);
}

}  // namespace gradsel
