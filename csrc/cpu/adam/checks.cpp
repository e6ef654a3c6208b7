#include "cpu/adam/checks.h"

#include <atomic>

#include "cpu/parallel.h"

namespace gradsel {
namespace {

// Whether a unit's indices are in range.
bool check(const Task& task, const Unit& unit) {
  const AdamItem& item = task.item;
  const int64_t count = unit.end - unit.begin;
  if (item.layout == kCols) return all_below(pointer<const int32_t>(item.index) + unit.begin, count, item.cols);
  const int64_t end = item.rows * item.cols;
  return item.index_is_64 ? all_below(pointer<const int64_t>(item.index) + unit.begin, count, end)
                          : all_below(pointer<const int32_t>(item.index) + unit.begin, count, end);
}

AdamFault out_of_range(const AdamItem& item, int64_t number) {
  AdamFault fault;
  fault.item = number;
  fault.end = item.layout == kFlat ? item.rows * item.cols : item.cols;
  fault.found = item.index_is_64 ? range_of(pointer<const int64_t>(item.index), item.nnz)
                                 : range_of(pointer<const int32_t>(item.index), item.nnz);
  return fault;
}

}  // namespace

AdamFault check_indices(const std::vector<Task>& tasks, const std::vector<Unit>& units, int threads) {
  const int64_t count = static_cast<int64_t>(tasks.size());
  std::atomic<int64_t> first_bad{count};
  parallel_ranges(static_cast<int64_t>(units.size()), threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t u = begin; u < end; ++u) {
      const Unit& unit = units[static_cast<size_t>(u)];
      const Task& task = tasks[static_cast<size_t>(unit.task)];
      if (!task.indexed || task.item.layout == kAll || check(task, unit)) continue;
      int64_t seen = first_bad.load();
      while (unit.task < seen && !first_bad.compare_exchange_weak(seen, unit.task)) {
      }
    }
  });
  if (first_bad == count) return {};
  return out_of_range(tasks[static_cast<size_t>(first_bad.load())].item, first_bad);
}

}  // namespace gradsel
