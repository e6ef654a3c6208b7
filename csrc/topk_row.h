// The selection of one row. No include guard: topk.cpp includes this once for each SIMD level, because a template
// cannot take its target attribute as a parameter. Needs TOPK_LEVEL (a namespace), TOPK_TARGET (the attribute) and
// TOPK_REG (1 when topk_simd.h has registers for the level).
//
// A row is visited in chunks of 64 columns; column c belongs to lane c mod 64, or mod 128 or 256. One pass keeps the
// maximum of each lane. If t is such that K lane maxima are >= t, then K elements are, so the row's K largest are all
// among its elements >= t. With t near the K-th largest lane maximum these are few (K = 8 of 768: 9 on average), a
// second pass over the row, now in cache, lists them, and the exact choice is made in the list. Rows too short for
// that, or with too many ties, are searched as a whole for their K-th key. Both ways give the same answer.

namespace gradsel {
namespace TOPK_LEVEL {

#define FN TOPK_TARGET static inline
#define FN_INLINE TOPK_TARGET static GRADSEL_INLINE

// A row as whole chunks and a padded tail, so that no kernel reads past its end.
template <class Key>
struct Row {
  const Key* keys;
  const Key* next;     // the row after it, if it is to be prefetched, or null
  int64_t chunks;      // whole ones
  uint64_t tail_mask;  // valid columns of the tail; 0: there is none
  Key tail[64];

  FN_INLINE void split(Row& row, const Key* keys, const Key* next, int64_t n) {
    row.keys = keys;
    row.next = next;
    row.chunks = n / 64;
    const int64_t rest = n % 64;
    row.tail_mask = rest ? ~uint64_t{0} >> (64 - rest) : 0;
    if (rest) {
      std::memset(row.tail, 0, sizeof(row.tail));
      std::memcpy(row.tail, keys + 64 * row.chunks, static_cast<size_t>(rest) * sizeof(Key));
    }
  }
};

template <class Key>
FN_INLINE Key magnitude(Key raw) {
  return static_cast<Key>(raw & KeyTraits<Key>::magnitude);
}

// Asks for half of a chunk of the next row: the first pass for its even lines, the second for the odd ones. That covers
// the search for a threshold in between, which leaves the memory idle. It pays (by a sixth) for short rows and K > 1
// only: long rows are left to the processor's own prefetchers, which requests in between slow down.
template <class Key>
FN_INLINE void prefetch_next(const Row<Key>& row, int64_t chunk, int pass) {
#if TOPK_REG
  if (!row.next) return;
  const char* line = reinterpret_cast<const char*>(row.next + 64 * chunk);
#pragma GCC unroll 8
  for (int j = pass; j < static_cast<int>(sizeof(Key)); j += 2) __builtin_prefetch(line + 64 * j);
#else
  (void)row, (void)chunk, (void)pass;
#endif
}

constexpr int64_t kPrefetchBytes = 8192;  // the longest row that is prefetched

// Maxima of groups * 64 lanes. A lane without columns gets 0, the smallest key.
template <int groups, class Key>
FN void lane_maxima(const Row<Key>& row, Key* lanes) {
#if TOPK_REG
  using R = Reg<Key>;
  constexpr int per_chunk = 64 / R::lanes, count = groups * per_chunk;
  R best[count];
  for (int j = 0; j < count; ++j) best[j] = R::all(0);
  const Key* p = row.keys;
  int64_t c = 0;
  for (; c + groups <= row.chunks; c += groups, p += 64 * groups) {
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) best[j] = R::max(best[j], R::load_magnitude(p + j * R::lanes));
#pragma GCC unroll 4
    for (int j = 0; j < groups; ++j) prefetch_next(row, c + j, 0);
  }
#pragma GCC unroll 32
  for (int j = 0; j < count; ++j) R::store(lanes + j * R::lanes, best[j]);
  Key* lane = lanes;
  for (; c < row.chunks; ++c, p += 64, lane += 64)
    for (int j = 0; j < 64; ++j) lane[j] = std::max(lane[j], magnitude(p[j]));
#else
  for (int j = 0; j < groups * 64; ++j) lanes[j] = 0;
  const Key* p = row.keys;
  Key* lane = lanes;
  for (int64_t c = 0; c < row.chunks; ++c, p += 64) {
    lane = lanes + 64 * (c % groups);
    for (int j = 0; j < 64; ++j) lane[j] = std::max(lane[j], magnitude(p[j]));
  }
  lane = lanes + 64 * (row.chunks % groups);
#endif
  if (row.tail_mask)
    for (int j = 0; j < 64; ++j) lane[j] = std::max(lane[j], magnitude(row.tail[j]));
}

// One bit for each of 64 keys that is >= t. `raw` keys still have their sign bit.
template <bool raw, class Key>
FN_INLINE uint64_t at_least(const Key* keys, Key t) {
  uint64_t bits = 0;
#if TOPK_REG
  using R = Reg<Key>;
  const R bound = R::all(t);
#pragma GCC unroll 16
  for (int j = 0; j < 64 / R::lanes; ++j) {
    const R x = raw ? R::load_magnitude(keys + j * R::lanes) : R::load(keys + j * R::lanes);
    bits |= R::at_least(x, bound) << (j * R::lanes);
  }
#else
  int any = 0;
  for (int j = 0; j < 64; ++j) any |= (raw ? magnitude(keys[j]) : keys[j]) >= t;
  if (!any) return 0;
  for (int j = 0; j < 64; ++j) bits |= static_cast<uint64_t>((raw ? magnitude(keys[j]) : keys[j]) >= t) << j;
#endif
  return bits;
}

template <class Key>
FN int64_t count_at_least(const Row<Key>& row, Key t) {
  int64_t count = 0;
  for (int64_t c = 0; c < row.chunks; ++c) count += popcount(at_least<true>(row.keys + 64 * c, t));
  if (row.tail_mask) count += popcount(at_least<true>(row.tail, t) & row.tail_mask);
  return count;
}

// Keys without sign bits in whole chunks, padded with -1.
template <class Key>
struct List {
  const Key* keys;
  int chunks;
};

template <class Key>
FN int64_t count_at_least(const List<Key>& list, Key t) {
  int64_t count = 0;
  for (int c = 0; c < list.chunks; ++c) count += popcount(at_least<false>(list.keys + 64 * c, t));
  return count;
}

template <class Key>
FN_INLINE Key middle_of(Key low, Key high) {  // rounded up
  return static_cast<Key>(low + (high - low) / 2 + (high - low) % 2);
}

// A t in low .. high with at least k keys >= t, near the largest such. At least k keys must be >= low. No branches: the
// outcome of each step is a coin flip, and a wrong guess costs as much as the step.
template <class Key>
FN Key near_kth_key(const List<Key>& keys, int64_t k, Key low, Key high) {
  constexpr int steps = 8;  // to 1/256 of the range: a few candidates too many cost less than further steps
  for (int step = 0; step < steps; ++step) {
    const Key middle = middle_of(low, high);
    const bool enough = count_at_least(keys, middle) >= k;
    low = enough ? middle : low;
    high = enough ? high : std::max(low, static_cast<Key>(middle - 1));
  }
  return low;
}

// The largest t in low .. high with at least k keys >= t, or one with exactly k. At least k keys must be >= low.
template <class Key, class Keys>
FN Key kth_key(const Keys& keys, int64_t k, Key low, Key high) {
  while (low < high) {
    const Key middle = middle_of(low, high);
    const int64_t count = count_at_least(keys, middle);
    if (count >= k) {
      low = middle;
      if (count == k) break;
    } else {
      high = static_cast<Key>(middle - 1);
    }
  }
  return low;
}

template <class Key>
FN Key largest(const Key* keys, int count) {
  Key high = keys[0];
  for (int j = 1; j < count; ++j) high = std::max(high, keys[j]);
  return high;
}

template <class Key>
FN Key smallest(const Key* keys, int count) {
  Key low = keys[0];
  for (int j = 1; j < count; ++j) low = std::min(low, keys[j]);
  return low;
}

// All NaNs are one key, just above infinity's: `nan`. A bound t <= nan sorts unclamped keys as it sorts clamped ones.

// Up to here a row is searched to its end: where the search would stop cannot be predicted, and a wrong guess keeps the
// processor from starting on the next row meanwhile.
constexpr int64_t kShortChunks = 32;

template <class Key>
FN void select_one(const Row<Key>& row, Key nan, int32_t* out) {
  Key lanes[64];
  lane_maxima<1>(row, lanes);
  const Key best = std::min(largest(lanes, 64), nan);
  const uint64_t winners = at_least<false>(lanes, best);
  if ((winners & (winners - 1)) == 0) {  // one lane: 1 in 64 of the row to look at
    const int lane = lowest_bit(winners);
    if (row.chunks <= kShortChunks) {
      int64_t first = row.chunks;
      for (int64_t c = row.chunks - 1; c >= 0; --c) first = magnitude(row.keys[64 * c + lane]) >= best ? c : first;
      *out = static_cast<int32_t>(64 * first + lane);
      return;
    }
    for (int64_t c = 0; c < row.chunks; ++c) {
      if (magnitude(row.keys[64 * c + lane]) >= best) {
        *out = static_cast<int32_t>(64 * c + lane);
        return;
      }
    }
    *out = static_cast<int32_t>(64 * row.chunks + lane);
    return;
  }
  for (int64_t c = 0; c < row.chunks; ++c) {
    const uint64_t bits = at_least<true>(row.keys + 64 * c, best);
    if (bits) {
      *out = static_cast<int32_t>(64 * c + lowest_bit(bits));
      return;
    }
  }
  *out = static_cast<int32_t>(64 * row.chunks + lowest_bit(at_least<true>(row.tail, best) & row.tail_mask));
}

constexpr int kCandidates = 512;
constexpr int kRanked = 32;  // so many are ranked one by one: independent steps, faster than a search

// Chooses k of `count` candidates, which are in column order.
template <class Key>
FN void choose(Key* keys, const int32_t* cols, int count, int k, int32_t* out) {
  if (count == k) {
    for (int j = 0; j < k; ++j) out[j] = cols[j];
    return;
  }
  const int padded = (count + 63) / 64 * 64;
  for (int j = count; j < padded; ++j) keys[j] = -1;
  if (count <= kRanked) {
    int at = 0;
    for (int j = 0; j < count && at < k; ++j) {
      const uint64_t above = at_least<false>(keys, static_cast<Key>(keys[j] + 1));
      const uint64_t before = at_least<false>(keys, keys[j]) & ((uint64_t{1} << j) - 1);  // ties in earlier columns
      out[at] = cols[j];
      at += popcount(above | before) < k;
    }
    return;
  }
  const List<Key> list{keys, padded / 64};
  const Key low = smallest(keys, count), high = largest(keys, count);
  const Key kth = kth_key(list, k, low, high);
  int64_t ties = k - count_at_least(list, static_cast<Key>(kth + 1));  // kth is a magnitude <= nan: no overflow
  int32_t chosen[kCandidates + 1];
  int at = 0;
  for (int j = 0; j < count; ++j) {  // without branches: the outcome is a coin flip
    const bool tie = keys[j] == kth && ties > 0;
    chosen[at] = cols[j];
    at += keys[j] > kth || tie;
    ties -= tie;
  }
  std::memcpy(out, chosen, static_cast<size_t>(k) * sizeof(int32_t));
}

// False when the candidates are too many; k must not exceed the lanes that have columns.
template <int groups, class Key>
FN bool select_delegates(const Row<Key>& row, Key nan, int k, int32_t* out) {
  constexpr int lane_count = 64 * groups;
  Key lanes[lane_count];
  lane_maxima<groups>(row, lanes);
  const Key low = std::min(smallest(lanes, lane_count), nan), high = std::min(largest(lanes, lane_count), nan);
  const Key t = near_kth_key(List<Key>{lanes, groups}, k, low, high);

  Key keys[kCandidates + 64];
  int32_t cols[kCandidates + 64];
  int count = 0;
  const auto collect = [&](const Key* chunk, uint64_t bits, int64_t first) TOPK_TARGET {
    for (; bits; bits &= bits - 1) {
      const int j = lowest_bit(bits);
      keys[count] = std::min(magnitude(chunk[j]), nan);
      cols[count++] = static_cast<int32_t>(first + j);
    }
  };
  for (int64_t c = 0; c < row.chunks; ++c) {
    const Key* chunk = row.keys + 64 * c;
    prefetch_next(row, c, 1);
    collect(chunk, at_least<true>(chunk, t), 64 * c);
    if (count > kCandidates) return false;
  }
  if (row.tail_mask) collect(row.tail, at_least<true>(row.tail, t) & row.tail_mask, 64 * row.chunks);
  if (count > kCandidates) return false;
  choose(keys, cols, count, k, out);
  return true;
}

// Any row: search for the k-th key, then take what is above it and the first of its equals.
template <class Key>
FN void select_by_search(const Row<Key>& row, Key nan, int64_t k, int32_t* out) {
  Key lanes[64];
  lane_maxima<1>(row, lanes);
  const Key kth = kth_key(row, k, Key{0}, std::min(largest(lanes, 64), nan));
  const bool any_above = kth < nan;
  const Key next = static_cast<Key>(kth + (any_above ? 1 : 0));
  int64_t ties = any_above ? k - count_at_least(row, next) : k;
  int32_t* at = out;
  const auto emit = [&](const Key* chunk, uint64_t valid, int64_t first) TOPK_TARGET {
    uint64_t bits = at_least<true>(chunk, kth) & valid;
    const uint64_t above = any_above ? at_least<true>(chunk, next) & valid : 0;
    for (; bits; bits &= bits - 1) {
      const uint64_t bit = bits & (~bits + 1);
      if (!(above & bit) && ties-- <= 0) continue;
      *at++ = static_cast<int32_t>(first + lowest_bit(bits));
    }
  };
  for (int64_t c = 0; c < row.chunks; ++c) emit(row.keys + 64 * c, ~uint64_t{0}, 64 * c);
  if (row.tail_mask) emit(row.tail, row.tail_mask, 64 * row.chunks);
}

// Rows of contiguous columns; cols [rows, k], bits [rows, words] or null.
template <class Key>
TOPK_TARGET void select_rows(const Key* grad, int64_t row_stride, int64_t rows, int64_t n, int64_t k, Key nan,
                             int32_t* cols, uint32_t* bits) {
  const int64_t words = (n + 31) / 32;
  const bool prefetch = k > 1 && n * static_cast<int64_t>(sizeof(Key)) <= kPrefetchBytes;
  Row<Key> row;
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* out = cols + r * k;
    const Key* keys = grad + r * row_stride;
    Row<Key>::split(row, keys, prefetch && r + 1 < rows ? keys + row_stride : nullptr, n);
    if (k == 1) {
      select_one(row, nan, out);
    } else {
      // More lanes, fewer candidates, but at least a full chunk must have gone into each lane.
      bool done = false;
      if (k <= 16 && n >= 128)
        done = select_delegates<1>(row, nan, static_cast<int>(k), out);
      else if (k <= 48 && n >= 256)
        done = select_delegates<2>(row, nan, static_cast<int>(k), out);
      else if (k <= 128 && n >= 512)
        done = select_delegates<4>(row, nan, static_cast<int>(k), out);
      if (!done) select_by_search(row, nan, k, out);
    }
    if (bits) {
      uint32_t* line = bits + r * words;
      for (int64_t j = 0; j < words; ++j) line[j] = 0;
      for (int64_t j = 0; j < k; ++j) line[out[j] >> 5] |= 1u << (out[j] & 31);
    }
  }
}

#undef FN
#undef FN_INLINE

}  // namespace TOPK_LEVEL
}  // namespace gradsel

#undef TOPK_LEVEL
#undef TOPK_TARGET
#undef TOPK_REG
