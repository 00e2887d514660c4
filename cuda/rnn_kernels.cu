// Entry points of the recurrent kernels: cell, element type and schedule are chosen here.

#include "rnn_cell.cuh"
#include "rnn_resident.cuh"
#include "rnn_rows.cuh"
#include "rnn_step.cuh"
#include "rnn_tensor.h"

namespace cnnrnn::cuda {
namespace {

template <typename T>
constexpr int kWideRows = sizeof(T) == 8 ? 2 : 4;  // of a thread; more would spill

template <typename Function>
void with_cell_and_type(RnnCell cell, DType dtype, const Function& function) {
  with_cell(cell, [&](auto unit) { with_type(dtype, [&](auto zero) { function(unit, zero); }); });
}

// Calls function with values of the cell's and the element's type where the resident kernels take it.
template <typename Function>
auto with_resident(RnnCell cell, DType dtype, const Function& function) {
  return with_cell(cell, [&](auto unit) {
    return dtype == DType::kFloat ? function(unit, float{}) : function(unit, double{});
  });
}

template <bool kForward>
bool resident_fits(RnnCell cell, DType dtype, int hidden, bool cluster) {
  return with_resident(cell, dtype, [&](auto unit, auto zero) {
    using Cell = decltype(unit);
    using T = decltype(zero);
    return cluster ? Resident<Cell, T, kClusterBlocks, kForward>::fits(hidden)
                   : Resident<Cell, T, 1, kForward>::fits(hidden);
  });
}

template <bool kForward>
bool resident_at_once(RnnCell cell, DType dtype, const RnnShape& s) {
  return with_resident(cell, dtype, [&](auto unit, auto zero) {
    return Resident<decltype(unit), decltype(zero), kClusterBlocks, kForward>::at_once(s);
  });
}

template <bool kForward, typename Params>
void run_resident(RnnCell cell, DType dtype, const RnnPlan& plan, const Params& p, void* stream) {
  with_resident(cell, dtype, [&](auto unit, auto zero) {
    using Cell = decltype(unit);
    using T = decltype(zero);
    plan.blocks > 1 ? Resident<Cell, T, kClusterBlocks, kForward>::run(p, stream)
                    : Resident<Cell, T, 1, kForward>::run(p, stream);
  });
}

// Without tensor cores: the weights are packed as they are.
RnnPlan fma_plan(RnnCell cell, DType dtype, const RnnShape& s, RnnSchedule schedule, int blocks) {
  size_t element = 0;
  with_type(dtype, [&](auto zero) { element = sizeof zero; });
  const size_t packed = element * s.directions * s.hidden * s.hidden * rnn_sizes(cell).gates;
  return {schedule, blocks, RnnProducts::kFma, packed, 0, 0, false};
}

RnnPlan step_plan(RnnCell cell, DType dtype, const RnnShape& s, RnnProducts products, bool forward) {
  const StreamNeeds needs = rnn_tensor_step_needs(cell, dtype, s, products, forward);
  if (needs.shared > shared_memory_limit()) return fma_plan(cell, dtype, s, RnnSchedule::kStep, 1);
  return {RnnSchedule::kStep, 1, products, needs.packed, needs.exchange, 0, true};
}

// On tensor cores; a launch a step may do without them.
RnnPlan tensor_plan(RnnCell cell, DType dtype, const RnnShape& s, RnnProducts products, bool forward) {
  const auto launches = [&](int blocks, bool grid) {
    const auto ask = forward ? rnn_tensor_forward_launches : rnn_tensor_backward_launches;
    return ask(cell, dtype, s, {products, blocks, grid});
  };
  const auto at_once = [&](int blocks) {
    const auto ask = forward ? rnn_tensor_forward_at_once : rnn_tensor_backward_at_once;
    return ask(cell, dtype, s, {products, blocks, false});
  };
  const int eights = ceil_div(s.hidden, 8);
  const RnnPlan block = {RnnSchedule::kBlock, 1, products, 0, 0, 0, false};
  const bool block_fits = eights <= 16 && launches(1, false) > 0;
  if (block_fits && eights <= 4) return block;
  // As few blocks as leave each with the units of 8 warps; only if need be with those of more.
  for (const int each : {4, 6})
    for (int blocks = 2; blocks <= 16; blocks *= 2)
      if (ceil_div(eights, blocks) <= each && launches(blocks, false) > 0) {
        // A cluster takes less time for a step, a block on its own fewer multiprocessors.
        if (block_fits && !at_once(blocks)) return block;
        return {RnnSchedule::kCluster, blocks, products, 0, 0, 0, false};
      }
  if (block_fits) return block;
  // A launch a step takes as long as some launches of the grid, by the arithmetic in README.md.
  const int most_launches = products == RnnProducts::kHalves ? 3 : 2;
  for (int each = 4; each >= 1; --each) {
    const int blocks = ceil_div(eights, each), count = launches(blocks, true);
    if (count == 0 || count > most_launches) continue;
    const size_t bytes =
        forward ? rnn_tensor_forward_exchange(dtype, s) : rnn_tensor_backward_exchange(s, blocks);
    return {RnnSchedule::kGrid, blocks, products, 0, bytes, ceil_div(s.batch, 16) * s.directions, false};
  }
  return step_plan(cell, dtype, s, products, forward);
}

TensorGroup group_of(const RnnPlan& plan) {
  return {plan.products, plan.blocks, plan.schedule == RnnSchedule::kGrid};
}

}  // namespace

RnnSizes rnn_sizes(RnnCell cell) {
  return with_cell(cell, [](auto unit) -> RnnSizes {
    return {unit.kGates, unit.kJoint, unit.kParts, unit.kKept, unit.kHasC, unit.kBlends};
  });
}

RnnPlan rnn_plan(RnnCell cell, DType dtype, const RnnShape& s, bool tf32, bool forward) {
  const auto on_tensor_cores = [&](RnnProducts products) {
    return tensor_plan(cell, dtype, s, products, forward);
  };
  if (dtype == DType::kHalf || dtype == DType::kBFloat16) return on_tensor_cores(RnnProducts::kHalves);
  if (dtype == DType::kFloat && tf32) {
    const RnnPlan plan = on_tensor_cores(RnnProducts::kTf32);
    if (plan.tensor_cores()) return plan;
  }
  const auto fits = forward ? resident_fits<true> : resident_fits<false>;
  if (fits(cell, dtype, s.hidden, false)) return fma_plan(cell, dtype, s, RnnSchedule::kBlock, 1);
  const RnnPlan cluster = fma_plan(cell, dtype, s, RnnSchedule::kCluster, kClusterBlocks);
  const bool cluster_fits = fits(cell, dtype, s.hidden, true);
  // Its tiles have 4 rows. Once they are more than the device holds, those of 16 rows are ahead.
  if (cluster_fits && (forward ? resident_at_once<true> : resident_at_once<false>)(cell, dtype, s))
    return cluster;
  if (dtype == DType::kFloat) {
    const RnnPlan plan = on_tensor_cores(RnnProducts::kThreeTf32);
    if (plan.tensor_cores() && !(cluster_fits && plan.schedule == RnnSchedule::kStep)) return plan;
  }
  return cluster_fits ? cluster : fma_plan(cell, dtype, s, RnnSchedule::kStep, 1);
}

void rnn_layer_forward(RnnCell cell, DType dtype, const RnnPlan& plan, const RnnForward& p, void* stream) {
  if (plan.tensor_cores())
    return plan.schedule == RnnSchedule::kStep
               ? rnn_tensor_step_forward(cell, dtype, plan.products, p, stream)
               : rnn_tensor_forward_layer(cell, dtype, p, group_of(plan), stream);
  if (plan.schedule != RnnSchedule::kStep) return run_resident<true>(cell, dtype, plan, p, stream);
  with_cell_and_type(cell, dtype, [&](auto unit, auto zero) {
    using Cell = decltype(unit);
    using T = decltype(zero);
    (p.shape.batch <= 4 ? step_forward<Cell, T, 1> : step_forward<Cell, T, kWideRows<T>>)(p, stream);
  });
}

void rnn_layer_backward(RnnCell cell, DType dtype, const RnnPlan& plan, const RnnBackward& p, void* stream) {
  if (plan.tensor_cores())
    return plan.schedule == RnnSchedule::kStep
               ? rnn_tensor_step_backward(cell, dtype, plan.products, p, stream)
               : rnn_tensor_backward_layer(cell, dtype, p, group_of(plan), stream);
  if (plan.schedule != RnnSchedule::kStep) return run_resident<false>(cell, dtype, plan, p, stream);
  with_cell_and_type(cell, dtype, [&](auto unit, auto zero) {
    using Cell = decltype(unit);
    using T = decltype(zero);
    (p.shape.batch <= 4 ? step_backward<Cell, T, 1> : step_backward<Cell, T, kWideRows<T>>)(p, stream);
  });
}

void rnn_cell_step_forward(RnnCell cell, DType dtype, const RnnCellForward& p, void* stream) {
  with_cell_and_type(cell, dtype, [&](auto unit, auto zero) {
    launch(rnn_cell_forward<decltype(unit), decltype(zero)>, cell_grid(p.batch, p.hidden), kCellThreads, 0,
           stream, p);
  });
}

void rnn_cell_step_backward(RnnCell cell, DType dtype, const RnnCellBackward& p, void* stream) {
  with_cell_and_type(cell, dtype, [&](auto unit, auto zero) {
    launch(rnn_cell_backward<decltype(unit), decltype(zero)>, cell_grid(p.batch, p.hidden), kCellThreads, 0,
           stream, p);
  });
}

void rnn_states_before(DType dtype, const RnnShape& s, int direction, const void* h_0, const void* output,
                       void* before, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(rnn_states_before_kernel<T>, dim3(grid_size(int64_t(s.steps) * s.batch)), kRowThreads, 0, stream,
           s, direction, h_0, output, static_cast<T*>(before));
  });
}

void rnn_running_rows(DType dtype, const RnnShape& s, const void* x, int width, void* to, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(rnn_running_rows_kernel<T>, dim3(grid_size(int64_t(s.steps) * s.batch)), kRowThreads, 0, stream, s,
           static_cast<const T*>(x), width, static_cast<T*>(to));
  });
}

void rnn_packed_rows(const int64_t* batch_sizes, int steps, int batch, int64_t* offsets, int64_t* lengths,
                     void* stream) {
  BatchSizes sizes{};
  sizes.batch = batch;
  for (; sizes.first < steps; sizes.first += sizes.count) {
    sizes.count = std::min(kSizesAtOnce, steps - sizes.first);
    std::copy_n(batch_sizes + sizes.first, sizes.count, sizes.size);
    launch(rnn_packed_rows_kernel, dim3(1), kRowThreads, 0, stream, sizes, offsets, lengths);
    for (int i = 0; i < sizes.count; ++i) sizes.first_row += sizes.size[i];
  }
}

}  // namespace cnnrnn::cuda
