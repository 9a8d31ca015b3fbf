// The Python module vlm_fast._C. Tensors are passed as addresses, so that one build works with
// every version of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "anyres_pack.h"
#include "image_tokens.h"
#include "merge_tokens.h"
#include "pixel_shuffle_norm.h"

namespace py = pybind11;
using namespace vlm_fast;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Rows rows_at(uintptr_t address, int64_t stride) { return {pointer<const char>(address), stride}; }

// (address, stride in bytes, rows)
std::vector<RowBlock> row_blocks(const std::vector<std::array<int64_t, 3>>& parts) {
  std::vector<RowBlock> blocks;
  for (const auto& [address, stride, count] : parts) {
    blocks.push_back({rows_at(address, stride), count});
  }
  return blocks;
}

// (address, number of its first image token, rows)
std::vector<OutputBlock> output_blocks(const std::vector<std::array<int64_t, 3>>& parts) {
  std::vector<OutputBlock> blocks;
  for (const auto& [address, first, count] : parts) {
    blocks.push_back({pointer<char>(address), first, count});
  }
  return blocks;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "merge_image_tokens",
      [](uintptr_t embeds, int64_t embeds_stride, uintptr_t mask,
         const std::vector<std::array<int64_t, 3>>& features, uintptr_t out, int64_t rows,
         int64_t row_bytes, int threads) {
        return merge_image_tokens(rows_at(embeds, embeds_stride), pointer<const uint8_t>(mask),
                                  row_blocks(features), pointer<char>(out), rows, row_bytes,
                                  threads);
      },
      py::arg("embeds_ptr"), py::arg("embeds_row_stride_bytes"), py::arg("mask_ptr"),
      py::arg("features"), py::arg("out_ptr"), py::arg("rows"), py::arg("row_bytes"),
      py::arg("threads"), without_gil);

  m.def(
      "split_image_tokens",
      [](uintptr_t source, int64_t source_stride, uintptr_t mask, uintptr_t text,
         const std::vector<std::array<int64_t, 3>>& features, int64_t rows, int64_t row_bytes,
         int threads) {
        return split_image_tokens(rows_at(source, source_stride), pointer<const uint8_t>(mask),
                                  pointer<char>(text), output_blocks(features), rows, row_bytes,
                                  threads);
      },
      py::arg("source_ptr"), py::arg("source_row_stride_bytes"), py::arg("mask_ptr"),
      py::arg("text_ptr"), py::arg("features"), py::arg("rows"), py::arg("row_bytes"),
      py::arg("threads"), without_gil);

  m.def(
      "nearest",
      [](uintptr_t scores, int64_t rows, int64_t cols, uintptr_t inverse_a, uintptr_t inverse_b,
         uintptr_t best, uintptr_t found) {
        nearest(pointer<const float>(scores), rows, cols, pointer<const float>(inverse_a),
                pointer<const float>(inverse_b), pointer<float>(best), pointer<int32_t>(found));
      },
      py::arg("scores_ptr"), py::arg("rows"), py::arg("cols"), py::arg("inverse_a_ptr"),
      py::arg("inverse_b_ptr"), py::arg("best_ptr"), py::arg("nearest_ptr"), without_gil);

  m.def(
      "merged_order",
      [](uintptr_t best, uintptr_t nearest, int64_t batch, int64_t count, int64_t tokens,
         int64_t r, int64_t protected_a, int64_t protected_b, uintptr_t destination,
         uintptr_t order, uintptr_t start, int threads) {
        merged_order(pointer<const float>(best), pointer<const int32_t>(nearest), batch, count,
                     tokens, r, protected_a, protected_b, pointer<int32_t>(destination),
                     pointer<int32_t>(order), pointer<int32_t>(start), threads);
      },
      py::arg("best_ptr"), py::arg("nearest_ptr"), py::arg("batch"), py::arg("count"),
      py::arg("tokens"), py::arg("r"), py::arg("protected_a"), py::arg("protected_b"),
      py::arg("destination_ptr"), py::arg("order_ptr"), py::arg("start_ptr"), py::arg("threads"),
      without_gil);

  m.def(
      "sum_tokens",
      [](int element, uintptr_t x, int64_t x_batch_stride, int64_t x_token_stride, uintptr_t size,
         uintptr_t order, uintptr_t start, uintptr_t out, uintptr_t total, int64_t batch,
         int64_t tokens, int64_t merged, int64_t cols, int threads) {
        sum_tokens(static_cast<Element>(element),
                   {pointer<const char>(x), x_batch_stride, x_token_stride},
                   pointer<const float>(size), pointer<const int32_t>(order),
                   pointer<const int32_t>(start), pointer<char>(out), pointer<float>(total), batch,
                   tokens, merged, cols, threads);
      },
      py::arg("element"), py::arg("x_ptr"), py::arg("x_batch_stride"), py::arg("x_token_stride"),
      py::arg("size_ptr"), py::arg("order_ptr"), py::arg("start_ptr"), py::arg("out_ptr"),
      py::arg("total_ptr"), py::arg("batch"), py::arg("tokens"), py::arg("merged"),
      py::arg("cols"), py::arg("threads"), without_gil);

  m.def(
      "spread_tokens",
      [](int element, uintptr_t y, int64_t y_batch_stride, int64_t y_token_stride,
         uintptr_t destination, uintptr_t size, uintptr_t total, uintptr_t out, int64_t batch,
         int64_t tokens, int64_t merged, int64_t cols, int threads) {
        spread_tokens(static_cast<Element>(element),
                      {pointer<const char>(y), y_batch_stride, y_token_stride},
                      pointer<const int32_t>(destination), pointer<const float>(size),
                      pointer<const float>(total), pointer<char>(out), batch, tokens, merged,
                      cols, threads);
      },
      py::arg("element"), py::arg("y_ptr"), py::arg("y_batch_stride"), py::arg("y_token_stride"),
      py::arg("destination_ptr"), py::arg("size_ptr"), py::arg("total_ptr"), py::arg("out_ptr"),
      py::arg("batch"), py::arg("tokens"), py::arg("merged"), py::arg("cols"), py::arg("threads"),
      without_gil);

  m.def(
      "pack_rows",
      [](uintptr_t source, int64_t source_stride, uintptr_t slots, uintptr_t index, int64_t limit,
         uintptr_t fill, uintptr_t out, int64_t rows, int64_t row_bytes, int threads) {
        pack_rows(rows_at(source, source_stride), pointer<const int32_t>(slots),
                  pointer<const int32_t>(index), limit, pointer<const char>(fill),
                  pointer<char>(out), rows, row_bytes, threads);
      },
      py::arg("source_ptr"), py::arg("source_row_stride_bytes"), py::arg("slots_ptr"),
      py::arg("index_ptr"), py::arg("limit"), py::arg("fill_ptr"), py::arg("out_ptr"),
      py::arg("rows"), py::arg("row_bytes"), py::arg("threads"), without_gil);

  m.def(
      "merge_packed_rows",
      [](uintptr_t embeds, int64_t embeds_stride, uintptr_t mask, uintptr_t source,
         int64_t source_stride, uintptr_t index, int64_t count, int64_t limit, uintptr_t fill,
         uintptr_t out, uintptr_t positions, int64_t rows, int64_t row_bytes, int threads) {
        return merge_packed_rows(rows_at(embeds, embeds_stride), pointer<const uint8_t>(mask),
                                 rows_at(source, source_stride), pointer<const int32_t>(index),
                                 count, limit, pointer<const char>(fill), pointer<char>(out),
                                 pointer<int32_t>(positions), rows, row_bytes, threads);
      },
      py::arg("embeds_ptr"), py::arg("embeds_row_stride_bytes"), py::arg("mask_ptr"),
      py::arg("source_ptr"), py::arg("source_row_stride_bytes"), py::arg("index_ptr"),
      py::arg("count"), py::arg("limit"), py::arg("fill_ptr"), py::arg("out_ptr"),
      py::arg("positions_ptr"), py::arg("rows"), py::arg("row_bytes"), py::arg("threads"),
      without_gil);

  m.def(
      "blend_rows",
      [](uintptr_t source, int64_t source_stride, uintptr_t taps, uintptr_t weights, int64_t limit,
         uintptr_t fill, uintptr_t out, int64_t rows, int64_t cols, bool bf16, int threads) {
        blend_rows(rows_at(source, source_stride), pointer<const int32_t>(taps),
                   pointer<const int32_t>(weights), limit, pointer<const char>(fill),
                   pointer<char>(out), rows, cols, bf16, threads);
      },
      py::arg("source_ptr"), py::arg("source_row_stride_bytes"), py::arg("taps_ptr"),
      py::arg("weights_ptr"), py::arg("limit"), py::arg("fill_ptr"), py::arg("out_ptr"),
      py::arg("rows"), py::arg("cols"), py::arg("bf16"), py::arg("threads"), without_gil);

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
