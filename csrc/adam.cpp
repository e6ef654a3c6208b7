// Masked Adam over many tensors in one parallel region: check every index, then update block by block.
//
// A block is a run of selected entries in mask order, short enough for the first-level cache. Its parameters and
// gradients are gathered into contiguous buffers, adam_math.h runs on those, and the results are scattered back. What a
// step costs is the scattered cache lines, two for each entry. The gathers are loops of independent loads, of which the
// processor keeps as many in flight as it can; software prefetches of the next block made it 10 % slower (Zen 4).
#include "adam_math.h"

#include <atomic>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace gradsel {
namespace {

constexpr int kBlock = 512;                 // entries
constexpr int64_t kUnit = 4 * kBlock;       // entries, or bitmask words, a thread takes at once
constexpr int64_t kSerialEntries = 4096;    // fewer run on one thread: an entry costs far more than a byte read

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

int64_t size_of(int64_t dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Conversions of contiguous runs, vectorised, and of scattered entries.

template <class T, class Stored>
GRADSEL_INLINE void load_loop(T* GRADSEL_RESTRICT to, const void* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(static_cast<const Stored*>(from)[i]);
}

template <class T>
GRADSEL_INLINE void load_run(T* to, int64_t dtype, const void* from, int64_t count) {
  switch (dtype) {
    case kBFloat16: return load_loop<T, BFloat16>(to, from, count);
    case kFloat16: return load_loop<T, Float16>(to, from, count);
    case kFloat64: return load_loop<T, double>(to, from, count);
    default: return load_loop<T, float>(to, from, count);
  }
}

template <class T, class Stored>
GRADSEL_INLINE void store_loop(void* to, const T* GRADSEL_RESTRICT from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<Stored*>(to)[i] = convert<Stored>(from[i]);
}

template <class T>
GRADSEL_INLINE void store_run(int64_t dtype, void* to, const T* from, int64_t count) {
  switch (dtype) {
    case kBFloat16: return store_loop<T, BFloat16>(to, from, count);
    case kFloat16: return store_loop<T, Float16>(to, from, count);
    case kFloat64: return store_loop<T, double>(to, from, count);
    default: return store_loop<T, float>(to, from, count);
  }
}

GRADSEL_CLONES void load_contiguous(float* to, int64_t dtype, const void* from, int64_t count) {
  load_run(to, dtype, from, count);
}
GRADSEL_CLONES void load_contiguous(double* to, int64_t dtype, const void* from, int64_t count) {
  load_run(to, dtype, from, count);
}
GRADSEL_CLONES void store_contiguous(int64_t dtype, void* to, const float* from, int64_t count) {
  store_run(dtype, to, from, count);
}
GRADSEL_CLONES void store_contiguous(int64_t dtype, void* to, const double* from, int64_t count) {
  store_run(dtype, to, from, count);
}
GRADSEL_CLONES void adam_run(float* p, const float* g, float* m, float* v, float* vmax, int64_t count,
                             const AdamScalars<float>& s) {
  adam_math(p, g, m, v, vmax, count, s);
}
GRADSEL_CLONES void adam_run(double* p, const double* g, double* m, double* v, double* vmax, int64_t count,
                             const AdamScalars<double>& s) {
  adam_math(p, g, m, v, vmax, count, s);
}
GRADSEL_CLONES AdamScalars<float> anchor_run(float* p, const float* g, float* pulled, const float* original,
                                             int64_t count, const AdamScalars<float>& s) {
  return anchor_math(p, g, pulled, original, count, s);
}
GRADSEL_CLONES AdamScalars<double> anchor_run(double* p, const double* g, double* pulled, const double* original,
                                              int64_t count, const AdamScalars<double>& s) {
  return anchor_math(p, g, pulled, original, count, s);
}

GRADSEL_CLONES void unscale_run(const float* g, float* scaled, int64_t count, float scale) {
  unscale_loop(g, scaled, count, scale);
}
GRADSEL_CLONES void unscale_run(const double* g, double* scaled, int64_t count, double scale) {
  unscale_loop(g, scaled, count, scale);
}
GRADSEL_CLONES void round_stochastically(float* p, int64_t dtype, int64_t entry, int64_t count, RandomKeys keys) {
  if (dtype == kBFloat16)
    stochastic_loop<stochastic_bfloat16>(p, entry, count, keys);
  else
    stochastic_loop<stochastic_float16>(p, entry, count, keys);
}
GRADSEL_CLONES void add_run(float* GRADSEL_RESTRICT p, const float* GRADSEL_RESTRICT term, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] += term[i];
}
GRADSEL_CLONES void split_compensated(float* p, int64_t dtype, void* compensation, int64_t count) {
  if (dtype == kBFloat16)
    compensated_loop<BFloat16>(p, compensation, count);
  else
    compensated_loop<Float16>(p, compensation, count);
}

template <class T, class Stored>
void gather_loop(T* to, const void* from, const int64_t* offsets, int count) {
  for (int i = 0; i < count; ++i) to[i] = convert<T>(static_cast<const Stored*>(from)[offsets[i]]);
}

template <class T>
void gather(T* to, int64_t dtype, const void* from, const int64_t* offsets, int count) {
  switch (dtype) {
    case kBFloat16: return gather_loop<T, BFloat16>(to, from, offsets, count);
    case kFloat16: return gather_loop<T, Float16>(to, from, offsets, count);
    case kFloat64: return gather_loop<T, double>(to, from, offsets, count);
    default: return gather_loop<T, float>(to, from, offsets, count);
  }
}

template <class T, class Stored>
void scatter_loop(void* to, const T* from, const int64_t* offsets, int count) {
  for (int i = 0; i < count; ++i) static_cast<Stored*>(to)[offsets[i]] = convert<Stored>(from[i]);
}

template <class T>
void scatter(int64_t dtype, void* to, const T* from, const int64_t* offsets, int count) {
  switch (dtype) {
    case kBFloat16: return scatter_loop<T, BFloat16>(to, from, offsets, count);
    case kFloat16: return scatter_loop<T, Float16>(to, from, offsets, count);
    case kFloat64: return scatter_loop<T, double>(to, from, offsets, count);
    default: return scatter_loop<T, float>(to, from, offsets, count);
  }
}

// An item, and what is worked out once about it.
struct Task {
  AdamItem item;
  View weight, grad;
  bool indexed;       // the dense weight or gradient is reached through indices
  bool shared;        // ... at the same offsets in both, or only one of them is
  RandomKeys keys;    // of this step, where it rounds stochastically
  AdamScalars<float> scalars32;
  AdamScalars<double> scalars64;

  explicit Task(const AdamItem& from)
      : item(from),
        weight(from.rows, from.cols, from.weight_row_stride, from.weight_col_stride),
        grad(from.rows, from.cols, from.grad_row_stride, from.grad_col_stride) {
    const bool all_contiguous = item.layout == kAll && weight.contiguous && (!item.grad_is_dense || grad.contiguous);
    indexed = item.weight != 0 && !all_contiguous;
    shared = !item.grad_is_dense ||
             (weight.row_stride == grad.row_stride && weight.col_stride == grad.col_stride);
  }
};

// A share of a task that a thread takes at once: entries begin .. end - 1, or rows of a bitmask.
struct Unit {
  int64_t task, begin, end;
  int64_t first_entry;  // BITS: rank of the unit's first set bit; the number of set bits while checking
};

struct Block {
  const Task* task = nullptr;
  int64_t begin = 0;
  int count = 0;
  int64_t weight_offsets[kBlock], grad_offsets[kBlock];
  float moments[3][kBlock];  // of a state in bfloat16

  const int64_t* grad_at() const { return task->shared ? weight_offsets : grad_offsets; }
};

// Hands out blocks: units from a counter shared by all threads, each cut into blocks.
class Blocks {
 public:
  Blocks(const std::vector<Task>& tasks, const std::vector<Unit>& units, std::atomic<int64_t>& next)
      : tasks_(tasks), units_(units), next_(next) {}

  // The next block; false at the end.
  bool take(Block& block) {
    for (;;) {
      if (task_ && position_ < unit_.end) {
        block.task = task_;
        if (task_->indexed && task_->item.layout == kBits)
          take_bits(block);
        else
          take_entries(block);
        if (block.count == 0) continue;  // the rest of a bitmask was empty
        return true;
      }
      const int64_t u = next_.fetch_add(1, std::memory_order_relaxed);
      if (u >= static_cast<int64_t>(units_.size())) return false;
      unit_ = units_[static_cast<size_t>(u)];
      task_ = &tasks_[static_cast<size_t>(unit_.task)];
      position_ = unit_.begin;
      rank_ = unit_.first_entry;
      word_ = 0;
      if (task_->indexed && task_->item.layout == kBits) bits_ = words(position_)[0];
    }
  }

 private:
  const uint32_t* words(int64_t row) const {
    return at<const uint32_t>(task_->item.index) + row * task_->item.index_width;
  }

  void take_entries(Block& block) {
    block.begin = position_;
    block.count = static_cast<int>(std::min<int64_t>(kBlock, unit_.end - position_));
    position_ += block.count;
    if (!task_->indexed) return;
    offsets(block, task_->weight, block.weight_offsets);
    if (!task_->shared) offsets(block, task_->grad, block.grad_offsets);
  }

  void offsets(const Block& block, const View& view, int64_t* out) const {
    const AdamItem& item = task_->item;
    const int64_t begin = block.begin;
    const int count = block.count;
    if (item.layout == kCols) {
      const int32_t* cols = at<const int32_t>(item.index) + begin;
      const int64_t k = item.index_width;
      if (k == 1) {
        for (int i = 0; i < count; ++i) out[i] = (begin + i) * view.row_stride + cols[i] * view.col_stride;
        return;
      }
      int64_t row = begin / k * view.row_stride, left = k - begin % k;
      for (int i = 0; i < count; ++i) {
        out[i] = row + cols[i] * view.col_stride;
        if (--left == 0) row += view.row_stride, left = k;
      }
    } else if (item.layout == kFlat && item.index_is_64) {
      for (int i = 0; i < count; ++i) out[i] = view.offset(at<const int64_t>(item.index)[begin + i]);
    } else if (item.layout == kFlat) {
      for (int i = 0; i < count; ++i) out[i] = view.offset(at<const int32_t>(item.index)[begin + i]);
    } else {
      for (int i = 0; i < count; ++i) out[i] = view.offset(begin + i);
    }
  }

  void take_bits(Block& block) {
    const View &weight = task_->weight, &grad = task_->grad;
    const int64_t width = task_->item.index_width;
    const bool shared = task_->shared;
    int count = 0;
    while (count < kBlock) {
      while (bits_ == 0) {
        if (++word_ == width) {
          word_ = 0;
          if (++position_ == unit_.end) goto full;
        }
        bits_ = words(position_)[word_];
      }
      const int64_t column = 32 * word_ + lowest_bit(bits_);
      bits_ &= bits_ - 1;
      block.weight_offsets[count] = position_ * weight.row_stride + column * weight.col_stride;
      if (!shared) block.grad_offsets[count] = position_ * grad.row_stride + column * grad.col_stride;
      ++count;
    }
  full:
    block.begin = rank_;
    block.count = count;
    rank_ += count;
  }

  const std::vector<Task>& tasks_;
  const std::vector<Unit>& units_;
  std::atomic<int64_t>& next_;
  const Task* task_ = nullptr;
  Unit unit_{};
  int64_t position_ = 0, rank_ = 0, word_ = 0;
  uint32_t bits_ = 0;
};

template <class T>
constexpr int64_t kCode = std::is_same<T, double>::value ? kFloat64 : kFloat32;

// A moment of a block as T: where it is, or in the block's buffer if it is stored in bfloat16.
template <class T>
T* moment_run(Block& block, int which, int64_t address) {
  if (!address) return nullptr;
  if constexpr (std::is_same<T, float>::value) {
    if (block.task->item.state_dtype == kBFloat16) {
      load_contiguous(block.moments[which], kBFloat16, at<BFloat16>(address) + block.begin, block.count);
      return block.moments[which];
    }
  }
  return at<T>(address) + block.begin;
}

void store_moments(const Block& block) {
  const AdamItem& item = block.task->item;
  const int64_t addresses[3] = {item.exp_avg, item.exp_avg_sq, item.max_exp_avg_sq};
  for (int i = 0; i < 3; ++i)
    if (addresses[i])
      store_contiguous(kBFloat16, at<BFloat16>(addresses[i]) + block.begin, block.moments[i], block.count);
}

// Adds what rounding has left behind to parameters just read, which are in a buffer then.
void add_compensation(const Block& block, float* param) {
  const AdamItem& item = block.task->item;
  if (!item.compensation) return;
  float terms[kBlock];
  load_contiguous(terms, item.weight_dtype, at<char>(item.compensation) + block.begin * size_of(item.weight_dtype),
                  block.count);
  add_run(param, terms, block.count);
}

// Replaces new parameters by what the weight is to hold, where that is not their nearest neighbour or not all.
void round_params(const Block& block, float* param) {
  const AdamItem& item = block.task->item;
  if (item.stochastic) round_stochastically(param, item.weight_dtype, block.begin, block.count, block.task->keys);
  if (item.compensation)
    split_compensated(param, item.weight_dtype,
                      at<char>(item.compensation) + block.begin * size_of(item.weight_dtype), block.count);
}

// The checks forbid both with double.
void add_compensation(const Block&, double*) {}
void round_params(const Block&, double*) {}

template <class T>
void update(Block& block, AdamScalars<T> scalars) {
  const Task& task = *block.task;
  const AdamItem& item = task.item;
  T param_buffer[kBlock], grad_buffer[kBlock];
  char* weight = at<char>(item.weight);
  char* weight_run = weight + block.begin * size_of(item.weight_dtype);  // where the entries are if not indexed
  const char* grad_run = at<const char>(item.grad) + block.begin * size_of(item.grad_dtype);

  T* param = param_buffer;
  bool store = item.weight != 0;
  if (item.values) {
    param = at<T>(item.values) + block.begin;
  } else if (task.indexed) {
    gather(param, item.weight_dtype, weight, block.weight_offsets, block.count);
  } else if (item.weight_dtype == kCode<T>) {
    param = reinterpret_cast<T*>(weight_run);
    store = false;
  } else {
    load_contiguous(param, item.weight_dtype, weight_run, block.count);
  }
  add_compensation(block, param);

  const T* grad = grad_buffer;
  if (task.indexed && item.grad_is_dense)
    gather(grad_buffer, item.grad_dtype, at<const char>(item.grad), block.grad_at(), block.count);
  else if (item.grad_dtype == kCode<T>)
    grad = reinterpret_cast<const T*>(grad_run);
  else
    load_contiguous(grad_buffer, item.grad_dtype, grad_run, block.count);

  if (scalars.grad_scale != 1) {
    unscale_run(grad, grad_buffer, block.count, scalars.grad_scale);
    grad = grad_buffer;
  }
  if (item.original && scalars.pulls) {
    scalars = anchor_run(param, grad, grad_buffer, at<const T>(item.original) + block.begin, block.count, scalars);
    grad = grad_buffer;
  }
  adam_run(param, grad, moment_run<T>(block, 0, item.exp_avg), moment_run<T>(block, 1, item.exp_avg_sq),
           moment_run<T>(block, 2, item.max_exp_avg_sq), block.count, scalars);
  if (item.state_dtype == kBFloat16) store_moments(block);

  if (!store) return;
  round_params(block, param);
  if (task.indexed)
    scatter(item.weight_dtype, weight, param, block.weight_offsets, block.count);
  else
    store_contiguous(item.weight_dtype, weight_run, param, block.count);
}

void update(Block& block) {
  if (block.task->item.state_dtype == kFloat64)
    update(block, block.task->scalars64);
  else
    update(block, block.task->scalars32);
}

GRADSEL_CLONES int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits += popcount(words[i]);
  return bits;
}

bool bits_past_end(const AdamItem& item, const uint32_t* words, int64_t rows) {
  if (item.cols % 32 == 0) return false;
  const uint32_t past = ~0u << (item.cols % 32);
  uint32_t found = 0;
  for (int64_t r = 0; r < rows; ++r) found |= words[(r + 1) * item.index_width - 1] & past;
  return found != 0;
}

// Whether a unit's indices are in range; counts the bits of a bitmask.
bool check(const Task& task, Unit& unit) {
  const AdamItem& item = task.item;
  const int64_t count = unit.end - unit.begin;
  if (item.layout == kBits) {
    const uint32_t* words = at<const uint32_t>(item.index) + unit.begin * item.index_width;
    unit.first_entry = count_bits(words, count * item.index_width);
    return !bits_past_end(item, words, count);
  }
  if (item.layout == kCols) return all_below(at<const int32_t>(item.index) + unit.begin, count, item.cols);
  const int64_t end = item.rows * item.cols;
  return item.index_is_64 ? all_below(at<const int64_t>(item.index) + unit.begin, count, end)
                          : all_below(at<const int32_t>(item.index) + unit.begin, count, end);
}

AdamFault out_of_range(const AdamItem& item, int64_t number) {
  AdamFault fault;
  fault.item = number;
  fault.end = item.layout == kFlat ? item.rows * item.cols : item.cols;
  fault.kind = item.layout == kBits ? AdamFault::kBitsPastEnd : AdamFault::kOutOfRange;
  if (item.layout != kBits)
    fault.found = item.index_is_64 ? range_of(at<const int64_t>(item.index), item.nnz)
                                   : range_of(at<const int32_t>(item.index), item.nnz);
  return fault;
}

std::vector<Unit> cut(const std::vector<Task>& tasks) {
  std::vector<Unit> units;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const AdamItem& item = tasks[t].item;
    const bool by_row = tasks[t].indexed && item.layout == kBits;
    const int64_t total = by_row ? item.rows : item.nnz;
    const int64_t step = by_row ? std::max<int64_t>(1, kUnit / std::max<int64_t>(1, item.index_width)) : kUnit;
    for (int64_t begin = 0; begin < total; begin += step)
      units.push_back({static_cast<int64_t>(t), begin, std::min(begin + step, total), 0});
  }
  return units;
}

// Turns the bit counts of units into ranks. False if they do not add up to a task's number of entries.
bool rank_bits(const std::vector<Task>& tasks, std::vector<Unit>& units, AdamFault& fault) {
  size_t u = 0;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const AdamItem& item = tasks[t].item;
    const bool by_row = tasks[t].indexed && item.layout == kBits;
    int64_t rank = 0;
    for (; u < units.size() && units[u].task == static_cast<int64_t>(t); ++u) {
      if (!by_row) continue;
      const int64_t bits = units[u].first_entry;
      units[u].first_entry = rank;
      rank += bits;
    }
    if (by_row && rank != item.nnz && (fault.kind == AdamFault::kNone || static_cast<int64_t>(t) < fault.item)) {
      fault = AdamFault{};
      fault.kind = AdamFault::kWrongCount;
      fault.item = static_cast<int64_t>(t);
      fault.count = rank;
      return false;
    }
  }
  return fault.kind == AdamFault::kNone;
}

// The corrections of the last tensor serve the next one, which has mostly done as many steps.
void count_steps(std::vector<Task>& tasks, const AdamHyperparameters& hyper) {
  double last = -1, correction1 = 0, correction2 = 0;
  for (Task& task : tasks) {
    const AdamItem& item = task.item;
    const double t = item.step_dtype == kFloat64 ? (*at<double>(item.step) += 1) : (*at<float>(item.step) += 1);
    if (t != last) {
      correction1 = 1 - std::pow(hyper.beta1, t);
      correction2 = 1 - std::pow(hyper.beta2, t);
      last = t;
    }
    if (item.stochastic) task.keys = RandomKeys(item.seed, static_cast<uint32_t>(static_cast<int64_t>(t)));
    task.scalars32 = scalars<float>(hyper, correction1, correction2);
    task.scalars64 = scalars<double>(hyper, correction1, correction2);
  }
}

}  // namespace

AdamFault masked_adam(const AdamItem* items, int64_t count, const AdamHyperparameters& hyper, int threads) {
  std::vector<Task> tasks(items, items + count);
  std::vector<Unit> units = cut(tasks);
  int64_t entries = 0;
  for (const Task& task : tasks) entries += task.item.nnz;
  if (entries < kSerialEntries) threads = 1;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(1, units.size())));

  const int64_t unit_count = static_cast<int64_t>(units.size());
  std::atomic<int64_t> first_bad{count};
  parallel_ranges(unit_count, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t u = begin; u < end; ++u) {
      Unit& unit = units[static_cast<size_t>(u)];
      const Task& task = tasks[static_cast<size_t>(unit.task)];
      if (!task.indexed || task.item.layout == kAll || check(task, unit)) continue;
      int64_t seen = first_bad.load();
      while (unit.task < seen && !first_bad.compare_exchange_weak(seen, unit.task)) {
      }
    }
  });
  AdamFault fault;
  if (first_bad < count) fault = out_of_range(items[first_bad.load()], first_bad);
  if (!rank_bits(tasks, units, fault)) return fault;
  count_steps(tasks, hyper);

  std::atomic<int64_t> next{0};
  parallel_ranges(threads, threads, [&](int64_t, int64_t, int) {
    Blocks blocks(tasks, units, next);
    Block block;
    while (blocks.take(block)) update(block);
  });
  return fault;
}

}  // namespace gradsel
