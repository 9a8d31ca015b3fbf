// What the Hopper GEMMs share: CUTLASS 3.x, warp-specialised, TMA in and fp32 accumulators, with an
// epilogue of their own.
//
// The C ABI is plain on purpose, no Python and no torch in it: one library serves every version of
// both. All pointers are to device memory and 16-byte aligned, as are all rows; the caller has
// checked. A function returns null, or what went wrong.
#pragma once

#include <cstdint>
#include <limits>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/kernel_hardware_info.hpp"

#define VLM_FAST_NAMED(name, config) name##_##config
#define VLM_FAST_NAME(name, config) VLM_FAST_NAMED(name, config)
// The version of the signatures and the number of the config are in a name: a library of another
// version lacks the function, rather than misreading its arguments.
#define VLM_FAST_EXPORT(name) \
  extern "C" __attribute__((visibility("default"))) const char* VLM_FAST_NAME( \
      vlm_fast_v1_##name, CONFIG)

namespace vlm_fast {

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using MatrixStride = cute::Stride<int64_t, cute::_1, int64_t>;      // (row, column, batch)
using TransposedStride = cute::Stride<cute::_1, int64_t, int64_t>;  // the same, read the other way
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

inline constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
inline constexpr int kAlignment = 16 / sizeof(Element);

// Two warp groups in turns, one in the main loop while the other is in its epilogue.
struct PingPong {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// Two warp groups share a tile, twice as large; nothing hides the epilogue.
struct Cooperative {
  using Main = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <int M, int N, typename Schedule_>
struct Tile {
  using Shape = cute::Shape<cute::Int<M>, cute::Int<N>, cute::_64>;
  using Schedule = Schedule_;
};

// What nodes of an epilogue must know of it. `Out` is void where a node stores the result.
template <typename Tile, typename Out>
using EpilogueOf = cutlass::epilogue::collective::detail::EpilogueDescriptor<
    typename Tile::Shape, cutlass::epilogue::collective::EpilogueTileAuto, void, Out,
    typename Tile::Schedule::Epilogue>;

template <typename Tile, typename LayoutA, typename LayoutB, typename Out, typename LayoutOut,
          typename Visitor>
struct Gemm {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename Tile::Shape, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutOut, kAlignment,
      Out, LayoutOut, kAlignment, typename Tile::Schedule::Epilogue, Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, kAlignment, Element,
      LayoutB, kAlignment, float, typename Tile::Shape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Tile::Schedule::Main>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* run(int64_t m, int64_t n, int64_t k,
                         typename Mainloop::Arguments const& operands,
                         typename Epilogue::Arguments const& epilogue, void* stream) {
    constexpr int64_t most = std::numeric_limits<int>::max();
    if (m > most || n > most || k > most) return "a size is beyond 2^31 - 1";
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return cudaGetErrorString(error);
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1},
        operands,
        epilogue,
        cutlass::KernelHardwareInfo::make_kernel_hardware_info<Kernel>(device)};
    if (Device::get_workspace_size(arguments) != 0) return "the kernel asks for a workspace";
    cutlass::Status status = Device::can_implement(arguments);
    Device gemm;
    if (status == cutlass::Status::kSuccess) {
      status = gemm.run(arguments, nullptr, static_cast<cudaStream_t>(stream));
    }
    return status == cutlass::Status::kSuccess ? nullptr : cutlass::cutlassGetStatusString(status);
  }
};

}  // namespace vlm_fast
