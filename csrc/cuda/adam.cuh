// Masked Adam over many tensors in one launch. The arithmetic is adam_math.h's, the same as on the CPU.
//
// Tensors are cut into tiles, of which every block takes a run, so that it works out a tensor's bias corrections once.
// Threads of a warp hold neighbouring entries: what they scatter into one sector of the weight goes there in one
// access, and the moments need no wider loads than that. Where nothing is scattered a thread holds four entries in a
// row and moves 16 bytes at a time. Steps are counted up by the block that finishes last, when nobody reads them any
// more. Indices are trusted but for memory: an entry outside its tensor is skipped.
#pragma once

#include <type_traits>

#include "../adam_math.h"
#include "adam.h"
#include "device.cuh"

namespace gradsel {

// base^exponent, correctly rounded but for the rarest cases: near 1, where 1 - beta^t cancels, an error in its last
// place would be thousands in the first updates of float64 states. Numbers are unevaluated sums of two doubles.
struct TwoDoubles {
  double high, low;
};

__device__ __forceinline__ TwoDoubles product(TwoDoubles a, TwoDoubles b) {
  const double high = a.high * b.high;
  const double low = fma(a.high, b.high, -high) + (a.high * b.low + a.low * b.high);
  const double total = high + low;
  return {total, low - (total - high)};
}

__device__ __forceinline__ double power(double base, int64_t exponent) {
  TwoDoubles result{1, 0}, square{base, 0};
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = product(result, square);
    square = product(square, square);
  }
  return result.high;
}

template <class T>
__device__ __forceinline__ T* at(int64_t address) {
#ifdef __CUDACC__
  // The same address; but the compiler learns that it is global memory, or every access would find that out first.
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
#else
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
#endif
}

// The number of the step that is being done.
__device__ __forceinline__ int64_t step_number(const AdamItem& item) {
  return static_cast<int64_t>(item.step_dtype == kFloat64 ? *at<const double>(item.step) + 1
                                                          : *at<const float>(item.step) + 1);
}

// Four entries of a thread. kInARow: neighbours, and everything about them is contiguous and aligned. Else a warp's
// lanes hold neighbours.
template <bool kInARow>
struct Entries {
  int64_t number[kPerThread];  // in mask order
  bool valid[kPerThread];
  bool all_valid = true;

  __device__ __forceinline__ Entries(int64_t first, int64_t end) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      number[e] = first + (kInARow ? threadIdx.x * kPerThread + e : e * kAdamThreads + threadIdx.x);
      valid[e] = number[e] < end;
      all_valid = all_valid && valid[e];
    }
  }
};

template <int bytes>
struct VectorOf;
template <>
struct VectorOf<8> {
  using Type = uint2;
};
template <>
struct VectorOf<16> {
  using Type = uint4;
};

template <class Stored>
constexpr int vector_bytes() {
  return sizeof(Stored) == 2 ? 8 : 16;
}

// Conversions between memory in any dtype and registers. `offset` says where each entry lies.

template <class T, class Stored, bool kInARow>
__device__ __forceinline__ void load_as(T (&to)[kPerThread], const Stored* from, const int64_t (&offset)[kPerThread],
                                        const bool (&valid)[kPerThread], bool vector) {
  if (kInARow && vector) {
    constexpr int bytes = vector_bytes<Stored>(), count = bytes / sizeof(Stored);
    Stored raw[kPerThread];
#pragma unroll
    for (int v = 0; v < kPerThread / count; ++v) {
      using Vector = typename VectorOf<bytes>::Type;
      const Vector moved = *reinterpret_cast<const Vector*>(from + offset[0] + v * count);
      std::memcpy(raw + v * count, &moved, bytes);
    }
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) to[e] = convert<T>(raw[e]);
    return;
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) to[e] = valid[e] ? convert<T>(from[offset[e]]) : T(0);
}

template <class T, class Stored, bool kInARow>
__device__ __forceinline__ void store_as(Stored* to, const T (&from)[kPerThread], const int64_t (&offset)[kPerThread],
                                         const bool (&valid)[kPerThread], bool vector) {
  if (kInARow && vector) {
    constexpr int bytes = vector_bytes<Stored>(), count = bytes / sizeof(Stored);
    Stored raw[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) raw[e] = convert<Stored>(from[e]);
#pragma unroll
    for (int v = 0; v < kPerThread / count; ++v) {
      using Vector = typename VectorOf<bytes>::Type;
      Vector moved;
      std::memcpy(&moved, raw + v * count, bytes);
      *reinterpret_cast<Vector*>(to + offset[0] + v * count) = moved;
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    if (valid[e]) to[offset[e]] = convert<Stored>(from[e]);
}

// Calls body with a null pointer of the dtype. What trains in float32 has no float64 state, parameters or weight.
template <class T, class Body>
__device__ __forceinline__ void with_dtype(int64_t dtype, const Body& body) {
  switch (dtype) {
    case kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case kFloat16: return body(static_cast<Float16*>(nullptr));
    case kFloat64:
      if (sizeof(T) == 8) return body(static_cast<double*>(nullptr));
      break;
    default: return body(static_cast<float*>(nullptr));
  }
}

template <bool kInARow, class T>
__device__ __forceinline__ void load(T (&to)[kPerThread], int64_t dtype, int64_t address,
                                     const int64_t (&offset)[kPerThread], const bool (&valid)[kPerThread],
                                     bool vector) {
  with_dtype<T>(dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    load_as<T, Stored, kInARow>(to, at<const Stored>(address), offset, valid, vector);
  });
}

template <bool kInARow, class T>
__device__ __forceinline__ void store(int64_t dtype, int64_t address, const T (&from)[kPerThread],
                                      const int64_t (&offset)[kPerThread], const bool (&valid)[kPerThread],
                                      bool vector) {
  with_dtype<T>(dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    store_as<T, Stored, kInARow>(at<Stored>(address), from, offset, valid, vector);
  });
}

// Moments: in the dtype of the arithmetic, or in bfloat16 for float32.

template <bool kInARow, class T>
__device__ __forceinline__ void load_moment(T (&to)[kPerThread], const AdamItem& item, int64_t address,
                                            const Entries<kInARow>& entries) {
  if (sizeof(T) == 4 && item.state_dtype == kBFloat16)
    load_as<T, BFloat16, kInARow>(to, at<const BFloat16>(address), entries.number, entries.valid, entries.all_valid);
  else
    load_as<T, T, kInARow>(to, at<const T>(address), entries.number, entries.valid, entries.all_valid);
}

template <bool kInARow, class T>
__device__ __forceinline__ void store_moment(const AdamItem& item, int64_t address, const T (&from)[kPerThread],
                                             const Entries<kInARow>& entries) {
  if (sizeof(T) == 4 && item.state_dtype == kBFloat16)
    store_as<T, BFloat16, kInARow>(at<BFloat16>(address), from, entries.number, entries.valid, entries.all_valid);
  else
    store_as<T, T, kInARow>(at<T>(address), from, entries.number, entries.valid, entries.all_valid);
}

// What all threads of a block know about the tensor that they work on.
template <class T>
struct Current {
  AdamItem item;
  AdamScalars<T> scalars;
  RandomKeys keys;
  bool in_a_row;
};

// The checks allow these for float32 only.
__device__ __forceinline__ void add_compensation(const AdamItem& item, float& p, int64_t entry) {
  p += item.weight_dtype == kBFloat16 ? to_float(at<const BFloat16>(item.compensation)[entry])
                                      : to_float(at<const Float16>(item.compensation)[entry]);
}
__device__ __forceinline__ void add_compensation(const AdamItem&, double&, int64_t) {}

__device__ __forceinline__ void round_param(const Current<float>& now, float& p, int64_t entry) {
  const AdamItem& item = now.item;
  const bool brain = item.weight_dtype == kBFloat16;
  if (item.stochastic && brain) stochastic_loop<stochastic_bfloat16>(&p, entry, 1, now.keys);
  if (item.stochastic && !brain) stochastic_loop<stochastic_float16>(&p, entry, 1, now.keys);
  if (item.compensation && brain) compensated_loop<BFloat16>(&p, at<BFloat16>(item.compensation) + entry, 1);
  if (item.compensation && !brain) compensated_loop<Float16>(&p, at<Float16>(item.compensation) + entry, 1);
}
__device__ __forceinline__ void round_param(const Current<double>&, double&, int64_t) {}

template <bool kInARow, class T>
__device__ __forceinline__ void update(const Current<T>& now, const Entries<kInARow>& entries,
                                       const int64_t (&weight_offset)[kPerThread],
                                       const int64_t (&grad_offset)[kPerThread]) {
  const AdamItem& item = now.item;
  AdamScalars<T> scalars = now.scalars;
  const bool vector = entries.all_valid;
  T p[kPerThread], g[kPerThread], m[kPerThread], v[kPerThread], v_max[kPerThread];
  if (sizeof(T) == 4 && item.grad_dtype == kFloat64)  // the one float64 that float32 states can meet
    load_as<T, double, false>(g, at<const double>(item.grad), grad_offset, entries.valid, false);
  else
    load<kInARow>(g, item.grad_dtype, item.grad, grad_offset, entries.valid, vector);
  load_moment(m, item, item.exp_avg, entries);
  load_moment(v, item, item.exp_avg_sq, entries);
  if (item.max_exp_avg_sq) load_moment(v_max, item, item.max_exp_avg_sq, entries);
  if (item.values)
    load_as<T, T, kInARow>(p, at<const T>(item.values), entries.number, entries.valid, vector);
  else
    load<kInARow>(p, item.weight_dtype, item.weight, weight_offset, entries.valid, vector);
  if (item.compensation) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e)
      if (entries.valid[e]) add_compensation(item, p[e], entries.number[e]);
  }
  if (scalars.grad_scale != 1) unscale_loop(g, g, kPerThread, scalars.grad_scale);
  if (item.original && scalars.pulls) {
    T original[kPerThread];
    load_as<T, T, kInARow>(original, at<const T>(item.original), entries.number, entries.valid, vector);
    scalars = anchor_math(p, g, g, original, kPerThread, scalars);
  }
  if (item.max_exp_avg_sq)
    adam_math(p, g, m, v, v_max, kPerThread, scalars);
  else
    adam_math<T>(p, g, m, v, nullptr, kPerThread, scalars);

  store_moment(item, item.exp_avg, m, entries);
  store_moment(item, item.exp_avg_sq, v, entries);
  if (item.max_exp_avg_sq) store_moment(item, item.max_exp_avg_sq, v_max, entries);
  if (item.values) store_as<T, T, kInARow>(at<T>(item.values), p, entries.number, entries.valid, vector);
  if (!item.weight) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    if (entries.valid[e]) round_param(now, p[e], entries.number[e]);
  store<kInARow>(item.weight_dtype, item.weight, p, weight_offset, entries.valid, vector);
}

__device__ __forceinline__ View weight_view(const AdamItem& item) {
  return View(item.rows, item.cols, item.weight_row_stride, item.weight_col_stride);
}
__device__ __forceinline__ View grad_view(const AdamItem& item) {
  return View(item.rows, item.cols, item.grad_row_stride, item.grad_col_stride);
}

// Whether all arrays are read and written in mask order, from addresses divisible by 16.
__device__ __forceinline__ bool is_in_a_row(const AdamItem& item) {
  if (item.weight && (item.layout != kAll || !weight_view(item).contiguous)) return false;
  if (item.grad_is_dense && (item.layout != kAll || !grad_view(item).contiguous)) return false;
  return (item.weight | item.values | item.grad | item.exp_avg | item.exp_avg_sq | item.max_exp_avg_sq |
          item.original) % 16 == 0;
}

// Where four entries lie in the weight and in the gradient; those that lie in neither become invalid.
struct Offsets {
  int64_t weight[kPerThread], grad[kPerThread];
};

// Of entries from `first` on that are all, or listed by column or flat index.
__device__ __forceinline__ void find_listed(const AdamItem& item, int64_t first, Entries<false>& entries, Offsets& place) {
  const View weight = weight_view(item), grad = grad_view(item);
  const bool cols = item.layout == kCols && item.weight;
  // The first entry's row is divided out in 64 bits, the others' in 32.
  const int64_t first_row = cols ? first / item.index_width : 0;
  const unsigned from_row = cols ? static_cast<unsigned>(first % item.index_width) : 0;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    const int64_t entry = entries.number[e];
    place.weight[e] = place.grad[e] = entry;
    if (!item.weight || !entries.valid[e]) continue;
    if (cols) {
      const int64_t col = at<const int32_t>(item.index)[entry];
      const int64_t row =
          first_row + (from_row + static_cast<unsigned>(entry - first)) / static_cast<unsigned>(item.index_width);
      entries.valid[e] = col >= 0 && col < item.cols;
      place.weight[e] = row * weight.row_stride + col * weight.col_stride;
      if (item.grad_is_dense) place.grad[e] = row * grad.row_stride + col * grad.col_stride;
    } else {
      int64_t flat = entry;
      if (item.layout == kFlat)
        flat = item.index_is_64 ? at<const int64_t>(item.index)[entry] : at<const int32_t>(item.index)[entry];
      entries.valid[e] = flat >= 0 && flat < item.rows * item.cols;
      place.weight[e] = weight.offset(flat);
      if (item.grad_is_dense) place.grad[e] = grad.offset(flat);
    }
  }
}

// The word of a thread in a tile of a packed mask; past the end 0.
__device__ __forceinline__ uint32_t word_of(const AdamItem& item, int64_t first) {
  const int64_t word = first + threadIdx.x;
  return word < item.rows * item.index_width ? at<const uint32_t>(item.index)[word] : 0;
}

__device__ __forceinline__ unsigned position_of_bit(uint32_t word, unsigned rank) {
  unsigned bit = 0;
#pragma unroll
  for (unsigned width = 16; width > 0; width /= 2) {
    const unsigned low = __popc((word >> bit) & ((1u << width) - 1));
    if (low <= rank) {
      rank -= low;
      bit += width;
    }
  }
  return bit;
}

// The words of a tile of a packed mask, in shared memory. Every thread looks up the set bits whose entries it holds, so
// that none idles on a zero.
struct TileOfWords {
  uint32_t* words;
  unsigned* ends;  // set bits up to and with each word

  __device__ __forceinline__ explicit TileOfWords(unsigned* shared) : words(shared), ends(shared + kAdamThreads) {}

  __device__ __forceinline__ TileOfWords(const AdamItem& item, int64_t first, unsigned* shared)
      : TileOfWords(shared) {
    unsigned* sums = ends + kAdamThreads;
    const uint32_t word = word_of(item, first);
    unsigned in_warp;
    unsigned end = __popc(word) + warp_sum_before(__popc(word), &in_warp);
    __syncthreads();  // the tile of before is still in use
    if (lane_number() == 0) sums[threadIdx.x / kWarp] = in_warp;
    words[threadIdx.x] = word;
    __syncthreads();
    for (unsigned w = 0; w < threadIdx.x / kWarp; ++w) end += sums[w];
    ends[threadIdx.x] = end;
    __syncthreads();
  }

  __device__ __forceinline__ unsigned total() const { return ends[kAdamThreads - 1]; }

  // `first` is the number of the tile's first word, `rank` the entry of its first set bit.
  __device__ __forceinline__ void find(const AdamItem& item, int64_t first, int64_t rank, Entries<false>& entries,
                                       Offsets& place) const {
    const View weight = weight_view(item), grad = grad_view(item);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      place.weight[e] = place.grad[e] = entries.number[e];
      if (!entries.valid[e]) continue;
      const unsigned number = static_cast<unsigned>(entries.number[e] - rank);
      unsigned position = 0;  // of the first word that ends after it
      for (unsigned half = kAdamThreads / 2; half > 0; half /= 2)
        if (ends[position + half - 1] <= number) position += half;
      const unsigned before = ends[position] - __popc(words[position]);
      const int64_t row = (first + position) / item.index_width;
      const int64_t col = (first + position) % item.index_width * 32 + position_of_bit(words[position], number - before);
      entries.valid[e] = col < item.cols;
      place.weight[e] = row * weight.row_stride + col * weight.col_stride;
      if (item.grad_is_dense) place.grad[e] = row * grad.row_stride + col * grad.col_stride;
    }
  }
};

// A tile of a tensor; `rank` is the entry of its first set bit if the mask is packed.
template <class T>
__device__ __forceinline__ void update_tile(const Current<T>& now, int64_t tile, const int64_t* rank, unsigned* shared) {
  const AdamItem& item = now.item;
  if (now.in_a_row) {
    const Entries<true> entries(tile * kTile, item.nnz);
    update(now, entries, entries.number, entries.number);
    return;
  }
  const bool bits = item.layout == kBits && item.weight;
  const int64_t first_word = tile * kAdamThreads;
  int64_t first = tile * kTile, end = first + kTile;
  if (bits) {
    first = *rank;
    end = first + TileOfWords(item, first_word, shared).total();
  }
  for (int64_t begin = first; begin < end; begin += kTile) {  // but for packed masks, once
    Entries<false> entries(begin, smaller(item.nnz, end));
    Offsets offsets;
    if (bits)
      TileOfWords(shared).find(item, first_word, first, entries, offsets);
    else
      find_listed(item, begin, entries, offsets);
    update(now, entries, offsets.weight, offsets.grad);
  }
}

// The item of a tile: the last one whose first tile it is or comes after. All threads of the block call it.
__device__ __forceinline__ int64_t item_of(const AdamTable& table, int64_t tile) {
  const int64_t* first_tiles = table.first_tiles();
  int64_t item = -1;
  for (int64_t i = 0; i < table.count; i += blockDim.x) {
    const int64_t mine = i + threadIdx.x;
    item += __syncthreads_count(mine < table.count && first_tiles[mine] <= tile);
  }
  return item;
}

// Fills in what the block knows; `corrections` has room for two doubles.
template <class T>
__device__ __forceinline__ void begin_item(const AdamStep& step, int64_t number, Current<T>* now, double* corrections) {
  const AdamItem& item = step.table.items()[number];
  if (threadIdx.x % kWarp == 0 && threadIdx.x < 2 * kWarp) {
    const bool first = threadIdx.x == 0;
    corrections[first ? 0 : 1] = 1 - power(first ? step.hyper.beta1 : step.hyper.beta2, step_number(item));
  }
  __syncthreads();  // nobody is busy with the item of before any more, either
  if (threadIdx.x == 0) {
    AdamHyperparameters hyper = step.hyper;
    hyper.grad_scale = step.grad_scale ? *step.grad_scale : 1.0;
    now->item = item;
    now->scalars = scalars<T>(hyper, corrections[0], corrections[1]);
    now->keys = RandomKeys(item.seed, static_cast<uint32_t>(step_number(item)));
    now->in_a_row = is_in_a_row(item);
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void adam_step(const AdamStep& step) {
  const AdamTable& table = step.table;
  static_assert(sizeof(Current<T>) + 2 * sizeof(double) + sizeof(unsigned) * (2 * kAdamThreads + kWarp) <= kAdamShared,
                "what a block shares has to fit");
  Current<T>* now = reinterpret_cast<Current<T>*>(shared_memory());
  double* corrections = reinterpret_cast<double*>(now + 1);
  unsigned* rest = reinterpret_cast<unsigned*>(corrections + 2);
  const int64_t* first_tiles = table.first_tiles();
  const bool skipped = step.found_inf && *step.found_inf != 0;  // there is no way not to launch without waiting for it
  const int64_t tiles = first_tiles[table.count];
  const int64_t begin = tiles * blockIdx.x / gridDim.x;
  const int64_t end = skipped ? begin : tiles * (blockIdx.x + 1) / gridDim.x;

  int64_t number = begin < end ? item_of(table, begin) : 0;
  for (int64_t tile = begin; tile < end;) {
    while (first_tiles[number + 1] <= tile) ++number;
    begin_item(step, number, now, corrections);
    const int64_t item_first = first_tiles[number], item_end = smaller(first_tiles[number + 1], end);
    for (; tile < item_end; ++tile)
      update_tile(*now, tile - item_first, step.ranks ? step.ranks + tile : nullptr, rest);
  }

  // The last block to come here counts the steps up: all others have read them.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) rest[0] = atomicAdd(table.ticket(), 1u) == gridDim.x - 1;
  __syncthreads();
  if (!rest[0]) return;
  if (threadIdx.x == 0) *table.ticket() = 0;
  for (int64_t i = threadIdx.x; i < table.count && !skipped; i += blockDim.x) {
    const AdamItem& item = table.items()[i];
    if (item.step_dtype == kFloat64)
      *at<double>(item.step) += 1;
    else
      *at<float>(item.step) += 1;
  }
}

}  // namespace gradsel

extern "C" {

__global__ void gradsel_write_table(const __grid_constant__ gradsel::TablePart part) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < part.count) part.to[i] = part.words[i];
}

// The set bits of each tile of a packed mask.
__global__ void gradsel_adam_count_bits(const gradsel::AdamTable table, int64_t* counts) {
  using namespace gradsel;
  const int64_t tile = blockIdx.x, number = item_of(table, tile);
  const AdamItem& item = table.items()[number];
  if (item.layout != kBits || !item.weight) return;
  unsigned* sums = reinterpret_cast<unsigned*>(shared_memory());
  unsigned in_warp;
  warp_sum_before(__popc(word_of(item, (tile - table.first_tiles()[number]) * kAdamThreads)), &in_warp);
  if (lane_number() == 0) sums[threadIdx.x / kWarp] = in_warp;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t count = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) count += sums[w];
  counts[tile] = count;
}

// Turns them into the set bits ahead of each tile; a warp to a tensor.
__global__ void gradsel_adam_rank_bits(const gradsel::AdamTable table, int64_t* counts) {
  using namespace gradsel;
  const int64_t number = blockIdx.x;
  const AdamItem& item = table.items()[number];
  if (item.layout != kBits || !item.weight) return;
  const int64_t end = table.first_tiles()[number + 1];
  int64_t before = 0;
  for (int64_t tile = table.first_tiles()[number]; tile < end; tile += kWarp) {
    const int64_t mine = tile + lane_number();
    unsigned total;
    const unsigned ahead = warp_sum_before(mine < end ? static_cast<unsigned>(counts[mine]) : 0, &total);
    if (mine < end) counts[mine] = before + ahead;
    before += total;
  }
}

__global__ void __launch_bounds__(gradsel::kAdamThreads, 3) gradsel_adam_step_32(const gradsel::AdamStep step) {
  gradsel::adam_step<float>(step);
}
__global__ void __launch_bounds__(gradsel::kAdamThreads, 2) gradsel_adam_step_64(const gradsel::AdamStep step) {
  gradsel::adam_step<double>(step);
}

}  // extern "C"
