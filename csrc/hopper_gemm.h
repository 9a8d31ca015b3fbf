// The GEMM template of the Hopper kernels: CUTLASS 3.x, warp-specialised, operands loaded by TMA,
// fp32 accumulators, and an epilogue chosen by the caller.
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

namespace vlm_fast {

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using MatrixStride = cute::Stride<int64_t, cute::_1, int64_t>;      // (row, column, batch)
using TransposedStride = cute::Stride<cute::_1, int64_t, int64_t>;  // the transposed view
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

inline constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
inline constexpr int kAlignment = 16 / sizeof(Element);

// Tiles of the result are 128 x 128 (TILE in kernels/_hopper.py). Two warp groups alternate: one
// runs the main loop while the other runs its epilogue.
using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using MainSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;

// Tile and element types that the nodes of an epilogue are built from.
using EpilogueTraits = cutlass::epilogue::collective::detail::EpilogueDescriptor<
    Tile, cutlass::epilogue::collective::EpilogueTileAuto, void, Element, EpilogueSchedule>;

template <typename LayoutA, typename LayoutB, typename LayoutOut, typename Visitor>
struct Gemm {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, LayoutOut, kAlignment,
      Element, LayoutOut, kAlignment, EpilogueSchedule, Visitor>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LayoutA, kAlignment, Element,
      LayoutB, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      MainSchedule>::CollectiveOp;
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
    // Queried once, for the GPU of the first call: multiprocessors and active clusters.
    static const auto hardware =
        cutlass::KernelHardwareInfo::make_kernel_hardware_info<Kernel>(device);
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1},
        operands,
        epilogue,
        {device, hardware.sm_count, hardware.max_active_clusters}};
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
