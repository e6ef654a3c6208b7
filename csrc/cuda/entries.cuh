// The entries that a thread of a masked Adam step works on: which they are, where they lie, and how they are read and
// written.
#pragma once

#include <type_traits>

#include "common/adam_item.h"
#include "cuda/adam.h"
#include "cuda/device.cuh"

namespace gradsel {

using Numbers = int64_t[kPerThread];
using Flags = bool[kPerThread];

// Numbers in mask order. With kInARow, a thread's entries are neighbours, and their data are contiguous and aligned;
// otherwise neighbouring lanes hold neighbouring entries.
template <bool kInARow>
struct Entries {
  Numbers number;
  Flags valid;

  __device__ __forceinline__ Entries(int64_t first, int64_t end) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      number[e] = first + (kInARow ? threadIdx.x * kPerThread + e : e * kAdamThreads + threadIdx.x);
      valid[e] = number[e] < end;
    }
  }
};

// Reading and writing. What is read is converted only by get(): a conversion waits for its load, and all loads should
// be issued before the first wait. Registers hold whole words: with arrays of 16-bit numbers the compiler (nvcc 13.0)
// takes minutes.

template <class Stored>
using Bits = std::conditional_t<sizeof(Stored) == 8, uint64_t, uint32_t>;

// A number from its bits. For 16-bit numbers the upper half of the word is ignored.
template <class Stored>
__device__ __forceinline__ Stored from_bits(Bits<Stored> bits) {
  if constexpr (sizeof(Stored) == 2)
    return Stored{static_cast<uint16_t>(bits)};
  else
    return bit_cast<Stored>(bits);
}
template <class Stored>
__device__ __forceinline__ Bits<Stored> bits_from(Stored x) {
  if constexpr (sizeof(Stored) == 2)
    return x.bits;
  else
    return bit_cast<Bits<Stored>>(x);
}

// Four numbers as stored, at offsets in elements.
template <bool kInARow, class Stored>
struct Held {
  Bits<Stored> bits[kPerThread];

  __device__ __forceinline__ void read(const Stored* from, const Numbers& offset, const Flags& valid) {
    using Memory = std::conditional_t<sizeof(Stored) == 2, uint16_t, Bits<Stored>>;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e)
      bits[e] = valid[e] ? reinterpret_cast<const Memory*>(from)[offset[e]] : Memory{0};
  }
  __device__ __forceinline__ Stored get(int e) const { return from_bits<Stored>(bits[e]); }
};

// The same in vectors: one holds 4 numbers of 16 or 32 bits, or 2 of 64.
template <class Stored>
struct Held<true, Stored> {
  using Vector = std::conditional_t<sizeof(Stored) == 2, uint2, uint4>;
  static constexpr int kVectors = sizeof(Stored) == 8 ? 2 : 1;
  static constexpr int kPerVector = kPerThread / kVectors;
  Vector vectors[kVectors];

  __device__ __forceinline__ void read(const Stored* from, const Numbers& offset, const Flags&) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      vectors[i] = *reinterpret_cast<const Vector*>(from + offset[0] + i * kPerVector);
  }
  __device__ __forceinline__ Stored get(int e) const {
    if constexpr (sizeof(Stored) == 2) {
      const unsigned word = e < 2 ? vectors[0].x : vectors[0].y;
      return from_bits<Stored>(word >> (16 * (e % 2)));
    } else if constexpr (sizeof(Stored) == 4) {
      return from_bits<Stored>(e == 0 ? vectors[0].x : e == 1 ? vectors[0].y : e == 2 ? vectors[0].z : vectors[0].w);
    } else {
      const uint4& vector = vectors[e / 2];
      const uint64_t low = e % 2 ? vector.z : vector.x, high = e % 2 ? vector.w : vector.y;
      return from_bits<Stored>(low | high << 32);
    }
  }
};

// By intrinsics, because the compiler splits the assignment of a vector into its elements.
template <class Stored>
__device__ __forceinline__ void write_vectors(Stored* to, const Stored (&from)[kPerThread]) {
  const auto bits = [&](int e) { return bits_from(from[e]); };
  if constexpr (sizeof(Stored) == 2) {
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(bits(0) | bits(1) << 16, bits(2) | bits(3) << 16));
  } else if constexpr (sizeof(Stored) == 4) {
    __stwb(reinterpret_cast<uint4*>(to), make_uint4(bits(0), bits(1), bits(2), bits(3)));
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; e += 2)
      __stwb(reinterpret_cast<uint4*>(to + e),
             make_uint4(static_cast<unsigned>(bits(e)), static_cast<unsigned>(bits(e) >> 32),
                        static_cast<unsigned>(bits(e + 1)), static_cast<unsigned>(bits(e + 1) >> 32)));
  }
}

template <bool kInARow, class Stored, class T>
__device__ __forceinline__ void write(Stored* to, const T (&from)[kPerThread], const Numbers& offset,
                                      const Flags& valid) {
  if constexpr (kInARow) {
    const Stored stored[kPerThread] = {convert<Stored>(from[0]), convert<Stored>(from[1]), convert<Stored>(from[2]),
                                       convert<Stored>(from[3])};
    write_vectors(to + offset[0], stored);
  } else {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e)
      if (valid[e]) to[offset[e]] = convert<Stored>(from[e]);
  }
}

// Calls body with a null pointer of the dtype.
template <class Body>
__device__ __forceinline__ void with_dtype(int64_t dtype, const Body& body) {
  switch (dtype) {
    case kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case kFloat16: return body(static_cast<Float16*>(nullptr));
    case kFloat64: return body(static_cast<double*>(nullptr));
    default: return body(static_cast<float*>(nullptr));
  }
}

// The same for any dtype, converted at once: one number, or four.

template <class T>
__device__ __forceinline__ T read_one(int64_t dtype, int64_t address, int64_t offset) {
  T to;
  with_dtype(dtype, [&](auto* typed) {
    to = convert<T>(at<const std::remove_pointer_t<decltype(typed)>>(address)[offset]);
  });
  return to;
}

template <class T>
__device__ __forceinline__ void write_one(int64_t dtype, int64_t address, T from, int64_t offset) {
  with_dtype(dtype, [&](auto* typed) {
    using Stored = std::remove_pointer_t<decltype(typed)>;
    at<Stored>(address)[offset] = convert<Stored>(from);
  });
}

template <class T>
__device__ __forceinline__ void read_any(T (&to)[kPerThread], int64_t dtype, int64_t address, const Numbers& offset,
                                         const Flags& valid) {
  with_dtype(dtype, [&](auto* typed) {
    using Stored = std::remove_pointer_t<decltype(typed)>;
    Held<false, Stored> held;
    held.read(at<const Stored>(address), offset, valid);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) to[e] = convert<T>(held.get(e));
  });
}

template <class T>
__device__ __forceinline__ void write_any(int64_t dtype, int64_t address, const T (&from)[kPerThread],
                                          const Numbers& offset, const Flags& valid) {
  with_dtype(dtype, [&](auto* typed) {
    using Stored = std::remove_pointer_t<decltype(typed)>;
    write<false>(at<Stored>(address), from, offset, valid);
  });
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
  return (item.weight | item.values | item.grad | item.exp_avg | item.exp_avg_sq) % 16 == 0;
}

// Where four entries lie in the weight and in a dense gradient.
struct Offsets {
  Numbers weight, grad;

  template <bool kInARow>
  __device__ __forceinline__ explicit Offsets(const Entries<kInARow>& entries) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) weight[e] = grad[e] = entries.number[e];
  }
};

// What the index lists for four entries: columns or flat indices; -1 for those that are not valid.
struct Listed {
  int32_t narrow[kPerThread];
  int64_t wide[kPerThread];

  __device__ __forceinline__ Listed(const AdamItem& item, const Entries<false>& entries) {
    const bool listed = item.weight && item.layout != kAll;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      narrow[e] = -1;
      wide[e] = -1;
    }
    if (listed && !item.index_is_64) {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e)
        if (entries.valid[e]) narrow[e] = at<const int32_t>(item.index)[entries.number[e]];
    }
    if (listed && item.index_is_64) {
#pragma unroll
      for (int e = 0; e < kPerThread; ++e)
        if (entries.valid[e]) wide[e] = at<const int64_t>(item.index)[entries.number[e]];
    }
  }

  // `first` is the first entry. Entries outside the tensor become invalid.
  __device__ __forceinline__ void find(const AdamItem& item, int64_t first, Entries<false>& entries,
                                       Offsets& place) const {
    if (!item.weight) return;
    const View weight = weight_view(item), grad = grad_view(item);
    if (item.layout == kCols) {
      // The first entry's row takes a 64-bit division, the others only 32-bit ones.
      const int64_t first_row = first / item.index_width;
      const unsigned from_row = static_cast<unsigned>(first % item.index_width);
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        const unsigned beyond = from_row + static_cast<unsigned>(entries.number[e] - first);
        const int64_t row = first_row + beyond / static_cast<unsigned>(item.index_width), col = narrow[e];
        entries.valid[e] = entries.valid[e] && col >= 0 && col < item.cols;
        place.weight[e] = row * weight.row_stride + col * weight.col_stride;
        if (item.grad_is_dense) place.grad[e] = row * grad.row_stride + col * grad.col_stride;
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int64_t flat = item.layout == kAll ? entries.number[e] : item.index_is_64 ? wide[e] : narrow[e];
      entries.valid[e] = entries.valid[e] && flat >= 0 && flat < item.rows * item.cols;
      place.weight[e] = weight.offset(flat);
      if (item.grad_is_dense) place.grad[e] = grad.offset(flat);
    }
  }
};

}  // namespace gradsel
