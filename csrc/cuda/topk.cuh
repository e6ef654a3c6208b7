// Row-wise top-K of |grad| for K up to kMostFew, in two kernels that read a gradient once from memory; topk_many.cuh
// has the kernel for larger K.
//
// A warp goes through a row in chunks that it holds in registers; several warps can share a row. topk_one is for K = 1.
// topk_few keeps a list of candidates in shared memory. A bound admits only a few: in the first chunk, every lane
// delegates the largest magnitudes of two or four parts of its columns, and the bound is one that K delegates reach. So
// K columns of the chunk reach it, and few more (8.5 on average for K = 8 and 768 normal numbers, 84 for K = 64). When
// the list is nearly full, it is cut to exactly the K best, the smallest of which becomes the bound.
//
// Keys are magnitudes as integers. All NaNs count as one key just above infinity's, but comparisons with a bound need
// no such clamping, because no bound is above that key. Columns past the end of a row have the key 0, and lose ties
// because their numbers are the highest.
//
// The functions take the number of their block within the matrix, and its shared memory, because another kernel can
// select in several matrices. Each entry that is chosen is handed to `each`, by one thread: its row, its position among
// the row's entries and its column.
#pragma once

#include "cuda/device.cuh"
#include "cuda/topk.h"
#include "cuda/topk_many.cuh"

namespace gradsel {

// A warp's share of a row in registers: vectors of 16 bytes, lane after lane.
template <class Raw>
struct Chunk {
  using Key = typename KeyOf<Raw>::Type;
  static constexpr int kPerVector = 16 / sizeof(Raw);
  static constexpr int kPerLane = columns_of_lane(sizeof(Raw));
  static constexpr int kVectors = kPerLane / kPerVector;
  static constexpr int kColumns = kPerLane * kWarp;

  uint4 vectors[kVectors];

  // Columns first .. first + kColumns - 1.
  __device__ __forceinline__ void load(const TopK& p, const Raw* row, int64_t first) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t col = first + column(v * kPerVector);
      vectors[v] = make_uint4(0, 0, 0, 0);
      if (p.vectors && col + kPerVector <= p.cols) {
        vectors[v] = *reinterpret_cast<const uint4*>(row + col);
      } else if (col < p.cols) {
#pragma unroll
        for (int e = 0; e < kPerVector; ++e)
          if (col + e < p.cols) put(vectors[v], e, row[(col + e) * p.col_stride]);
      }
    }
  }

  // The j-th key of this lane, in ascending order of columns, and its column, counted from the chunk's first.
  __device__ __forceinline__ Key key(int j) const { return magnitude(get(vectors[j / kPerVector], j % kPerVector)); }
  static __device__ __forceinline__ unsigned column(int j) {
    return (j / kPerVector * kWarp + lane_number()) * kPerVector + j % kPerVector;
  }

 private:
  static __device__ __forceinline__ unsigned word(const uint4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }
  static __device__ __forceinline__ void or_word(uint4& x, int i, unsigned bits) {
    (i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w) |= bits;
  }
  static __device__ __forceinline__ Raw get(const uint4& x, int e) {
    if (sizeof(Raw) == 2) return static_cast<Raw>(word(x, e / 2) >> (16 * (e % 2)));
    if (sizeof(Raw) == 4) return static_cast<Raw>(word(x, e));
    return static_cast<Raw>(word(x, 2 * e) | (static_cast<uint64_t>(word(x, 2 * e + 1)) << 32));
  }
  static __device__ __forceinline__ void put(uint4& x, int e, Raw raw) {  // over zero
    if (sizeof(Raw) == 2) {
      or_word(x, e / 2, static_cast<unsigned>(raw) << (16 * (e % 2)));
    } else if (sizeof(Raw) == 4) {
      or_word(x, e, static_cast<unsigned>(raw));
    } else {
      or_word(x, 2 * e, static_cast<unsigned>(raw));
      or_word(x, 2 * e + 1, static_cast<unsigned>(static_cast<uint64_t>(raw) >> 32));
    }
  }
};

// Where a warp works. Warps that share a row each take chunks begin .. end - 1 of it. Rows have less than 2^31 columns.
template <class Raw>
struct Place {
  int64_t row;
  int warp, part, parts, begin, end;
  bool inside;

  __device__ __forceinline__ Place(const TopK& p, int64_t block) {
    const int shift = p.log2_warps, all = blockDim.x / kWarp;
    warp = static_cast<int>(threadIdx.x / kWarp);
    parts = 1 << shift;
    part = warp & (parts - 1);
    row = block * (all >> shift) + (warp >> shift);
    inside = row < p.rows;
    const int chunks = static_cast<int>((p.cols + Chunk<Raw>::kColumns - 1) / Chunk<Raw>::kColumns);
    begin = (chunks * part) >> shift;
    end = inside ? (chunks * (part + 1)) >> shift : begin;
  }
};

// The packed mask of a row from its k columns; every lane makes the words that it stores.
__device__ __forceinline__ void store_bits(const TopK& p, int64_t row, const uint32_t* cols) {
  const int64_t words = (p.cols + 31) / 32;
  for (int64_t w = lane_number(); w < words; w += kWarp) {
    uint32_t word = 0;
    for (int i = 0; i < p.k; ++i)
      if (cols[i] / 32 == w) word |= 1u << (cols[i] % 32);
    in_global_memory(p.bits)[row * words + w] = word;
  }
}

template <class Key>
__device__ __forceinline__ void reduce_to_best(Key& key, uint32_t& col) {
  const Key best = warp_max(key);
  col = warp_min(key == best ? col : ~0u);
  key = best;
}

template <class Raw, class Each>
__device__ __forceinline__ void topk_one(const TopK& p, int64_t block, unsigned char* shared, const Each& each) {
  using Key = typename KeyOf<Raw>::Type;
  const Place<Raw> place(p, block);
  const Raw* row = row_of<Raw>(p, place.row);
  const Key nan = static_cast<Key>(p.nan);
  Key best = 0;
  uint32_t best_col = static_cast<uint32_t>(place.begin) * Chunk<Raw>::kColumns + Chunk<Raw>::column(0);
  for (int c = place.begin; c < place.end; ++c) {
    const int64_t first = static_cast<int64_t>(c) * Chunk<Raw>::kColumns;
    Chunk<Raw> chunk;
    chunk.load(p, row, first);
#pragma unroll
    for (int j = 0; j < Chunk<Raw>::kPerLane; ++j) {
      const Key key = smaller(chunk.key(j), nan);
      if (key > best) {
        best = key;
        best_col = static_cast<uint32_t>(first) + Chunk<Raw>::column(j);
      }
    }
  }
  reduce_to_best(best, best_col);

  if (place.parts > 1) {
    Key* keys = reinterpret_cast<Key*>(shared);
    uint32_t* cols = reinterpret_cast<uint32_t*>(keys + blockDim.x / kWarp);
    if (lane_number() == 0) {
      keys[place.warp] = best;
      cols[place.warp] = best_col;
    }
    __syncthreads();
    const bool has = lane_number() < static_cast<unsigned>(place.parts);
    best = has ? keys[place.warp - place.part + lane_number()] : 0;
    best_col = has ? cols[place.warp - place.part + lane_number()] : ~0u;
    reduce_to_best(best, best_col);
  }
  if (!place.inside || place.part != 0) return;
  if (lane_number() == 0) in_global_memory(p.out)[place.row] = static_cast<int32_t>(best_col);
  if (p.bits) store_bits(p, place.row, &best_col);
  if (lane_number() == 0) each(place.row, 0, best_col);
}

// The middle between two keys, rounded up.
template <class Key>
__device__ __forceinline__ Key middle_of(Key low, Key high) {
  return low + (high - low) / 2 + (high - low) % 2;
}

// Candidates of a warp, in shared memory.
template <class Key>
struct Candidates {
  static constexpr int kPerLane = kCandidates / kWarp;

  Key* keys;
  uint32_t* cols;
  int count = 0;
  Key bound = 0;  // no smaller key can be one of the K largest

  __device__ __forceinline__ Candidates(unsigned char* shared, int warp) {
    unsigned char* mine = shared + static_cast<unsigned>(warp) * kCandidates * (sizeof(Key) + 4);
    keys = reinterpret_cast<Key*>(mine);
    cols = reinterpret_cast<uint32_t*>(mine + kCandidates * sizeof(Key));
  }

  // Called by all lanes; adds one candidate for each lane that has one. There must be room.
  __device__ __forceinline__ void add(bool has, Key key, uint32_t col) {
    const unsigned lanes = __ballot_sync(kAllLanes, has);
    if (has) {
      const int slot = count + __popc(lanes & lanes_before());
      keys[slot] = key;
      cols[slot] = col;
    }
    count += __popc(lanes);
  }

  // Drops all but the k best; there must be at least k. The bound is then above their smallest key, because later
  // columns lose ties. Returns false when no further candidate can get in.
  __device__ __forceinline__ bool keep_best(int k, Key nan) {
    __syncwarp();
    Key key[kPerLane];
    uint32_t col[kPerLane];
    bool valid[kPerLane];
    Key low = ~Key{0}, high = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int slot = i * static_cast<int>(kWarp) + static_cast<int>(lane_number());
      valid[i] = slot < count;
      key[i] = valid[i] ? keys[slot] : 0;
      col[i] = valid[i] ? cols[slot] : ~0u;
      if (valid[i]) {
        low = smaller(low, key[i]);
        high = larger(high, key[i]);
      }
    }
    low = warp_min(low);
    high = warp_max(high);
    __syncwarp();
    // The k-th largest key is the largest that k keys reach. The search can stop early at one that exactly k reach.
    int reach = count;
#pragma unroll 1
    while (low < high && reach != k) {
      const Key middle = middle_of(low, high);
      int found = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        if (i * static_cast<int>(kWarp) < count)
          found += __popc(__ballot_sync(kAllLanes, valid[i] && key[i] >= middle));
      if (found >= k) {
        low = middle;
        reach = found;
      } else {
        high = middle - 1;
      }
    }
    uint32_t last_col = ~0u;  // of those with the key `low`
    if (reach != k) {         // ties: the lowest columns win
      uint32_t first = 0;
#pragma unroll 1
      while (first < last_col) {
        const uint32_t middle = first + (last_col - first) / 2;
        int found = 0;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          found += __popc(
              __ballot_sync(kAllLanes, valid[i] && (key[i] > low || (key[i] == low && col[i] <= middle))));
        if (found >= k)
          last_col = middle;
        else
          first = middle + 1;
      }
    }
    Key smallest = ~Key{0};
    count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool stays = valid[i] && (key[i] > low || (key[i] == low && col[i] <= last_col));
      if (stays) smallest = smaller(smallest, key[i]);
      add(stays, key[i], col[i]);
    }
    __syncwarp();
    smallest = warp_min(smallest);
    bound = smallest + (smallest < nan);
    return smallest < nan;
  }
};

// A bound that at least k columns of a chunk reach: every lane has `count` delegates.
template <int count, class Raw>
__device__ __forceinline__ typename KeyOf<Raw>::Type bound_of(const Chunk<Raw>& chunk, int k,
                                                              typename KeyOf<Raw>::Type nan) {
  using Key = typename KeyOf<Raw>::Type;
  Key delegates[count] = {};
#pragma unroll
  for (int j = 0; j < Chunk<Raw>::kPerLane; ++j) delegates[j % count] = larger(delegates[j % count], chunk.key(j));
  Key low = nan, high = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    delegates[i] = smaller(delegates[i], nan);
    low = smaller(low, delegates[i]);
    high = larger(high, delegates[i]);
  }
  low = warp_min(low);
  high = warp_max(high);
  constexpr int kSteps = 10;  // a few candidates too many cost less than further steps
#pragma unroll 1
  for (int step = 0; step < kSteps && low < high; ++step) {
    const Key middle = middle_of(low, high);
    int reach = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) reach += __popc(__ballot_sync(kAllLanes, delegates[i] >= middle));
    if (reach >= k)
      low = middle;
    else
      high = middle - 1;
    if (reach == k) break;
  }
  return low;
}

// Adds a chunk's candidates. Returns false when the row needs no further chunk.
template <class Raw>
__device__ __forceinline__ bool add_chunk(const TopK& p, const Raw* row, int64_t first, const Chunk<Raw>& chunk,
                                          Candidates<typename KeyOf<Raw>::Type>& list) {
  using Key = typename KeyOf<Raw>::Type;
  const Key nan = static_cast<Key>(p.nan);
  unsigned reaching = 0;
#pragma unroll
  for (int j = 0; j < Chunk<Raw>::kPerLane; ++j) reaching |= static_cast<unsigned>(chunk.key(j) >= list.bound) << j;
  if (!__any_sync(kAllLanes, reaching != 0)) return true;
  unsigned found;
  const int slot = list.count + static_cast<int>(warp_sum_before(__popc(reaching), &found));
  if (list.count + static_cast<int>(found) <= kCandidates) {
    for (int i = slot; reaching; ++i, reaching &= reaching - 1) {
      // Registers cannot be indexed at run time, so the key is read again, from the cache.
      const int64_t col = first + Chunk<Raw>::column(__ffs(static_cast<int>(reaching)) - 1);
      list.keys[i] = smaller(col < p.cols ? magnitude(row[col * p.col_stride]) : Key{0}, nan);
      list.cols[i] = static_cast<uint32_t>(col);
    }
    list.count += static_cast<int>(found);
    return list.count <= p.k + kSlack || list.keep_best(p.k, nan);
  }
  // Many ties, or an ascending row: one vector of columns after another, so that later ones are known to lose ties.
#pragma unroll 1
  for (int i = 0; i < Chunk<Raw>::kPerLane; ++i) {
    const int64_t col = first + i * kWarp + lane_number();
    const Key key = col < p.cols ? smaller(magnitude(row[col * p.col_stride]), nan) : Key{0};
    list.add(key >= list.bound, key, static_cast<uint32_t>(col));
    if (list.count > kCandidates - static_cast<int>(kWarp) && !list.keep_best(p.k, nan)) return false;
  }
  return true;
}

template <class Raw, class Each>
__device__ __forceinline__ void topk_few(const TopK& p, int64_t block, unsigned char* shared, const Each& each) {
  using Key = typename KeyOf<Raw>::Type;
  const Place<Raw> place(p, block);
  const Raw* row = row_of<Raw>(p, place.row);
  const Key nan = static_cast<Key>(p.nan);
  Candidates<Key> list(shared, place.warp);
  for (int c = place.begin; c < place.end; ++c) {
    const int64_t first = static_cast<int64_t>(c) * Chunk<Raw>::kColumns;
    Chunk<Raw> chunk;
    chunk.load(p, row, first);
    if (c == place.begin)
      list.bound = p.k <= kFewDelegates ? bound_of<2>(chunk, p.k, nan) : bound_of<4>(chunk, p.k, nan);
    if (!add_chunk(p, row, first, chunk, list)) break;
  }
  if (list.count > p.k) list.keep_best(p.k, nan);

  if (place.parts > 1) {  // lists of higher columns are added to the first part's one by one
    int* counts = reinterpret_cast<int*>(shared + blockDim.x / kWarp * kCandidates * (sizeof(Key) + 4));
    if (lane_number() == 0) counts[place.warp] = list.count;
    __syncthreads();
    for (int w = 1; place.inside && place.part == 0 && w < place.parts; ++w) {
      const Candidates<Key> other(shared, place.warp + w);
      const int count = counts[place.warp + w];
      for (int i = 0; i < count; i += static_cast<int>(kWarp)) {
        const int slot = i + static_cast<int>(lane_number());
        const bool has = slot < count && other.keys[slot] >= list.bound;
        list.add(has, has ? other.keys[slot] : 0, has ? other.cols[slot] : 0);
        if (list.count > kCandidates - static_cast<int>(kWarp)) list.keep_best(p.k, nan);
      }
    }
    if (list.count > p.k) list.keep_best(p.k, nan);
  }
  if (!place.inside || place.part != 0) return;
  __syncwarp();
  if (p.bits) store_bits(p, place.row, list.cols);
  for (int i = static_cast<int>(lane_number()); i < p.k; i += static_cast<int>(kWarp)) {
    const uint32_t col = list.cols[i];
    int position = 0;
    for (int j = 0; j < p.k; ++j) position += list.cols[j] < col;
    in_global_memory(p.out)[place.row * p.k + position] = static_cast<int32_t>(col);
    each(place.row, position, col);
  }
}

struct Nothing {
  __device__ __forceinline__ void operator()(int64_t, int, uint32_t) const {}
};

}  // namespace gradsel

#define GRADSEL_TOPK(kind, size, threads, blocks)                                                    \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                      \
      gradsel_topk_##kind##_##size(const gradsel::TopK p) {                                          \
    gradsel::topk_##kind<uint##size##_t>(p, blockIdx.x, gradsel::shared_memory(), gradsel::Nothing{}); \
  }
GRADSEL_TOPK(one, 16, gradsel::kTopKThreads, 7)
GRADSEL_TOPK(one, 32, gradsel::kTopKThreads, 7)
GRADSEL_TOPK(one, 64, gradsel::kTopKThreads, 7)
GRADSEL_TOPK(few, 16, gradsel::kTopKThreads, 6)
GRADSEL_TOPK(few, 32, gradsel::kTopKThreads, 6)
GRADSEL_TOPK(few, 64, gradsel::kTopKThreads, 4)
GRADSEL_TOPK(many, 16, gradsel::kTopKManyThreads, 4)
GRADSEL_TOPK(many, 32, gradsel::kTopKManyThreads, 4)
GRADSEL_TOPK(many, 64, gradsel::kTopKManyThreads, 4)
#undef GRADSEL_TOPK
