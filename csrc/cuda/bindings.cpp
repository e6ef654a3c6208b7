// What Python calls to run a kernel of kernels.cu: these functions fill in parameters and choose launch sizes.
#include "cuda/bindings.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "common/pointer.h"
#include "cuda/adam.h"
#include "cuda/launch.h"
#include "cuda/topk.h"
#include "cuda/topk_adam.h"

namespace py = pybind11;

namespace gradsel {
namespace {

constexpr int64_t kMostBlocks = 2147483647;

template <class... Params>
void launch(const std::string& kernel, int64_t grid, unsigned block, unsigned shared_bytes, int device, int64_t stream,
            Params&... params) {
  if (grid > kMostBlocks) throw std::invalid_argument(kernel + " needs more than 2^31 - 1 blocks");
  void* addresses[] = {&params...};
  cuda_launch({kernel.c_str(), static_cast<unsigned>(grid), block, shared_bytes, device, stream}, addresses);
}

// Which of the selections a K takes, and what a block of it needs.
struct Selection {
  const char* kind;
  unsigned threads, shared_bytes;
};

// `size` is an element's, in bytes.
Selection selection_of(int64_t k, int64_t size) {
  constexpr unsigned kWarps = kTopKThreads / 32;
  if (k > kMostFew) return {"many", kTopKManyThreads, 2048};
  if (k == 1) return {"one", kTopKThreads, kWarps * 16};
  return {"few", kTopKThreads, kWarps * static_cast<unsigned>(kCandidates * ((size == 8 ? 8 : 4) + 4) + 4)};
}

// The parameters of a selection, but for how many warps share a row.
TopK selected(int64_t grad, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t k,
              int64_t out, int64_t bits) {
  const bool contiguous = (cols == 1 || col_stride == 1) && (rows == 1 || row_stride * bytes_of(dtype) % 16 == 0);
  return {pointer<void>(grad), rows, cols, row_stride, col_stride, pointer<int32_t>(out), pointer<uint32_t>(bits),
          nan_key(dtype), static_cast<int>(k), 0, contiguous && grad % 16 == 0};
}

// Decides how many warps share a row, and returns the number of blocks. If the launch has few rows in all, the warps of
// a block share them: a multiprocessor needs 16 warps to hide latency.
int64_t share_rows(TopK& p, int64_t size, int64_t rows_in_all, int device) {
  if (p.k > kMostFew) return p.rows;
  const int64_t columns = 32 * columns_of_lane(size), chunks = (p.cols + columns - 1) / columns;
  const int most = kTopKThreads / 32;
  int warps = 1;
  for (; warps < most && chunks >= 2 * warps && rows_in_all * warps < 16 * cuda_multiprocessors(device); warps *= 2)
    ++p.log2_warps;
  const int64_t rows_of_block = most / warps;
  return (p.rows + rows_of_block - 1) / rows_of_block;
}

void topk_rows(int64_t grad, int64_t dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
               int64_t k, int64_t out, int64_t bits, int device, int64_t stream) {
  if (rows == 0 || k == 0) return;
  const int64_t size = bytes_of(static_cast<Dtype>(dtype));
  const Selection how = selection_of(k, size);
  TopK p = selected(grad, static_cast<Dtype>(dtype), rows, cols, row_stride, col_stride, k, out, bits);
  const int64_t blocks = share_rows(p, size, rows, device);
  launch("gradsel_topk_" + (how.kind + ("_" + std::to_string(8 * size))), blocks, how.threads, how.shared_bytes, device,
         stream, p);
}

// A launch of the fused first step: the kernel, the table in int64 words, its tensors, blocks, threads and bytes of
// shared memory.
using FirstStepLaunch = std::tuple<std::string, py::bytes, int64_t, int64_t, unsigned, unsigned>;

// One for each selection and size of the gradients' elements. `bits` is empty or has an address for each item.
std::vector<FirstStepLaunch> topk_adam_launches(int64_t address, int64_t count, const std::vector<int64_t>& bits,
                                                int device) {
  std::map<std::pair<std::string, int64_t>, std::vector<FirstStepItem>> launches;
  for (int64_t i = 0; i < count; ++i) {
    const AdamItem& item = pointer<AdamItem>(address)[i];
    const Dtype dtype = static_cast<Dtype>(item.grad_dtype);
    const int64_t packed = bits.empty() ? 0 : bits[static_cast<size_t>(i)];
    launches[{selection_of(item.index_width, bytes_of(dtype)).kind, bytes_of(dtype)}].push_back(
        {selected(item.grad, dtype, item.rows, item.cols, item.grad_row_stride, item.grad_col_stride, item.index_width,
                  item.index, packed),
         item});
  }
  std::vector<FirstStepLaunch> made;
  for (auto& [key, items] : launches) {
    const auto& [kind, size] = key;
    const int64_t number = static_cast<int64_t>(items.size());
    std::vector<int64_t> words(static_cast<size_t>(FirstStepTable::size(number)), 0);
    const FirstStepTable table{words.data(), number};
    int64_t rows = 0, blocks = 0;
    for (const FirstStepItem& each : items) rows += each.choice.rows;
    for (int64_t i = 0; i < number; ++i) {
      FirstStepItem& each = items[static_cast<size_t>(i)];
      table.first_blocks()[i] = blocks;
      // A tensor without rows has a block, which counts its step.
      blocks += std::max<int64_t>(1, share_rows(each.choice, size, rows, device));
      table.items()[i] = each;
    }
    table.first_blocks()[number] = blocks;
    const Selection how = selection_of(items[0].choice.k, size);
    made.emplace_back("gradsel_topk_adam_" + kind + "_" + std::to_string(8 * size),
                      py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)), number,
                      blocks, how.threads, kFirstStepShared + how.shared_bytes);
  }
  return made;
}

// `table` is a launch's table, which write_table() wrote.
void topk_adam(const std::string& kernel, int64_t table, int64_t count, int64_t blocks, unsigned threads,
               unsigned shared_bytes, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool decoupled_weight_decay, bool maximize, double anchor, bool anchor_l1, bool anchor_decoupled,
               int64_t grad_scale, int64_t found_inf, int device, int64_t stream) {
  const AdamHyperparameters hyper{lr,       beta1,  beta2,     eps,              weight_decay, decoupled_weight_decay,
                                  maximize, anchor, anchor_l1, anchor_decoupled, 1.0};
  FirstStep step{{pointer<int64_t>(table), count},
                 scalars<float>(hyper, 1 - beta1, 1 - beta2),
                 scalars<double>(hyper, 1 - beta1, 1 - beta2),
                 pointer<float>(grad_scale),
                 pointer<float>(found_inf)};
  launch(kernel, blocks, threads, shared_bytes, device, stream, step);
}

// The table, as bytes, of those items whose state is float64 or of those whose is not; how many they are, and how
// many tiles they have.
py::tuple adam_table(int64_t address, int64_t count, bool float64) {
  const AdamItem* all = pointer<AdamItem>(address);
  std::vector<AdamItem> items;
  std::copy_if(all, all + count, std::back_inserter(items),
               [&](const AdamItem& item) { return (item.state_dtype == kFloat64) == float64; });
  const int64_t number = static_cast<int64_t>(items.size());
  std::vector<int64_t> words(static_cast<size_t>(AdamTable::size(number)), 0);
  const AdamTable table{words.data(), number};
  std::copy(items.begin(), items.end(), table.items());
  int64_t tiles = 0;
  for (int64_t i = 0; i < number; ++i) {
    table.first_tiles()[i] = tiles;
    tiles += (items[static_cast<size_t>(i)].nnz + kTile - 1) / kTile;
  }
  table.first_tiles()[number] = tiles;
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)), number,
                        tiles);
}

// Writes a table to device memory.
void write_table(const std::string& table, int64_t to, int device, int64_t stream) {
  constexpr unsigned kThreads = 256;
  const int64_t count = static_cast<int64_t>(table.size() / sizeof(int64_t));
  TablePart part;
  for (int64_t begin = 0; begin < count; begin += TablePart::kWords) {
    part.to = pointer<int64_t>(to) + begin;
    part.count = static_cast<int>(std::min<int64_t>(TablePart::kWords, count - begin));
    std::memcpy(part.words, table.data() + begin * static_cast<int64_t>(sizeof(int64_t)),
                static_cast<size_t>(part.count) * sizeof(int64_t));
    const unsigned blocks = (static_cast<unsigned>(part.count) + kThreads - 1) / kThreads;
    launch("gradsel_write_table", blocks, kThreads, 0, device, stream, part);
  }
}

// `table` is what adam_table() made and write_table() wrote.
void masked_adam(int64_t table, int64_t count, int64_t tiles, bool float64, double lr, double beta1, double beta2,
                 double eps, double weight_decay, bool decoupled_weight_decay, bool maximize, double anchor,
                 bool anchor_l1, bool anchor_decoupled, int64_t grad_scale, int64_t found_inf, int64_t rates,
                 int device, int64_t stream) {
  AdamStep step{{pointer<int64_t>(table), count},
                {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, anchor, anchor_l1,
                 anchor_decoupled, 1.0},
                pointer<float>(grad_scale),
                pointer<float>(found_inf),
                pointer<double>(rates)};
  const int64_t blocks = std::min<int64_t>(tiles, int64_t{kAdamBlocks} * cuda_multiprocessors(device));
  launch(float64 ? "gradsel_adam_step_64" : "gradsel_adam_step_32", std::max<int64_t>(1, blocks), kAdamThreads,
         kAdamShared, device, stream, step);
}

}  // namespace
}  // namespace gradsel

void bind_cuda(py::module_& m) {
  m.def("cuda_adam_table", &gradsel::adam_table);
  m.def("cuda_topk_adam_launches", &gradsel::topk_adam_launches);
  // A launch waits when a thousand are queued; meanwhile other Python threads can run.
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("cuda_topk_rows", &gradsel::topk_rows, unlocked);
  m.def("cuda_write_table", &gradsel::write_table, unlocked);
  m.def("cuda_masked_adam", &gradsel::masked_adam, unlocked);
  m.def("cuda_topk_adam", &gradsel::topk_adam, unlocked);
}
