// The one file that knows Python. Tensors arrive as addresses, so a build serves every torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "image_tokens.h"
#include "pixel_shuffle_norm.h"

namespace py = pybind11;
using namespace vlm_fast;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_at(uintptr_t address, int64_t stride) { return {pointer<const char>(address), stride}; }

std::vector<RowBlock> row_blocks(const std::vector<uintptr_t>& addresses,
                                 const std::vector<int64_t>& counts,
                                 const std::vector<int64_t>& strides) {
  if (counts.size() != addresses.size() || strides.size() != addresses.size()) {
    throw std::invalid_argument("feature pointers, rows and strides differ in length");
  }
  std::vector<RowBlock> blocks;
  for (size_t i = 0; i < addresses.size(); ++i) {
    blocks.push_back({rows_at(addresses[i], strides[i]), counts[i]});
  }
  return blocks;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "image_token_slots",
      [](uintptr_t mask, int64_t rows, uintptr_t slots, int64_t capacity) {
        return image_token_slots(pointer<const uint8_t>(mask), rows, pointer<int32_t>(slots),
                                 capacity);
      },
      py::arg("mask_ptr"), py::arg("rows"), py::arg("slots_ptr"), py::arg("capacity"), without_gil);

  m.def(
      "merge_image_tokens",
      [](uintptr_t embeds, int64_t embeds_stride, uintptr_t slots,
         const std::vector<uintptr_t>& features, const std::vector<int64_t>& feature_rows,
         const std::vector<int64_t>& feature_strides, uintptr_t out, int64_t rows,
         int64_t row_bytes, int threads) {
        merge_image_tokens(rows_at(embeds, embeds_stride), pointer<const int32_t>(slots),
                           row_blocks(features, feature_rows, feature_strides), pointer<char>(out),
                           rows, row_bytes, threads);
      },
      py::arg("embeds_ptr"), py::arg("embeds_row_stride_bytes"), py::arg("slots_ptr"),
      py::arg("feature_ptrs"), py::arg("feature_rows"), py::arg("feature_row_stride_bytes"),
      py::arg("out_ptr"), py::arg("rows"), py::arg("row_bytes"), py::arg("threads"), without_gil);

  m.def(
      "gather_image_tokens",
      [](uintptr_t source, int64_t source_stride, uintptr_t slots, int64_t start, int64_t rows,
         uintptr_t out, int64_t row_bytes, int threads) {
        gather_image_tokens(rows_at(source, source_stride), pointer<const int32_t>(slots) + start,
                            pointer<char>(out), rows, row_bytes, threads);
      },
      py::arg("source_ptr"), py::arg("source_row_stride_bytes"), py::arg("slots_ptr"),
      py::arg("start"), py::arg("rows"), py::arg("out_ptr"), py::arg("row_bytes"),
      py::arg("threads"), without_gil);

  m.def(
      "clear_image_tokens",
      [](uintptr_t source, int64_t source_stride, uintptr_t slots, int64_t count, uintptr_t out,
         int64_t rows, int64_t row_bytes, int threads) {
        clear_image_tokens(rows_at(source, source_stride), pointer<const int32_t>(slots), count,
                           pointer<char>(out), rows, row_bytes, threads);
      },
      py::arg("source_ptr"), py::arg("source_row_stride_bytes"), py::arg("slots_ptr"),
      py::arg("count"), py::arg("out_ptr"), py::arg("rows"), py::arg("row_bytes"),
      py::arg("threads"), without_gil);

  py::class_<Merge>(m, "Merge")
      .def(py::init([](const std::array<int64_t, 9>& sizes, uintptr_t index, bool by_channel,
                       bool after) {
             const auto [merged, factor, cols, blocks, across, width, tokens, batch, token] = sizes;
             return Merge{merged,     factor, cols,   blocks, across,
                          width,      tokens, batch,  token,  pointer<const int64_t>(index),
                          by_channel, after};
           }),
           py::arg("sizes"), py::arg("index_ptr"), py::arg("by_channel"), py::arg("after"));

  py::class_<Norm>(m, "Norm")
      .def(py::init([](int kind, uintptr_t weight, uintptr_t bias, float eps) {
             return Norm{static_cast<NormKind>(kind), pointer<const float>(weight),
                         pointer<const float>(bias), eps};
           }),
           py::arg("kind"), py::arg("weight_ptr"), py::arg("bias_ptr"), py::arg("eps"));

  m.def(
      "pixel_shuffle_norm",
      [](uintptr_t x, bool halves, const Merge& merge, const Norm& norm, uintptr_t y,
         uintptr_t mean, uintptr_t rstd, int threads) {
        pixel_shuffle_norm(pointer<const void>(x), halves ? Dtype::kBFloat16 : Dtype::kFloat, merge,
                           norm, pointer<void>(y), pointer<float>(mean), pointer<float>(rstd),
                           threads);
      },
      py::arg("x_ptr"), py::arg("halves"), py::arg("merge"), py::arg("norm"), py::arg("y_ptr"),
      py::arg("mean_ptr"), py::arg("rstd_ptr"), py::arg("threads"), without_gil);

  m.def(
      "pixel_shuffle_norm_backward",
      [](uintptr_t dy, uintptr_t x, bool halves, const Merge& merge, const Norm& norm,
         uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
         int threads) {
        pixel_shuffle_norm_backward(
            pointer<const void>(dy), pointer<const void>(x),
            halves ? Dtype::kBFloat16 : Dtype::kFloat, merge, norm, pointer<const float>(mean),
            pointer<const float>(rstd), pointer<void>(dx), pointer<float>(dweight),
            pointer<float>(dbias), threads);
      },
      py::arg("dy_ptr"), py::arg("x_ptr"), py::arg("halves"), py::arg("merge"), py::arg("norm"),
      py::arg("mean_ptr"), py::arg("rstd_ptr"), py::arg("dx_ptr"), py::arg("dweight_ptr"),
      py::arg("dbias_ptr"), py::arg("threads"), without_gil);
}
