// h = gelu(z) with z = x W^T + bias, and z itself if the backward needs it.
//
// z is rounded before the GELU, as a separate linear would store it. So h does not depend on
// whether z is stored, recomputed or not needed.
#include "hopper_gelu.h"
#include "hopper_gemm.h"
#include "hopper_gemms.h"

namespace vlm_fast {

namespace {

template <typename T>
struct Gelu;

template <int N>
struct Gelu<cutlass::Array<float, N>> {
  CUTLASS_DEVICE cutlass::Array<float, N> operator()(cutlass::Array<float, N> const& z) const {
    cutlass::Array<float, N> h;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) h[i] = gelu(z[i], normal_cdf(z[i]));
    return h;
  }
};

using namespace cutlass::epilogue::fusion;
using Stored = cutlass::epilogue::collective::detail::AuxStoreDescriptor<EpilogueTraits, RowMajor,
                                                                        Element>;
using Bias = Sm90RowBroadcast<0, Tile, Element, float>;
using Preactivation = Sm90EVT<Sm90Compute<cutlass::plus, Element, float, kRound>, Sm90AccFetch, Bias>;
using KeptZ = Sm90AuxStore<Stored::Stages, Stored::EpilogueTile, Element, kRound, Stored::Stride,
                           Stored::SmemLayoutAtom, Stored::CopyOpR2S>;
using Visitor = Sm90EVT<Sm90Compute<Gelu, Element, float, kRound>, Sm90EVT<KeptZ, Preactivation>>;
using LinearGelu = Gemm<RowMajor, ColumnMajor, RowMajor, Visitor>;

}  // namespace

const char* linear_gelu(const void* x, int64_t x_row, const void* weight, const void* bias, void* z,
                        void* h, int64_t rows, int64_t hidden, int64_t inner, void* stream) {
  const MatrixStride out{hidden, {}, 0};
  const auto in = [](const void* pointer) { return static_cast<const Element*>(pointer); };
  return LinearGelu::run(
      rows, hidden, inner, {in(x), {x_row, {}, 0}, in(weight), {inner, {}, 0}},
      {{{{{}, {in(bias)}, {}}, {static_cast<Element*>(z), out}}, {}},
       nullptr, {}, static_cast<Element*>(h), out},
      stream);
}

}  // namespace vlm_fast
