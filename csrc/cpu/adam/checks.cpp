#include "cpu/adam/checks.h"

#include <atomic>

#include "cpu/adam/runs.h"
#include "cpu/parallel.h"

namespace gradsel {
namespace {

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
    const uint32_t* words = pointer<const uint32_t>(item.index) + unit.begin * item.index_width;
    unit.first_entry = count_bits(words, count * item.index_width);
    return !bits_past_end(item, words, count);
  }
  if (item.layout == kCols) return all_below(pointer<const int32_t>(item.index) + unit.begin, count, item.cols);
  const int64_t end = item.rows * item.cols;
  return item.index_is_64 ? all_below(pointer<const int64_t>(item.index) + unit.begin, count, end)
                          : all_below(pointer<const int32_t>(item.index) + unit.begin, count, end);
}

AdamFault out_of_range(const AdamItem& item, int64_t number) {
  AdamFault fault;
  fault.item = number;
  fault.end = item.layout == kFlat ? item.rows * item.cols : item.cols;
  fault.kind = item.layout == kBits ? AdamFault::kBitsPastEnd : AdamFault::kOutOfRange;
  if (item.layout != kBits)
    fault.found = item.index_is_64 ? range_of(pointer<const int64_t>(item.index), item.nnz)
                                   : range_of(pointer<const int32_t>(item.index), item.nnz);
  return fault;
}

// Turns the bit counts of units into ranks. Where they do not add up to a task's number of entries, that is the fault,
// unless there is one in an earlier task.
void rank_bits(const std::vector<Task>& tasks, std::vector<Unit>& units, AdamFault& fault) {
  size_t u = 0;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const AdamItem& item = tasks[t].item;
    const bool by_row = tasks[t].reads_bits();
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
      return;
    }
  }
}

}  // namespace

AdamFault check_indices(const std::vector<Task>& tasks, std::vector<Unit>& units, int threads) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> first_bad{count};
  parallel_ranges(static_cast<int64_t>(units.size()), threads, [&](int64_t begin, int64_t end, int) {
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
  if (first_bad < count) fault = out_of_range(tasks[static_cast<size_t>(first_bad.load())].item, first_bad);
  rank_bits(tasks, units, fault);
  return fault;
}

}  // namespace gradsel
