// Masked Adam over many tensors in one launch. The arithmetic is that of adam_math.h, the same as on the CPU.
//
// Tensors are cut into tiles. Every block takes a run of them, so that it computes a tensor's bias corrections once.
// The threads of a warp hold neighbouring entries: what they scatter into one sector of the weight is one access, and
// the moments need no wider loads than that. Where nothing is scattered, a thread holds four entries in a row and moves
// 16 bytes at a time. Common dtypes and options have specialised code that issues all loads of a tile at once, except
// for those whose address depends on the index. The block that finishes last increments the step counts, when no other
// block still reads them. Indices are not checked, but an entry outside its tensor is skipped, so memory is safe.
#pragma once

#include "common/adam_math.h"
#include "cuda/adam.h"
#include "cuda/device.cuh"
#include "cuda/entries.cuh"

namespace gradsel {

// base^exponent, correctly rounded in all but the rarest cases: near 1, where 1 - beta^t cancels, an error in its last
// place would become one of thousands in the first updates of float64 states. Numbers are unevaluated sums of two
// doubles.
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

// The number of the current step.
__device__ __forceinline__ int64_t step_number(const AdamItem& item) {
  return static_cast<int64_t>(item.step_dtype == kFloat64 ? *at<const double>(item.step) + 1
                                                          : *at<const float>(item.step) + 1);
}

// Which code a tensor takes. It depends on where the parameters are and on the dtypes of weight and gradient; all but
// kAny assume common values for everything else.
enum Kind : int {
  kAny,                    // any dtypes and options
  kWeightOnly,             // the weight is the parameter, in the dtype of the arithmetic
  kValues,                 // values, and possibly a weight, in the dtype of the arithmetic
  kBFloat16Weight,         // values and a bfloat16 weight; the gradient is in float32
  kBFloat16WeightAndGrad,  // likewise, but the gradient is in bfloat16
  kFloat16Weight,          // the same two in float16
  kFloat16WeightAndGrad,
};

template <class T>
__device__ __forceinline__ Kind kind_of(const AdamItem& item) {
  const int64_t own = sizeof(T) == 8 ? kFloat64 : kFloat32;
  if (item.max_exp_avg_sq || item.compensation || item.stochastic || item.state_dtype != own) return kAny;
  if (!item.weight || item.weight_dtype == own)
    return item.grad_dtype != own ? kAny : item.values ? kValues : item.weight ? kWeightOnly : kAny;
  if (sizeof(T) == 8 || !item.values) return kAny;
  if (item.weight_dtype == kBFloat16 && item.grad_dtype == kFloat32) return kBFloat16Weight;
  if (item.weight_dtype == kBFloat16 && item.grad_dtype == kBFloat16) return kBFloat16WeightAndGrad;
  if (item.weight_dtype == kFloat16 && item.grad_dtype == kFloat32) return kFloat16Weight;
  if (item.weight_dtype == kFloat16 && item.grad_dtype == kFloat16) return kFloat16WeightAndGrad;
  return kAny;
}

// What all threads of a block know about the tensor that they work on.
template <class T>
struct CurrentItem {
  AdamItem item;
  AdamScalars<T> scalars;
  RandomKeys keys;
  Kind kind;
  bool in_a_row;
};

template <class T>
using Registers = T[kPerThread];

// The arithmetic of a step, beginning with the gradients as stored. `originals` fills in those of the entries.
template <class T, int count, class Originals>
__device__ __forceinline__ void step_entries(AdamScalars<T> scalars, bool anchored, bool amsgrad, T (&p)[count],
                                             T (&g)[count], T (&m)[count], T (&v)[count], T (&v_max)[count],
                                             const Originals& originals) {
  if (scalars.grad_scale != 1) unscale_loop(g, g, count, scalars.grad_scale);
  if (anchored && scalars.pulls) {
    T original[count];
    originals(original);
#pragma unroll
    for (int e = 0; e < count; ++e)
      pull_entry(p[e], g[e], original[e], scalars, scalars.decay != 0, scalars.pull_l1, scalars.pull_decoupled);
    scalars = after_pull(scalars);
  }
#pragma unroll
  for (int e = 0; e < count; ++e)
    adam_entry(p[e], g[e], m[e], v[e], v_max[e], scalars, scalars.decay != 0, amsgrad);
}

// Likewise, with the originals of a tensor.
template <class T>
__device__ __forceinline__ void step_entries(const CurrentItem<T>& now, Registers<T>& p, Registers<T>& g,
                                             Registers<T>& m, Registers<T>& v, Registers<T>& v_max, bool amsgrad,
                                             const Numbers& number, const Flags& valid) {
  const AdamItem& item = now.item;
  step_entries(now.scalars, item.original != 0, amsgrad, p, g, m, v, v_max, [&](Registers<T>& original) {
    read_any(original, sizeof(T) == 8 ? kFloat64 : kFloat32, item.original, number, valid);
  });
}

// A tile of a tensor of any kind but kAny.
template <bool kInARow, class Weight, class Grad, bool kHasValues, class T>
__device__ __forceinline__ void update_usual(const CurrentItem<T>& now, int64_t first) {
  const AdamItem& item = now.item;
  Entries<kInARow> entries(first, item.nnz);
  Offsets place(entries);
  Held<kInARow, T> exp_avg, exp_avg_sq, values;
  Held<kInARow, Grad> grad;
  Held<kInARow, Weight> weight;
  const bool scattered_grad = !kInARow && item.grad_is_dense;
  const auto read_streams = [&] {
    exp_avg.read(at<const T>(item.exp_avg), entries.number, entries.valid);
    exp_avg_sq.read(at<const T>(item.exp_avg_sq), entries.number, entries.valid);
    if (kHasValues) values.read(at<const T>(item.values), entries.number, entries.valid);
    if (!scattered_grad) grad.read(at<const Grad>(item.grad), entries.number, entries.valid);
  };
  if constexpr (kInARow) {
    read_streams();
  } else {
    const Listed listed(item, entries);
    read_streams();
    listed.find(item, first, entries, place);
  }
  if (scattered_grad) grad.read(at<const Grad>(item.grad), place.grad, entries.valid);
  if (!kHasValues) weight.read(at<const Weight>(item.weight), place.weight, entries.valid);

  Registers<T> p, g, m, v;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    g[e] = convert<T>(grad.get(e));
    m[e] = exp_avg.get(e);
    v[e] = exp_avg_sq.get(e);
    if constexpr (kHasValues)
      p[e] = values.get(e);
    else
      p[e] = convert<T>(weight.get(e));
  }
  Registers<T> no_maximum{};
  step_entries(now, p, g, m, v, no_maximum, false, entries.number, entries.valid);
  write<kInARow>(at<T>(item.exp_avg), m, entries.number, entries.valid);
  write<kInARow>(at<T>(item.exp_avg_sq), v, entries.number, entries.valid);
  if (kHasValues) write<kInARow>(at<T>(item.values), p, entries.number, entries.valid);
  if (item.weight) write<kInARow>(at<Weight>(item.weight), p, place.weight, entries.valid);
}

template <bool kInARow, class T>
__device__ __forceinline__ void update_kind(const CurrentItem<T>& now, int64_t first) {
  if (now.kind == kWeightOnly) return update_usual<kInARow, T, T, false>(now, first);
  if (now.kind == kValues) return update_usual<kInARow, T, T, true>(now, first);
  if constexpr (sizeof(T) == 4) {
    if (now.kind == kBFloat16Weight) return update_usual<kInARow, BFloat16, float, true>(now, first);
    if (now.kind == kBFloat16WeightAndGrad) return update_usual<kInARow, BFloat16, BFloat16, true>(now, first);
    if (now.kind == kFloat16Weight) return update_usual<kInARow, Float16, float, true>(now, first);
    if (now.kind == kFloat16WeightAndGrad) return update_usual<kInARow, Float16, Float16, true>(now, first);
  }
}

// The argument checks allow these for float32 only.
__device__ __forceinline__ void add_compensation(const AdamItem& item, float& p, int64_t entry) {
  p += item.weight_dtype == kBFloat16 ? to_float(at<const BFloat16>(item.compensation)[entry])
                                      : to_float(at<const Float16>(item.compensation)[entry]);
}
__device__ __forceinline__ void add_compensation(const AdamItem&, double&, int64_t) {}

__device__ __forceinline__ void round_param(const AdamItem& item, const RandomKeys& keys, float& p, int64_t entry) {
  const bool brain = item.weight_dtype == kBFloat16;
  if (item.stochastic && brain) stochastic_loop<stochastic_bfloat16>(&p, entry, 1, keys);
  if (item.stochastic && !brain) stochastic_loop<stochastic_float16>(&p, entry, 1, keys);
  if (item.compensation && brain) compensated_loop<BFloat16>(&p, at<BFloat16>(item.compensation) + entry, 1);
  if (item.compensation && !brain) compensated_loop<Float16>(&p, at<Float16>(item.compensation) + entry, 1);
}
__device__ __forceinline__ void round_param(const AdamItem&, const RandomKeys&, double&, int64_t) {}

// Four entries of any tensor.
template <class T>
__device__ __forceinline__ void update_any(const CurrentItem<T>& now, const Entries<false>& entries,
                                           const Offsets& place) {
  const AdamItem& item = now.item;
  const Numbers& number = entries.number;
  const Flags& valid = entries.valid;
  Registers<T> p, g, m, v, v_max{};
  read_any(g, item.grad_dtype, item.grad, place.grad, valid);
  read_any(m, item.state_dtype, item.exp_avg, number, valid);
  read_any(v, item.state_dtype, item.exp_avg_sq, number, valid);
  if (item.max_exp_avg_sq) read_any(v_max, item.state_dtype, item.max_exp_avg_sq, number, valid);
  if (item.values)
    read_any(p, sizeof(T) == 8 ? kFloat64 : kFloat32, item.values, number, valid);
  else
    read_any(p, item.weight_dtype, item.weight, place.weight, valid);
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    if (item.compensation && valid[e]) add_compensation(item, p[e], number[e]);
  step_entries(now, p, g, m, v, v_max, item.max_exp_avg_sq != 0, number, valid);
  write_any(item.state_dtype, item.exp_avg, m, number, valid);
  write_any(item.state_dtype, item.exp_avg_sq, v, number, valid);
  if (item.max_exp_avg_sq) write_any(item.state_dtype, item.max_exp_avg_sq, v_max, number, valid);
  if (item.values) write<false>(at<T>(item.values), p, number, valid);
  if (!item.weight) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e)
    if (valid[e]) round_param(item, now.keys, p[e], number[e]);
  write_any(item.weight_dtype, item.weight, p, place.weight, valid);
}

template <class T>
__device__ __forceinline__ void update_tile(const CurrentItem<T>& now, int64_t tile) {
  const AdamItem& item = now.item;
  const int64_t first = tile * kTile, end = first + kTile;
  if (now.kind != kAny) {
    if (now.in_a_row && end <= item.nnz)
      update_kind<true>(now, first);
    else
      update_kind<false>(now, first);
    return;
  }
  Entries<false> entries(first, item.nnz);
  Offsets place(entries);
  Listed(item, entries).find(item, first, entries, place);
  update_any(now, entries, place);
}

// The item that a tile belongs to: the last one whose first tile is not after it. All threads of the block call this.
__device__ __forceinline__ int64_t item_of(const int64_t* first_tiles, int64_t count, int64_t tile) {
  int64_t item = -1;
  for (int64_t i = 0; i < count; i += blockDim.x) {
    const int64_t mine = i + threadIdx.x;
    item += __syncthreads_count(mine < count && first_tiles[mine] <= tile);
  }
  return item;
}

// Fills in `now`; `corrections` has room for two doubles.
template <class T>
__device__ __forceinline__ void begin_item(const AdamStep& step, int64_t number, CurrentItem<T>* now,
                                           double* corrections) {
  const AdamItem& item = step.table.items()[number];
  if (threadIdx.x % kWarp == 0 && threadIdx.x < 2 * kWarp) {
    const bool first = threadIdx.x == 0;
    const double beta = step.rates ? step.rates[first ? 1 : 2] : first ? step.hyper.beta1 : step.hyper.beta2;
    corrections[first ? 0 : 1] = 1 - power(beta, step_number(item));
  }
  __syncthreads();  // and no thread still uses the previous item
  if (threadIdx.x == 0) {
    AdamHyperparameters hyper = step.hyper;
    if (step.rates) {
      hyper.lr = step.rates[0];
      hyper.beta1 = step.rates[1];
      hyper.beta2 = step.rates[2];
    }
    hyper.grad_scale = step.grad_scale ? *step.grad_scale : 1.0;
    now->item = item;
    now->scalars = scalars<T>(hyper, corrections[0], corrections[1]);
    now->keys = RandomKeys(item.seed, static_cast<uint32_t>(step_number(item)));
    now->kind = kind_of<T>(item);
    now->in_a_row = is_in_a_row(item);
  }
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void adam_step(const AdamStep& step) {
  const AdamTable& table = step.table;
  constexpr size_t kShared = sizeof(CurrentItem<T>) + 2 * sizeof(double) + sizeof(unsigned);
  static_assert(kShared <= kAdamShared, "what a block shares has to fit");
  CurrentItem<T>* now = reinterpret_cast<CurrentItem<T>*>(shared_memory());
  double* corrections = reinterpret_cast<double*>(now + 1);
  unsigned* last = reinterpret_cast<unsigned*>(corrections + 2);
  const int64_t* first_tiles = table.first_tiles();
  // Decided here, because the host would have to wait for the flag before it could leave out the launch.
  const bool skipped = step.found_inf && *step.found_inf != 0;
  const int64_t tiles = first_tiles[table.count];
  const int64_t begin = tiles * blockIdx.x / gridDim.x;
  const int64_t end = skipped ? begin : tiles * (blockIdx.x + 1) / gridDim.x;

  int64_t number = begin < end ? item_of(first_tiles, table.count, begin) : 0;
  for (int64_t tile = begin; tile < end;) {
    while (first_tiles[number + 1] <= tile) ++number;
    begin_item(step, number, now, corrections);
    const int64_t item_first = first_tiles[number], item_end = smaller(first_tiles[number + 1], end);
    for (; tile < item_end; ++tile) update_tile(*now, tile - item_first);
  }

  // The last block to get here increments the step counts: all others have read them.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(table.ticket(), 1u) == gridDim.x - 1;
  __syncthreads();
  if (!*last) return;
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

__global__ void __launch_bounds__(gradsel::kAdamThreads, 3) gradsel_adam_step_32(const gradsel::AdamStep step) {
  gradsel::adam_step<float>(step);
}
__global__ void __launch_bounds__(gradsel::kAdamThreads, 2) gradsel_adam_step_64(const gradsel::AdamStep step) {
  gradsel::adam_step<double>(step);
}

}  // extern "C"
