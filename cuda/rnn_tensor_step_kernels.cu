// Entry points of the layers that take a launch a step on tensor cores.

#include "rnn_tensor.h"
#include "rnn_tensor_step.cuh"

namespace cnnrnn::cuda {
namespace {

// Rows of a block: 16 where there are no more; else as many as registers hold sums for.
template <typename E>
constexpr int kRowTilesOfMany = kIsWhole<E> ? 2 : 4;

// Both passes with few rows and with many. Backward the operand is as many times longer as there are gates,
// so that a block with more columns has less of it to load.
struct StreamForward {
  using Params = RnnForward;
  static constexpr bool kIsForward = true;
  template <typename E, bool kFew>
  using Tile = StreamTile<kFew ? 1 : kRowTilesOfMany<E>, 2>;
  template <typename Cell, typename E, typename Tile>
  using Product = StreamProduct<E, Tile, Tile::kEights * Cell::kGates>;
  template <typename Cell, typename E, typename Tile>
  static auto kernel() {
    return rnn_stream_forward<Cell, E, Tile>;
  }
};
struct StreamBackward {
  using Params = RnnBackward;
  static constexpr bool kIsForward = false;
  template <typename E, bool kFew>
  using Tile = StreamTile<kFew ? 1 : kRowTilesOfMany<E>, kFew ? 2 : 4>;
  template <typename Cell, typename E, typename Tile>
  using Product = StreamProduct<E, Tile, Tile::kEights>;
  template <typename Cell, typename E, typename Tile>
  static auto kernel() {
    return rnn_stream_backward<Cell, E, Tile>;
  }
};

// Calls function with values of the element's type and of the block's tile.
template <typename Pass, typename Function>
auto with_tile(DType dtype, const RnnShape& s, RnnProducts products, const Function& function) {
  const auto with_element = [&](auto element) {
    using E = decltype(element);
    return s.batch <= kTileRows ? function(element, typename Pass::template Tile<E, true>{})
                                : function(element, typename Pass::template Tile<E, false>{});
  };
  if (dtype == DType::kHalf) return with_element(Half{});
  if (dtype == DType::kBFloat16) return with_element(BFloat16{});
  if (products == RnnProducts::kTf32) return with_element(Tf32{});
  return with_element(WholeFloat{});
}

template <typename Pass>
void run(RnnCell cell, DType dtype, RnnProducts products, const typename Pass::Params& p, void* stream) {
  const RnnShape& s = p.shape;
  const int eights = ceil_div(s.hidden, kGroupUnits);
  with_tile<Pass>(dtype, s, products, [&](auto element, auto tile) {
    using E = decltype(element);
    using Tile = decltype(tile);
    with_cell(cell, [&](auto unit) {
      using Cell = decltype(unit);
      const int64_t words = int64_t(eights) * Cell::kGates * unit_slices<E>(s.hidden) * 32;
      launch(rnn_pack_fragments<E, Pass::kIsForward>,
             dim3(grid_size(ceil_div(words, int64_t(kPackThreads))), s.directions), kPackThreads, 0, stream,
             WeightPointers{{p.weight_hh[0], p.weight_hh[1]}}, s.hidden, Cell::kGates,
             static_cast<Words4*>(p.packed));
      const dim3 grid(ceil_div(eights, Tile::kEights), ceil_div(s.batch, Tile::kRows), s.directions);
      for (int i = -1; i < s.steps; ++i)
        launch(Pass::template kernel<Cell, E, Tile>(), grid, kStreamThreads,
               Pass::template Product<Cell, E, Tile>::kBytes, stream, p,
               Pass::kIsForward ? i : s.steps - 2 - i);
    });
  });
}

}  // namespace

StreamNeeds rnn_tensor_step_needs(RnnCell cell, DType dtype, const RnnShape& s, RnnProducts products,
                                  bool forward) {
  return with_cell(cell, [&](auto unit) {
    using Cell = decltype(unit);
    const auto of = [&](auto pass) {
      using Pass = decltype(pass);
      return with_tile<Pass>(dtype, s, products, [&](auto element, auto tile) -> StreamNeeds {
        using E = decltype(element);
        using Product = typename Pass::template Product<Cell, E, decltype(tile)>;
        const size_t slices = unit_slices<E>(s.hidden), directions = s.directions;
        const size_t packed = directions * ceil_div(s.hidden, kGroupUnits) * Cell::kGates * slices * 32;
        const size_t row = slices * kSliceBytes * (Pass::kIsForward ? 1 : Cell::kGates);
        return {Product::kBytes, packed * kWordBytes, 2 * directions * s.batch * row};
      });
    };
    return forward ? of(StreamForward{}) : of(StreamBackward{});
  });
}

void rnn_tensor_step_forward(RnnCell cell, DType dtype, RnnProducts products, const RnnForward& p,
                             void* stream) {
  run<StreamForward>(cell, dtype, products, p, stream);
}

void rnn_tensor_step_backward(RnnCell cell, DType dtype, RnnProducts products, const RnnBackward& p,
                              void* stream) {
  run<StreamBackward>(cell, dtype, products, p, stream);
}

}  // namespace cnnrnn::cuda
