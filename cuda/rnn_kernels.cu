// Entry points of the recurrent kernels: cell, element type and schedule are chosen here.

#include "rnn_cell.cuh"
#include "rnn_resident.cuh"
#include "rnn_rows.cuh"
#include "rnn_step.cuh"

namespace cnnrnn::cuda {
namespace {

template <typename T>
constexpr int kWideRows = sizeof(T) == 8 ? 2 : 4;  // of a thread; more would spill

template <typename T>
constexpr bool kIsHalf = sizeof(T) == 2;

template <typename Function>
void with_cell_and_type(RnnCell cell, DType dtype, const Function& function) {
  with_cell(cell, [&](auto unit) { with_type(dtype, [&](auto zero) { function(unit, zero); }); });
}

template <typename Cell, typename T, bool kForward, typename Params>
bool try_resident_in_turn(const Params& p, void* stream) {
  if constexpr (kIsHalf<T>)
    return false;
  else
    return try_resident<Cell, T, 1, kForward>(p, stream) ||
           try_resident<Cell, T, kClusterBlocks, kForward>(p, stream);
}

}  // namespace

RnnSizes rnn_sizes(RnnCell cell) {
  return with_cell(cell, [](auto unit) -> RnnSizes {
    return {unit.kGates, unit.kJoint, unit.kParts, unit.kKept, unit.kHasC, unit.kBlends};
  });
}

void rnn_layer_forward(RnnCell cell, DType dtype, const RnnForward& p, void* stream) {
  with_cell_and_type(cell, dtype, [&](auto unit, auto zero) {
    using Cell = decltype(unit);
    using T = decltype(zero);
    if (try_resident_in_turn<Cell, T, true>(p, stream)) return;
    (p.shape.batch <= 4 ? step_forward<Cell, T, 1> : step_forward<Cell, T, kWideRows<T>>)(p, stream);
  });
}

void rnn_layer_backward(RnnCell cell, DType dtype, const RnnBackward& p, void* stream) {
  with_cell_and_type(cell, dtype, [&](auto unit, auto zero) {
    using Cell = decltype(unit);
    using T = decltype(zero);
    if (try_resident_in_turn<Cell, T, false>(p, stream)) return;
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
