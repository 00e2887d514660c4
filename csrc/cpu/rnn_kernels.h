// The recurrent kernels, compiled once per instruction set.
#pragma once

#include "isa.h"
#include "rnn.h"
#include "rnn_direct.h"
#include "rnn_product.h"
#include "rnn_step.h"

namespace {

template <typename T, typename Cell>
constexpr cnnrnn::CellKernels<T> cell_kernels() {
  cnnrnn::CellKernels<T> k{};
  k.gates = Cell::kGates, k.parts = Cell::kParts, k.kept = Cell::kKept, k.joint = Cell::kJoint;
  k.has_c = Cell::kHasC, k.has_carry = Cell::kHasCarry;
  k.panel_units = kPanelUnits<T, Cell>, k.tile_rows = kForwardRows<Cell>;
  k.band_rows = kBandRows<kVectorsOf<Cell>>;
  k.packed = packed_gates<T, Cell>, k.scratch = [](int64_t, int64_t, int64_t, bool) { return int64_t{0}; };
  k.project_scratch = [](int64_t, int64_t) { return int64_t{0}; };
  k.pack_gates = pack_gates<T, Cell, T>, k.pack_bias = pack_bias<T, Cell>;
  k.project = project<T, Cell>, k.forward = forward_step<T, Cell>, k.backward = backward_step<T, Cell>;
  k.forward_direct = forward_direct<T, Cell>;
  if constexpr (sizeof(T) == sizeof(float)) {
    k.pack_gates_bf16 = pack_gates<T, Cell, Bf16>;
    k.forward_bf16 = forward_narrow<Cell, Bf16>, k.project_bf16 = project_narrow<Cell, Bf16>;
    k.forward_int8 = forward_narrow<Cell, int8_t>, k.project_int8 = project_narrow<Cell, int8_t>;
  }
  return k;
}

template <typename T>
constexpr auto pack_columns_bf16() -> decltype(cnnrnn::RnnKernels<T>::pack_columns_bf16) {
  if constexpr (sizeof(T) == sizeof(float))
    return pack_columns<T, Bf16>;
  else
    return nullptr;
}

template <typename T>
constexpr cnnrnn::RnnKernels<T> rnn_kernels() {
  return {kLanesOf<T>,
          kTileRows,
          kBandRows<4>,
          kRowBlock,
          packed_columns<T>,
          pack_columns<T, T>,
          pack_columns_bf16<T>(),
          multiply_packed<T>,
          [](int64_t) { return int64_t{0}; },
          multiply_unpacked<T>,
          kProductScratch<T>,
          sum_rows<T>,
          {cell_kernels<T, LstmUnits>(), cell_kernels<T, GruUnits>(),
           cell_kernels<T, ElmanUnits<ElmanTanh>>(), cell_kernels<T, ElmanUnits<ElmanRelu>>()}};
}

}  // namespace

namespace cnnrnn {
extern const RnnTable CNNRNN_TABLE(rnn);
const RnnTable CNNRNN_TABLE(rnn) = {rnn_kernels<float>(), rnn_kernels<double>()};
}  // namespace cnnrnn
