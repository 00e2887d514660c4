// How the tensor-core kernels are launched, forward and backward alike: Pass is TensorForward or
// TensorBackward.
#pragma once

#include "rnn_tensor.cuh"
#include "rnn_tensor.h"

namespace cnnrnn::cuda {
namespace {

using FewWarps = TensorVariant<8, 1, false>;
using ManyWarps = TensorVariant<12, 1, false>;  // the registers would not do for more
using OneBlock = TensorVariant<8, 4, false>;
using OfGrid = TensorVariant<8, 1, true>;

inline UnitCut cut_of(const RnnShape& s, int blocks) { return {blocks, ceil_div(s.hidden, kGroupUnits)}; }

// Calls function with values of the cell's, the element's and the variant's type.
template <typename Function>
auto with_kernel(RnnCell cell, DType dtype, const UnitCut& cut, const TensorGroup& group,
                 const Function& function) {
  return with_cell(cell, [&](auto unit) {
    const auto with_element = [&](auto element) {
      if (group.grid) return function(unit, element, OfGrid{});
      if (2 * cut.most() <= FewWarps::kWarps) return function(unit, element, FewWarps{});
      if (cut.blocks == 1) return function(unit, element, OneBlock{});
      return function(unit, element, ManyWarps{});
    };
    if (dtype == DType::kHalf) return with_element(Half{});
    if (dtype == DType::kBFloat16) return with_element(BFloat16{});
    if (group.products == RnnProducts::kTf32) return with_element(Tf32{});
    return with_element(WholeFloat{});
  });
}

inline dim3 tensor_grid(const RnnShape& s, int blocks) {
  return dim3(grid_size(int64_t(ceil_div(s.batch, kTileRows)) * blocks), s.directions);
}

// A kernel, its threads and the shared memory of a block.
template <typename Kernel>
struct TensorLaunch {
  Kernel kernel;
  unsigned threads;
  size_t bytes;
};
template <typename Pass, typename Cell, typename E, typename Variant>
auto tensor_kernel(const RnnShape& s, const UnitCut& cut, Cell, E, Variant) {
  using Launch = typename Pass::template Launch<Cell, E, Variant>;
  const auto kernel = Launch::kernel();
  return TensorLaunch<decltype(kernel)>{kernel, 32u * Variant::warps(cut.most()),
                                        Launch::shared_bytes(s, cut)};
}

template <typename Pass>
bool tensor_at_once(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  const UnitCut cut = cut_of(s, group.blocks);
  return with_kernel(cell, dtype, cut, group, [&](auto... types) -> bool {
    const auto launch = tensor_kernel<Pass>(s, cut, types...);
    const dim3 all = tensor_grid(s, group.blocks);
    return all.x * all.y <= blocks_at_once(launch.kernel, launch.threads, launch.bytes);
  });
}

template <typename Pass>
bool tensor_fits(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  const UnitCut cut = cut_of(s, group.blocks);
  if (group.blocks > cut.total) return false;
  const bool fits = with_kernel(cell, dtype, cut, group, [&](auto... types) -> bool {
    const auto variant = std::get<2>(std::tuple(types...));
    if (cut.most() > variant.kWarps / 2 * variant.kEights) return false;
    const auto launch = tensor_kernel<Pass>(s, cut, types...);
    if (launch.bytes > shared_memory_limit()) return false;
    return group.grid || group.blocks == 1 ||
           clusters_fit(launch.kernel, group.blocks, launch.threads, launch.bytes);
  });
  return fits && (!group.grid || tensor_at_once<Pass>(cell, dtype, s, group));
}

template <typename Pass>
void tensor_launch(RnnCell cell, DType dtype, const typename Pass::Params& p, const TensorGroup& group,
                   void* stream) {
  const UnitCut cut = cut_of(p.shape, group.blocks);
  const GridExchange between{static_cast<unsigned char*>(p.exchange), p.counters};
  const dim3 grid = tensor_grid(p.shape, group.blocks);
  with_kernel(cell, dtype, cut, group, [&](auto... types) {
    const auto launch = tensor_kernel<Pass>(p.shape, cut, types...);
    if (group.grid)
      launch_together(launch.kernel, grid, launch.threads, launch.bytes, stream, p, cut, between);
    else
      launch_clusters(launch.kernel, grid, group.blocks, launch.threads, launch.bytes, stream, p, cut,
                      between);
  });
}

}  // namespace
}  // namespace cnnrnn::cuda
