// out[slots[i]] = h[i] W^T + bias: the second linear of a projector, straight into its rows of the
// language model's embeddings.
#include "hopper_gemm.h"
#include "hopper_scatter_rows.h"

namespace vlm_fast {

#if CONFIG == 1
using Tiling = Tile<128, 256, Cooperative>;
#elif CONFIG == 2
using Tiling = Tile<128, 128, PingPong>;
#endif

using namespace cutlass::epilogue::fusion;
using Bias = Sm90RowBroadcast<0, Tiling::Shape, Element, float>;
using Sum = Sm90EVT<Sm90Compute<cutlass::plus, float, float, kRound>, Sm90AccFetch, Bias>;
using Visitor = Sm90EVT<ScatterRows<Tiling>, Sum>;
using LinearScatter = Gemm<Tiling, RowMajor, ColumnMajor, void, RowMajor, Visitor>;

}  // namespace vlm_fast

// h (rows, inner) at a pitch of `h_row` elements, weight (cols, inner), bias (cols,) or null,
// slots int32 (rows,), out (*, cols) at a pitch of `out_row`.
VLM_FAST_EXPORT(linear_scatter)
(const void* h, int64_t h_row, const void* weight, const void* bias, const void* slots, void* out,
 int64_t out_row, int64_t rows, int64_t cols, int64_t inner, void* stream) {
  using namespace vlm_fast;
  const auto in = [](const void* pointer) { return static_cast<const Element*>(pointer); };
  return LinearScatter::run(
      rows, cols, inner, {in(h), {h_row, {}, 0}, in(weight), {inner, {}, 0}},
      {{{{}, {in(bias)}, {}},
        {static_cast<const int32_t*>(slots), static_cast<Element*>(out), out_row}},
       nullptr, {}, nullptr, {}},
      stream);
}
