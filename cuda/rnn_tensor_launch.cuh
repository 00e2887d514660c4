// How the tensor-core kernels are launched, forward and backward alike: Pass is TensorForward or
// TensorBackward.
#pragma once

#include "rnn_tensor.cuh"
#include "rnn_tensor.h"

namespace cnnrnn::cuda {
namespace {

constexpr int kMaxWarps = 12;  // of a block; the registers would not do for more

// Calls function with values of the cell's and the element's type, and whether a block has at most 8 warps
// and the group is one of the grid, as std::bool_constant.
template <typename Function>
auto with_kernel(RnnCell cell, DType dtype, int warps, bool grid, const Function& function) {
  return with_cell(cell, [&](auto unit) {
    const auto with_element = [&](auto element) {
      if (grid) return function(unit, element, std::true_type{}, std::true_type{});
      if (warps <= 8) return function(unit, element, std::true_type{}, std::false_type{});
      return function(unit, element, std::false_type{}, std::false_type{});
    };
    return dtype == DType::kHalf ? with_element(Half{}) : with_element(BFloat16{});
  });
}

inline UnitCut cut_of(const RnnShape& s, int blocks) { return {blocks, ceil_div(s.hidden, kGroupUnits)}; }

inline dim3 tensor_grid(const RnnShape& s, int blocks) {
  return dim3(grid_size(int64_t(ceil_div(s.batch, kTileRows)) * blocks), s.directions);
}

template <typename Pass>
bool tensor_fits(RnnCell cell, DType dtype, const RnnShape& s, int blocks, bool grid) {
  const UnitCut cut = cut_of(s, blocks);
  const int warps = 2 * cut.most();
  if (blocks > cut.total || warps > (grid ? 8 : kMaxWarps)) return false;
  return with_kernel(cell, dtype, warps, grid, [&](auto unit, auto element, auto few, auto of_grid) -> bool {
    using Launch =
        typename Pass::template Launch<decltype(unit), decltype(element), few ? 8 : kMaxWarps, of_grid>;
    const size_t bytes = Launch::shared_bytes(s, cut);
    if (bytes > shared_memory_limit()) return false;
    if (!grid) return blocks == 1 || clusters_fit(Launch::kernel(), blocks, 32 * warps, bytes);
    const dim3 all = tensor_grid(s, blocks);
    return all.x * all.y <= blocks_at_once(Launch::kernel(), 32 * warps, bytes);
  });
}

template <typename Pass>
void tensor_launch(RnnCell cell, DType dtype, const typename Pass::Params& p, int blocks, bool grid,
                   void* exchange, unsigned* counters, void* stream) {
  const UnitCut cut = cut_of(p.shape, blocks);
  const int warps = 2 * cut.most();
  with_kernel(cell, dtype, warps, grid, [&](auto unit, auto element, auto few, auto of_grid) {
    using Launch =
        typename Pass::template Launch<decltype(unit), decltype(element), few ? 8 : kMaxWarps, of_grid>;
    const size_t bytes = Launch::shared_bytes(p.shape, cut);
    const GridExchange between{static_cast<unsigned char*>(exchange), counters};
    if (of_grid)
      launch_together(Launch::kernel(), tensor_grid(p.shape, blocks), 32 * warps, bytes, stream, p, cut,
                      between);
    else
      launch_clusters(Launch::kernel(), tensor_grid(p.shape, blocks), blocks, 32 * warps, bytes, stream, p,
                      cut, between);
  });
}

}  // namespace
}  // namespace cnnrnn::cuda
