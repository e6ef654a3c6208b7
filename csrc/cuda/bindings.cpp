// What Python calls to run a kernel of kernels.cu: these functions fill in parameters and choose launch sizes.
#include "cuda/bindings.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/pointer.h"
#include "cuda/adam.h"
#include "cuda/launch.h"
#include "cuda/topk.h"

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

// `size` is an element's, in bytes.
void topk_rows(int64_t grad, int64_t size, uint64_t nan, int64_t rows, int64_t cols, int64_t row_stride,
               int64_t col_stride, int64_t k, int64_t out, int64_t bits, int device, int64_t stream) {
  TopK p{pointer<void>(grad), rows, cols, row_stride, col_stride, pointer<int32_t>(out), pointer<uint32_t>(bits), nan,
         static_cast<int>(k), 0, false};
  if (rows == 0 || k == 0) return;
  const std::string suffix = "_" + std::to_string(8 * size);
  if (k > kMostFew) {
    launch("gradsel_topk_many" + suffix, rows, kTopKManyThreads, 2048, device, stream, p);
    return;
  }
  p.vectors = (cols == 1 || col_stride == 1) && grad % 16 == 0 && (rows == 1 || row_stride * size % 16 == 0);
  // If rows are few, the warps of a block share them: a multiprocessor needs 16 warps to hide latency.
  const int64_t columns = 32 * columns_of_lane(size), chunks = (cols + columns - 1) / columns;
  const int most = kTopKThreads / 32;
  int warps = 1;
  for (; warps < most && chunks >= 2 * warps && rows * warps < 16 * cuda_multiprocessors(device); warps *= 2)
    ++p.log2_warps;
  const int rows_of_block = most / warps;
  const unsigned list = static_cast<unsigned>(kCandidates * ((size == 8 ? 8 : 4) + 4) + 4);
  const char* kind = k == 1 ? "gradsel_topk_one" : "gradsel_topk_few";
  launch(kind + suffix, (rows + rows_of_block - 1) / rows_of_block, kTopKThreads,
         static_cast<unsigned>(most) * (k == 1 ? 16u : list), device, stream, p);
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
                 bool anchor_l1, bool anchor_decoupled, int64_t grad_scale, int64_t found_inf, int device,
                 int64_t stream) {
  AdamStep step{{pointer<int64_t>(table), count},
                {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, anchor, anchor_l1,
                 anchor_decoupled, 1.0},
                pointer<float>(grad_scale),
                pointer<float>(found_inf)};
  const int64_t blocks = std::min<int64_t>(tiles, int64_t{kAdamBlocks} * cuda_multiprocessors(device));
  launch(float64 ? "gradsel_adam_step_64" : "gradsel_adam_step_32", std::max<int64_t>(1, blocks), kAdamThreads,
         kAdamShared, device, stream, step);
}

}  // namespace
}  // namespace gradsel

void bind_cuda(py::module_& m) {
  m.def("cuda_adam_table", &gradsel::adam_table);
  // A launch waits when a thousand are queued; meanwhile other Python threads can run.
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("cuda_topk_rows", &gradsel::topk_rows, unlocked);
  m.def("cuda_write_table", &gradsel::write_table, unlocked);
  m.def("cuda_masked_adam", &gradsel::masked_adam, unlocked);
}
