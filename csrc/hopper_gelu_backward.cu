// dz = (dy W) * gelu'(z). The same epilogue also writes h = gelu(z) and partial sums of the bias
// gradient, one row per tile of tokens: no atomics, one fixed order of summation.
//
// The GEMM computes the transposed product, features by tokens, in column-major order, which is the
// same memory. So a thread holds four features, and its sum over tokens stays in registers.
#include "hopper_gelu.h"
#include "hopper_gemm.h"
#include "hopper_gemms.h"

namespace vlm_fast {

namespace {

template <int N>
using Floats = cutlass::Array<float, N>;

template <typename T>
struct Cdf;
template <typename T>
struct Gelu;
template <typename T>
struct TimesSlope;
template <typename T>
struct First;

// A separate node, because the compiler computes erf twice if the two users compute the CDF.
template <int N>
struct Cdf<Floats<N>> {
  CUTLASS_DEVICE Floats<N> operator()(Floats<N> const& z) const {
    Floats<N> cdf;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) cdf[i] = normal_cdf(z[i]);
    return cdf;
  }
};

template <int N>
struct Gelu<Floats<N>> {
  CUTLASS_DEVICE Floats<N> operator()(Floats<N> const& z, Floats<N> const& cdf) const {
    Floats<N> h;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) h[i] = gelu(z[i], cdf[i]);
    return h;
  }
};

template <int N>
struct TimesSlope<Floats<N>> {
  CUTLASS_DEVICE Floats<N> operator()(Floats<N> const& dh, Floats<N> const& z,
                                      Floats<N> const& cdf) const {
    Floats<N> dz;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) dz[i] = dh[i] * gelu_slope(z[i], cdf[i]);
    return dz;
  }
};

// Returns the first input. The second makes the root of the graph depend on the other stores.
template <int N>
struct First<Floats<N>> {
  CUTLASS_DEVICE Floats<N> operator()(Floats<N> const& result, Floats<N> const&) const {
    return result;
  }
};

using namespace cutlass::epilogue::fusion;
namespace detail = cutlass::epilogue::collective::detail;
using cute::seq;
using Loaded = detail::AuxLoadDescriptor<EpilogueTraits, ColumnMajor, Element>;
using Stored = detail::AuxStoreDescriptor<EpilogueTraits, ColumnMajor, Element>;
using Z = Sm90AuxLoad<Loaded::Stages, Loaded::EpilogueTile, Element, Loaded::Stride,
                      Loaded::SmemLayoutAtom, Loaded::CopyOpS2R>;
using H = Sm90AuxStore<Stored::Stages, Stored::EpilogueTile, Element, kRound, Stored::Stride,
                       Stored::SmemLayoutAtom, Stored::CopyOpR2S>;
constexpr bool kSumsTiles = false;  // the caller sums the rows of the tiles
using BiasSums = Sm90ColReduction<cutlass::plus, cutlass::plus, cutlass::plus, 0, Tile,
                                  float, float, kRound, cute::Stride<cute::_1, cute::_0, int64_t>,
                                  4, true, kSumsTiles>;
template <template <typename> class Function, typename Out = float>
using Compute = Sm90Compute<Function, Out, float, kRound>;
using Visitor = Sm90TopologicalVisitor<
    float,
    cute::tuple<seq<>, seq<>, seq<1>, seq<0, 1, 2>, seq<3>, seq<1, 2>, seq<5>, seq<4, 6>>,
    Sm90AccFetch,             // 0: dh
    Z,                        // 1
    Compute<Cdf>,             // 2
    Compute<TimesSlope>,      // 3: dz
    BiasSums,                 // 4
    Compute<Gelu>,            // 5
    H,                        // 6
    Compute<First, Element>>; // 7
using GeluBackward = Gemm<ColumnMajor, ColumnMajor, ColumnMajor, Visitor>;

}  // namespace

const char* gelu_backward(const void* dy, int64_t dy_row, const void* weight, const void* z,
                          void* dz, void* h, void* bias_sums, int64_t rows, int64_t hidden,
                          int64_t out_features, void* stream) {
  const TransposedStride across{{}, hidden, 0};
  const auto in = [](const void* pointer) { return static_cast<const Element*>(pointer); };
  const auto out = [](void* pointer) { return static_cast<Element*>(pointer); };
  return GeluBackward::run(
      hidden, rows, out_features, {in(weight), {{}, hidden, 0}, in(dy), {dy_row, {}, 0}},
      {{{}, {in(z), Element(0), across}, {}, {}, {bias_sums, 0.0f, {}}, {}, {out(h), across}, {}},
       nullptr, {}, out(dz), across},
      stream);
}

}  // namespace vlm_fast
