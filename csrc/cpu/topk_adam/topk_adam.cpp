// Threads take a few rows at a time, select in them, and update what they have selected while those rows of the
// gradient are still in the cache: the gradient is read from memory once.
#include "cpu/topk_adam/topk_adam.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/adam/entries.h"
#include "cpu/adam/runs.h"
#include "cpu/parallel.h"
#include "cpu/topk/topk.h"

namespace gradsel {
namespace {

constexpr int64_t kUnitBytes = 256 * 1024;  // of gradient: well inside a second-level cache
constexpr int64_t kLineRows = 64;           // of a transposed gradient, which is read by cache lines of many rows
constexpr int64_t kPrefetchRows = 8;

// Some rows of a tensor.
struct Rows {
  int64_t task, begin, end;
};

std::vector<Rows> cut(const std::vector<Task>& tasks) {
  std::vector<Rows> units;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const AdamItem& item = tasks[t].item;
    const int64_t row_bytes = std::max<int64_t>(1, item.cols * size_of(item.grad_dtype));
    const int64_t least = item.grad_col_stride == 1 ? 1 : kLineRows;
    const int64_t step = std::max(least, kUnitBytes / row_bytes / least * least);
    for (int64_t begin = 0; begin < item.rows && item.nnz > 0; begin += step)
      units.push_back({static_cast<int64_t>(t), begin, std::min(begin + step, item.rows)});
  }
  return units;
}

void prefetch_weights(const Task& task, int64_t begin, int64_t end) {
#if defined(__GNUC__) || defined(__clang__)
  const AdamItem& item = task.item;
  const int64_t k = item.index_width, size = size_of(item.weight_dtype);
  for (int64_t r = begin; r < end; ++r) {
    const int32_t* cols = pointer<const int32_t>(item.index) + r * k;
    const char* row = pointer<const char>(item.weight) + r * task.weight.row_stride * size;
    for (int64_t j = 0; j < k; ++j) __builtin_prefetch(row + cols[j] * task.weight.col_stride * size, 1);
  }
#else
  (void)task, (void)begin, (void)end;
#endif
}

// Lines of the weight, each a miss in cache and page table, arrive while the next rows are searched.
void select(const Task& task, const Rows& rows, int64_t bits) {
  const AdamItem& item = task.item;
  const int64_t words = (item.cols + 31) / 32, k = item.index_width;
  const int64_t step = item.grad_col_stride == 1 ? kPrefetchRows : kLineRows;
  for (int64_t begin = rows.begin; begin < rows.end; begin += step) {
    const int64_t end = std::min(begin + step, rows.end);
    topk_rows(pointer<const char>(item.grad) + begin * item.grad_row_stride * size_of(item.grad_dtype),
              static_cast<Dtype>(item.grad_dtype), end - begin, item.cols, item.grad_row_stride, item.grad_col_stride,
              k, pointer<int32_t>(item.index) + begin * k, bits ? pointer<uint32_t>(bits) + begin * words : nullptr, 1);
    prefetch_weights(task, begin, end);
  }
}

// The states of a block before its first step.
void make_states(const Block& block) {
  const AdamItem& item = block.task->item;
  const int64_t size = size_of(item.state_dtype);
  for (const int64_t moment : {item.exp_avg, item.exp_avg_sq, item.max_exp_avg_sq})
    if (moment) std::memset(pointer<char>(moment) + block.begin * size, 0, static_cast<size_t>(block.count * size));
  if (item.compensation)  // of a weight in 16 bits
    std::memset(pointer<uint16_t>(item.compensation) + block.begin, 0, static_cast<size_t>(block.count) * 2);
  for (const int64_t copy : {item.values, item.original}) {
    if (copy && item.state_dtype == kFloat64)
      gather_weight(block, pointer<double>(copy) + block.begin);
    else if (copy)
      gather_weight(block, pointer<float>(copy) + block.begin);
  }
}

}  // namespace

void topk_masked_adam(const AdamItem* items, int64_t count, const int64_t* bits, const AdamHyperparameters& hyper,
                      bool skip, int threads) {
  std::vector<Task> tasks(items, items + count);
  int64_t elements = 0;
  for (const Task& task : tasks) {
    elements += task.item.rows * task.item.cols;
    if (task.item.step_dtype == kFloat64)
      *pointer<double>(task.item.step) = 0;
    else
      *pointer<float>(task.item.step) = 0;
  }
  if (!skip) count_steps(tasks, hyper);
  const std::vector<Rows> units = cut(tasks);
  threads = static_cast<int>(
      std::min<int64_t>(threads_for(elements, threads), std::max<int64_t>(1, static_cast<int64_t>(units.size()))));

  std::atomic<int64_t> next{0};
  parallel_ranges(threads, threads, [&](int64_t, int64_t, int) {
    Block block;
    for (;;) {
      const int64_t number = next.fetch_add(1, std::memory_order_relaxed);
      if (number >= static_cast<int64_t>(units.size())) return;
      const Rows& rows = units[static_cast<size_t>(number)];
      const Task& task = tasks[static_cast<size_t>(rows.task)];
      select(task, rows, bits ? bits[rows.task] : 0);
      block.task = &task;
      const int64_t k = task.item.index_width, end = rows.end * k;
      for (block.begin = rows.begin * k; block.begin < end; block.begin += block.count) {
        block.count = static_cast<int>(std::min<int64_t>(kBlock, end - block.begin));
        make_states(block);
        if (!skip) update(block);
      }
    }
  });
}

}  // namespace gradsel
