// The Python module _C: integers in, kernels out. No torch header, so that one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/pointer.h"
#include "cpu/adam/adam.h"
#include "cpu/bitmask/bitmask.h"
#include "cpu/indices.h"
#include "cpu/product/product.h"
#include "cpu/rows/rows.h"
#include "cpu/simd.h"
#include "cpu/topk/topk.h"
#include "cpu/topk_adam/topk_adam.h"
#include "cpu/weight_grad/weight_grad.h"
#include "cuda/bindings.h"
#include "cuda/driver.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace {

using gradsel::pointer;

// Raised whenever a signature or the Adam table changes; native.py refuses a module with another number.
constexpr int kAbi = 10;

gradsel::Dtype dtype_of(int64_t code) { return static_cast<gradsel::Dtype>(code); }

void topk_rows(int64_t grad, int64_t dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
               int64_t k, int64_t out, int64_t bits, int threads) {
  py::gil_scoped_release release;
  gradsel::topk_rows(pointer<void>(grad), dtype_of(dtype), rows, cols, row_stride, col_stride, k, pointer<int32_t>(out),
                     pointer<uint32_t>(bits), threads);
}

void pack_bits(int64_t mask, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int64_t bits,
               int threads) {
  py::gil_scoped_release release;
  gradsel::pack_bits(pointer<uint8_t>(mask), rows, cols, row_stride, col_stride, pointer<uint32_t>(bits), threads);
}

void unpack_bits(int64_t bits, int64_t rows, int64_t cols, int64_t mask, int threads) {
  py::gil_scoped_release release;
  gradsel::unpack_bits(pointer<uint32_t>(bits), rows, cols, pointer<uint8_t>(mask), threads);
}

// None, or the smallest and largest column found when one is out of range.
py::object extremes(bool good, const gradsel::Range& found) {
  if (good) return py::none();
  return py::make_tuple(found.low, found.high);
}

py::object gather_rows(int64_t weight, int64_t dtype, int64_t rows, int64_t cols, int64_t row_stride,
                       int64_t col_stride, int64_t index, int64_t k, int64_t out, int threads) {
  gradsel::Range found;
  bool good;
  {
    py::gil_scoped_release release;
    good = gradsel::gather_rows(pointer<void>(weight), dtype_of(dtype), rows, cols, row_stride, col_stride,
                                pointer<int32_t>(index), k, pointer<void>(out), threads, &found);
  }
  return extremes(good, found);
}

py::object scatter_rows(int64_t weight, int64_t dtype, int64_t rows, int64_t cols, int64_t row_stride,
                        int64_t col_stride, int64_t index, int64_t k, int64_t values, int64_t values_dtype,
                        int threads) {
  gradsel::Range found;
  bool good;
  {
    py::gil_scoped_release release;
    good = gradsel::scatter_rows(pointer<void>(weight), dtype_of(dtype), rows, cols, row_stride, col_stride,
                                 pointer<int32_t>(index), k, pointer<void>(values), dtype_of(values_dtype), threads,
                                 &found);
  }
  return extremes(good, found);
}

py::object columns_fault(int64_t columns, int64_t count, int64_t end, int threads) {
  gradsel::Range found;
  bool good;
  {
    py::gil_scoped_release release;
    good = gradsel::columns_below(pointer<int32_t>(columns), count, end, threads, &found);
  }
  return extremes(good, found);
}

bool row_offsets_ascend(int64_t offsets, int64_t rows, int64_t nnz) {
  return gradsel::row_offsets_ascend(pointer<int64_t>(offsets), rows, nnz);
}

void take_columns(int64_t input, int64_t dtype, int64_t batch_stride, int64_t token_stride, int64_t feature_stride,
                  int64_t batches, int64_t tokens, int64_t columns, int64_t count, int64_t out, int threads) {
  py::gil_scoped_release release;
  gradsel::take_columns(pointer<void>(input), dtype_of(dtype), {batch_stride, token_stride, feature_stride}, batches,
                        tokens, pointer<int32_t>(columns), count, pointer<void>(out), threads);
}

using Three = std::array<int64_t, 3>;  // batch, tokens, features

void selected_weight_grad(int64_t dtype, int64_t grad_output, const Three& shape, const Three& grad_output_stride,
                          int64_t input, int64_t n, const Three& input_stride, int64_t cols, int64_t row_offsets,
                          int64_t k, int64_t out, int64_t bias, int threads) {
  const auto strides = [](const Three& s) { return gradsel::Strides{s[0], s[1], s[2]}; };
  py::gil_scoped_release release;
  gradsel::selected_weight_grad(
      {dtype_of(dtype), shape[0], shape[1], shape[2], n, pointer<void>(grad_output), strides(grad_output_stride),
       pointer<void>(input), strides(input_stride), pointer<int32_t>(cols), pointer<int64_t>(row_offsets), k,
       pointer<void>(out), pointer<void>(bias)},
      threads);
}

using Two = std::array<int64_t, 2>;  // tokens, features

py::object selected_addmm(int64_t dtype, int64_t output, const Two& shape, const Two& output_stride, int64_t input,
                          int64_t n, const Two& input_stride, int64_t cols, int64_t row_offsets, int64_t k,
                          int64_t values, int threads) {
  gradsel::Range found;
  bool good;
  {
    py::gil_scoped_release release;
    good = gradsel::selected_addmm(
        {dtype_of(dtype), shape[0], shape[1], n, pointer<void>(output), output_stride[0], output_stride[1],
         pointer<void>(input), input_stride[0], input_stride[1], pointer<int32_t>(cols), pointer<int64_t>(row_offsets),
         k, pointer<void>(values)},
        threads, &found);
  }
  return extremes(good, found);
}

// Size and field offsets of AdamItem, in bytes: (size, {name: offset}).
py::tuple adam_item_layout() {
#define GRADSEL_COUNT(name) +1
  static_assert(sizeof(gradsel::AdamItem) == sizeof(int64_t) * (0 GRADSEL_ADAM_ITEM_FIELDS(GRADSEL_COUNT)),
                "GRADSEL_ADAM_ITEM_FIELDS lists every field of AdamItem, and each has 64 bits");
#undef GRADSEL_COUNT
  py::dict offsets;
#define GRADSEL_OFFSET(name) offsets[#name] = offsetof(gradsel::AdamItem, name);
  GRADSEL_ADAM_ITEM_FIELDS(GRADSEL_OFFSET)
#undef GRADSEL_OFFSET
  return py::make_tuple(sizeof(gradsel::AdamItem), offsets);
}

// None, or (item, low, high, end) of indices out of range; then nothing has changed.
py::object masked_adam(int64_t table, int64_t count, double lr, double beta1, double beta2, double eps,
                       double weight_decay, bool decoupled_weight_decay, bool maximize, double anchor, bool anchor_l1,
                       bool anchor_decoupled, double grad_scale, int threads) {
  gradsel::AdamFault fault;
  {
    py::gil_scoped_release release;
    fault = gradsel::masked_adam(pointer<gradsel::AdamItem>(table), count,
                                 {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, anchor,
                                  anchor_l1, anchor_decoupled, grad_scale},
                                 threads);
  }
  if (!fault.any()) return py::none();
  return py::make_tuple(fault.item, fault.found.low, fault.found.high, fault.end);
}

void topk_masked_adam(int64_t table, int64_t count, const std::vector<int64_t>& bits, double lr, double beta1,
                      double beta2, double eps, double weight_decay, bool decoupled_weight_decay, bool maximize,
                      double anchor, bool anchor_l1, bool anchor_decoupled, double grad_scale, bool skip,
                      int threads) {
  py::gil_scoped_release release;
  gradsel::topk_masked_adam(pointer<gradsel::AdamItem>(table), count, bits.empty() ? nullptr : bits.data(),
                            {lr, beta1, beta2, eps, weight_decay, decoupled_weight_decay, maximize, anchor, anchor_l1,
                             anchor_decoupled, grad_scale},
                            skip, threads);
}

std::string simd() { return gradsel::simd_name(gradsel::simd()); }

void limit_simd(const std::string& name) {
  for (auto level : {gradsel::Simd::kPortable, gradsel::Simd::kAvx2, gradsel::Simd::kAvx512}) {
    if (name == gradsel::simd_name(level)) {
      gradsel::limit_simd(level);
      return;
    }
  }
  throw std::invalid_argument("unknown SIMD level " + name + "; levels are portable, avx2 and avx512");
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown compiler";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ kernels of gradsel_kernels on raw addresses. Use gradsel_kernels, which checks what is passed here.";
  m.attr("ABI") = kAbi;
#ifdef _OPENMP
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  m.attr("COMPILER") = compiler();
  m.attr("ADAM_ITEM") = adam_item_layout();
  m.def("simd", &simd);
  m.def("limit_simd", &limit_simd, "Uses at most this level from now on: portable, avx2 or avx512. For tests.");
  m.def("topk_rows", &topk_rows);
  m.def("pack_bits", &pack_bits);
  m.def("unpack_bits", &unpack_bits);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("columns_fault", &columns_fault);
  m.def("row_offsets_ascend", &row_offsets_ascend);
  m.def("take_columns", &take_columns);
  m.def("selected_weight_grad", &selected_weight_grad);
  m.def("selected_addmm", &selected_addmm);
  m.def("masked_adam", &masked_adam);
  m.def("topk_masked_adam", &topk_masked_adam);
  m.def("cuda_load", [](const py::bytes& fatbin) { gradsel::cuda_load(fatbin); });
  m.def("cuda_why_off", &gradsel::cuda_why_off);
  bind_cuda(m);
  bind_python(m);
}
