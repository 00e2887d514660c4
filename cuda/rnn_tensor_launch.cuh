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

inline int groups_of(const RnnShape& s) { return ceil_div(s.batch, kTileRows) * s.directions; }

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

// How many groups of the layer the current device runs at once.
template <typename Pass>
int tensor_groups_at_once(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  const UnitCut cut = cut_of(s, group.blocks);
  return with_kernel(cell, dtype, cut, group, [&](auto... types) -> int {
    const auto launch = tensor_kernel<Pass>(s, cut, types...);
    return static_cast<int>(blocks_at_once(launch.kernel, launch.threads, launch.bytes)) / group.blocks;
  });
}

// How many launches the layer takes one after the other; 0: the current device cannot run such groups.
template <typename Pass>
int tensor_launches(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  const UnitCut cut = cut_of(s, group.blocks);
  if (group.blocks > cut.total) return 0;
  const bool fits = with_kernel(cell, dtype, cut, group, [&](auto... types) -> bool {
    const auto variant = std::get<2>(std::tuple(types...));
    if (cut.most() > variant.kWarps / 2 * variant.kEights) return false;
    const auto launch = tensor_kernel<Pass>(s, cut, types...);
    if (launch.bytes > shared_memory_limit()) return false;
    return group.grid || group.blocks == 1 ||
           clusters_fit(launch.kernel, group.blocks, launch.threads, launch.bytes);
  });
  if (!fits) return 0;
  if (!group.grid) return 1;
  const int at_once = tensor_groups_at_once<Pass>(cell, dtype, s, group);
  return at_once == 0 ? 0 : ceil_div(groups_of(s), at_once);
}

template <typename Pass>
void tensor_launch(RnnCell cell, DType dtype, const typename Pass::Params& p, const TensorGroup& group,
                   void* stream) {
  const UnitCut cut = cut_of(p.shape, group.blocks);
  const int groups = groups_of(p.shape);
  const GridExchange between{static_cast<unsigned char*>(p.exchange), p.counters, groups};
  const auto grid = [&](int count) { return dim3(grid_size(int64_t(count) * group.blocks)); };
  with_kernel(cell, dtype, cut, group, [&](auto... types) {
    const auto launch = tensor_kernel<Pass>(p.shape, cut, types...);
    if (!group.grid)
      return launch_clusters(launch.kernel, grid(groups), group.blocks, launch.threads, launch.bytes, stream,
                             p, cut, between, 0);
    const int at_once = tensor_groups_at_once<Pass>(cell, dtype, p.shape, group);
    for (int first = 0; first < groups; first += at_once)
      launch_together(launch.kernel, grid(std::min(at_once, groups - first)), launch.threads, launch.bytes,
                      stream, p, cut, between, first);
  });
}

}  // namespace
}  // namespace cnnrnn::cuda
