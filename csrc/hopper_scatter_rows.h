// The last node of an epilogue: rows of the result go wherever a list says, by pointer.
//
// TMA stores cannot scatter rows on Hopper. So a subtile goes to shared memory as for TMA, and all
// threads of the epilogue then carry it out row by row, 16 bytes each.
#pragma once

#include "hopper_gemm.h"

namespace vlm_fast {

template <typename Tile>
struct ScatterRows {
  using ElementAux = Element;  // what CUTLASS takes the result to be, where it has none to store
  using Stored = cutlass::epilogue::collective::detail::AuxStoreDescriptor<EpilogueOf<Tile, void>,
                                                                          RowMajor, Element>;
  using EpilogueTile = typename Stored::EpilogueTile;
  using CopyToShared = typename Stored::CopyOpR2S;
  // One stage: the collective lets nobody write the next subtile before all have left this one.
  using SharedLayout = decltype(cute::tile_to_shape(
      typename Stored::SmemLayoutAtom{}, cute::shape(EpilogueTile{}),
      cute::Step<cute::_1, cute::_2>{}));

  struct SharedStorage {
    alignas(cutlass::detail::alignment_for_swizzle(SharedLayout{}))
        cute::array_aligned<Element, cute::size(SharedLayout{})> subtile;
  };

  struct Arguments {
    const int32_t* slots;  // where each row of the result goes; negative: nowhere
    Element* out;
    int64_t out_row;
  };
  using Params = Arguments;

  template <typename Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments,
                                                  void*) {
    return arguments;
  }
  template <typename Problem>
  static bool can_implement(Problem const&, Arguments const& arguments) {
    return arguments.slots != nullptr && arguments.out != nullptr;
  }
  template <typename Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <typename Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ScatterRows() {}
  CUTLASS_HOST_DEVICE ScatterRows(Params const& params, SharedStorage const& shared)
      : params(&params), subtile(const_cast<Element*>(shared.subtile.data())) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <typename... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      cutlass::epilogue::fusion::detail::ProducerLoadArgs<Args...> const&) {
    return cutlass::epilogue::fusion::detail::EmptyProducerLoadCallbacks{};
  }

  template <typename Registers, typename ToShared, typename SharedTarget, typename Carry,
            typename SharedSource, typename Coordinates>
  struct Callbacks : cutlass::epilogue::fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Params const* params, Registers registers, ToShared to_shared,
                             SharedTarget target, Carry carry, SharedSource source,
                             Coordinates coordinates, int first_row, int first_col, int rows,
                             int cols)
        : params(params), registers(registers), to_shared(to_shared), target(target), carry(carry),
          source(source), coordinates(coordinates), first_row(first_row), first_col(first_col),
          rows(rows), cols(cols) {}

    Params const* params;
    Registers registers;      // of this thread, in the order of the accumulators
    ToShared to_shared;
    SharedTarget target;
    Carry carry;
    SharedSource source;      // (8, rows, columns) of this thread, 16 bytes at a time
    Coordinates coordinates;  // within the subtile, of the same
    int first_row, first_col, rows, cols;

    template <typename Accumulator, typename Input, int N>
    CUTLASS_DEVICE cutlass::Array<Input, N> visit(cutlass::Array<Accumulator, N> const&, int epi_v,
                                                  int, int,
                                                  cutlass::Array<Input, N> const& result) {
      auto fragments = cute::recast<cutlass::Array<Element, N>>(cute::coalesce(registers));
      fragments(epi_v) = cutlass::NumericArrayConverter<Element, Input, N, kRound>{}(result);
      return result;
    }

    CUTLASS_DEVICE void postreduce(int, int, int, bool) {
      using Layout = decltype(cute::layout(ToShared{}.get_slice(0).retile_S(Registers{})));
      cute::copy(to_shared, cute::make_tensor(registers.data(), Layout{}), target);
    }

    // Called by all threads, with the whole subtile in shared memory.
    CUTLASS_DEVICE void tma_store(int epi_m, int epi_n, int, bool) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < cute::size<1>(source); ++i) {
        const int row = first_row + epi_m * cute::size<0>(EpilogueTile{}) +
                        static_cast<int>(cute::get<0>(coordinates(0, i, 0)));
        const int slot = row < rows ? params->slots[row] : -1;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < cute::size<2>(source); ++j) {
          const int col = first_col + epi_n * cute::size<1>(EpilogueTile{}) +
                          static_cast<int>(cute::get<1>(coordinates(0, i, j)));
          auto piece = cute::make_tensor<Element>(cute::Int<kAlignment>{});
          cute::copy(carry, source(cute::_, i, j), piece);
          if (slot >= 0 && col < cols) {
            Element* to = params->out + static_cast<int64_t>(slot) * params->out_row + col;
            *reinterpret_cast<cute::uint128_t*>(to) = cute::recast<cute::uint128_t>(piece)(0);
          }
        }
      }
    }
  };

  template <bool ReferenceSrc, typename... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      cutlass::epilogue::fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    using namespace cute;
    static_assert(ReferenceSrc);
    auto shared = as_position_independent_swizzle_tensor(
        make_tensor(make_smem_ptr(subtile), SharedLayout{}));
    auto to_shared = make_tiled_copy_S(Copy_Atom<CopyToShared, Element>{}, args.tiled_copy);
    auto thread_to_shared = to_shared.get_slice(args.thread_idx);
    auto target = thread_to_shared.partition_D(shared);
    auto registers = make_tensor<Element>(shape(thread_to_shared.partition_S(shared)));

    constexpr int across = size<1>(EpilogueTile{}) / kAlignment;  // threads to a row
    constexpr int threads = size(decltype(args.tiled_copy){});
    using Carry = Copy_Atom<UniversalCopy<uint128_t>, Element>;
    auto thread_out = make_tiled_copy(Carry{},
                                      Layout<Shape<Int<threads / across>, Int<across>>,
                                             Stride<Int<across>, _1>>{},
                                      Layout<Shape<_1, Int<kAlignment>>>{})
                          .get_slice(args.thread_idx);
    auto source = thread_out.partition_S(shared);
    auto coordinates = thread_out.partition_S(make_identity_tensor(shape(EpilogueTile{})));

    auto [M, N, K, L] = args.problem_shape_mnkl;
    auto [m, n, k, l] = args.tile_coord_mnkl;
    return Callbacks<decltype(registers), decltype(to_shared), decltype(target), Carry,
                     decltype(source), decltype(coordinates)>(
        params, registers, to_shared, target, Carry{}, source, coordinates,
        m * size<0>(typename Tile::Shape{}), n * size<1>(typename Tile::Shape{}), M, N);
  }

  Params const* params;
  Element* subtile;
};

}  // namespace vlm_fast
