// Masked Adam over many tensors: one parallel region checks every index, another updates block by block.
//
// A block is a run of selected entries in mask order, short enough for the first-level cache. Its parameters and
// gradients are gathered into contiguous buffers, adam_math.h runs on those, and the results are scattered back. A step
// costs its scattered cache lines, two for each entry. The gather is a loop of independent loads, of which the processor
// keeps as many in flight as it can; prefetching the next block in software made it 10 % slower (Zen 4).
#include "cpu/adam/adam.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cpu/adam/blocks.h"
#include "cpu/adam/checks.h"
#include "cpu/adam/entries.h"
#include "cpu/adam/runs.h"
#include "cpu/parallel.h"

namespace gradsel {
namespace {

constexpr int64_t kUnit = 4 * kBlock;     // entries a thread takes at once
constexpr int64_t kSerialEntries = 4096;  // fewer run on one thread: an entry costs far more than a byte read

template <class T>
constexpr int64_t kCode = std::is_same<T, double>::value ? kFloat64 : kFloat32;

// A moment of a block as T: in place, or in the block's buffer if it is stored in bfloat16.
template <class T>
T* moment_run(Block& block, int which, int64_t address) {
  if (!address) return nullptr;
  if constexpr (std::is_same<T, float>::value) {
    if (block.task->item.state_dtype == kBFloat16) {
      load_contiguous(block.moments[which], kBFloat16, pointer<BFloat16>(address) + block.begin, block.count);
      return block.moments[which];
    }
  }
  return pointer<T>(address) + block.begin;
}

void store_moments(const Block& block) {
  const AdamItem& item = block.task->item;
  const int64_t addresses[3] = {item.exp_avg, item.exp_avg_sq, item.max_exp_avg_sq};
  for (int i = 0; i < 3; ++i)
    if (addresses[i])
      store_contiguous(kBFloat16, pointer<BFloat16>(addresses[i]) + block.begin, block.moments[i], block.count);
}

// Adds what earlier rounding lost to parameters that have just been read into a buffer.
void add_compensation(const Block& block, float* param) {
  const AdamItem& item = block.task->item;
  if (!item.compensation) return;
  float terms[kBlock];
  load_contiguous(terms, item.weight_dtype, pointer<char>(item.compensation) + block.begin * size_of(item.weight_dtype),
                  block.count);
  add_run(param, terms, block.count);
}

// Replaces new parameters by what the weight is to hold, if that is not simply the nearest number of its dtype.
void round_params(const Block& block, float* param) {
  const AdamItem& item = block.task->item;
  if (item.stochastic) round_stochastically(param, item.weight_dtype, block.begin, block.count, block.task->keys);
  if (item.compensation)
    split_compensated(param, item.weight_dtype,
                      pointer<char>(item.compensation) + block.begin * size_of(item.weight_dtype), block.count);
}

// The argument checks allow neither with double.
void add_compensation(const Block&, double*) {}
void round_params(const Block&, double*) {}

template <class T>
void update(Block& block, AdamScalars<T> scalars) {
  const Task& task = *block.task;
  const AdamItem& item = task.item;
  T param_buffer[kBlock], grad_buffer[kBlock];
  // Where the entries are if they are not indexed.
  char* weight_run = pointer<char>(item.weight) + block.begin * size_of(item.weight_dtype);
  const char* grad_run = pointer<const char>(item.grad) + block.begin * size_of(item.grad_dtype);

  const bool gathers_param = task.indexed && !item.values, gathers_grad = task.indexed && item.grad_is_dense;
  const bool together = gathers_param && gathers_grad && item.weight_dtype == item.grad_dtype;
  if (together) gather_both(block, param_buffer, grad_buffer);

  T* param = param_buffer;
  bool store = item.weight != 0;
  if (item.values) {
    param = pointer<T>(item.values) + block.begin;
  } else if (gathers_param) {
    if (!together) gather_weight(block, param);
  } else if (item.weight_dtype == kCode<T>) {
    param = reinterpret_cast<T*>(weight_run);
    store = false;
  } else {
    load_contiguous(param, item.weight_dtype, weight_run, block.count);
  }
  add_compensation(block, param);

  const T* grad = grad_buffer;
  if (gathers_grad) {
    if (!together) gather_grad(block, grad_buffer);
  } else if (item.grad_dtype == kCode<T>) {
    grad = reinterpret_cast<const T*>(grad_run);
  } else {
    load_contiguous(grad_buffer, item.grad_dtype, grad_run, block.count);
  }

  if (scalars.grad_scale != 1) {
    unscale_run(grad, grad_buffer, block.count, scalars.grad_scale);
    grad = grad_buffer;
  }
  if (item.original && scalars.pulls) {
    scalars = anchor_run(param, grad, grad_buffer, pointer<const T>(item.original) + block.begin, block.count, scalars);
    grad = grad_buffer;
  }
  adam_run(param, grad, moment_run<T>(block, 0, item.exp_avg), moment_run<T>(block, 1, item.exp_avg_sq),
           moment_run<T>(block, 2, item.max_exp_avg_sq), block.count, scalars);
  if (item.state_dtype == kBFloat16) store_moments(block);

  if (!store) return;
  round_params(block, param);
  if (task.indexed)
    scatter_weight(block, param);
  else
    store_contiguous(item.weight_dtype, weight_run, param, block.count);
}

}  // namespace

void update(Block& block) {
  if (block.task->item.state_dtype == kFloat64)
    update(block, block.task->scalars64);
  else
    update(block, block.task->scalars32);
}

namespace {

std::vector<Unit> cut(const std::vector<Task>& tasks) {
  std::vector<Unit> units;
  for (size_t t = 0; t < tasks.size(); ++t) {
    const int64_t total = tasks[t].item.nnz;
    for (int64_t begin = 0; begin < total; begin += kUnit)
      units.push_back({static_cast<int64_t>(t), begin, std::min(begin + kUnit, total)});
  }
  return units;
}

}  // namespace

// Consecutive tensors have usually done the same number of steps, so the last bias corrections are kept.
void count_steps(std::vector<Task>& tasks, const AdamHyperparameters& hyper) {
  double last = -1, correction1 = 0, correction2 = 0;
  for (Task& task : tasks) {
    const AdamItem& item = task.item;
    const bool step_is_64 = item.step_dtype == kFloat64;
    const double t = step_is_64 ? (*pointer<double>(item.step) += 1) : (*pointer<float>(item.step) += 1);
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

AdamFault masked_adam(const AdamItem* items, int64_t count, const AdamHyperparameters& hyper, int threads) {
  std::vector<Task> tasks(items, items + count);
  const std::vector<Unit> units = cut(tasks);
  int64_t entries = 0;
  for (const Task& task : tasks) entries += task.item.nnz;
  if (entries < kSerialEntries) threads = 1;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(1, units.size())));

  const AdamFault fault = check_indices(tasks, units, threads);
  if (fault.any()) return fault;
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
