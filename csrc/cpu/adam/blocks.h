// The work of a masked Adam step: one task for each tensor, cut into units that threads take, cut into blocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/adam_item.h"
#include "common/adam_math.h"
#include "common/pointer.h"

namespace gradsel {

constexpr int kBlock = 512;  // entries

// An item, and what is worked out about it once.
struct Task {
  AdamItem item;
  View weight, grad;
  bool indexed;     // the dense weight or gradient is reached through indices
  bool shared;      // ... at the same offsets in both
  RandomKeys keys;  // of this step, if it rounds stochastically
  AdamScalars<float> scalars32;
  AdamScalars<double> scalars64;

  explicit Task(const AdamItem& from)
      : item(from),
        weight(from.rows, from.cols, from.weight_row_stride, from.weight_col_stride),
        grad(from.rows, from.cols, from.grad_row_stride, from.grad_col_stride) {
    const bool all_contiguous = item.layout == kAll && weight.contiguous && (!item.grad_is_dense || grad.contiguous);
    indexed = item.weight != 0 && !all_contiguous;
    shared = weight.row_stride == grad.row_stride && weight.col_stride == grad.col_stride;
  }
};

// A share of a task that a thread takes at once: entries begin .. end - 1.
struct Unit {
  int64_t task, begin, end;
};

// Up to kBlock entries in mask order, and room for their moments.
struct Block {
  const Task* task = nullptr;
  int64_t begin = 0;
  int count = 0;
  float moments[3][kBlock];  // converted, if the state is in bfloat16
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
        block.begin = position_;
        block.count = static_cast<int>(std::min<int64_t>(kBlock, unit_.end - position_));
        position_ += block.count;
        return true;
      }
      const int64_t u = next_.fetch_add(1, std::memory_order_relaxed);
      if (u >= static_cast<int64_t>(units_.size())) return false;
      unit_ = units_[static_cast<size_t>(u)];
      task_ = &tasks_[static_cast<size_t>(unit_.task)];
      position_ = unit_.begin;
    }
  }

 private:
  const std::vector<Task>& tasks_;
  const std::vector<Unit>& units_;
  std::atomic<int64_t>& next_;
  const Task* task_ = nullptr;
  Unit unit_{};
  int64_t position_ = 0;
};

// In adam.cpp: counts the step of every task and works out its scalars; does the step of one block.
void count_steps(std::vector<Task>& tasks, const AdamHyperparameters& hyper);
void update(Block& block);

}  // namespace gradsel
