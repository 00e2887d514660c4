// The recurrent kernels, compiled once per instruction set.
#pragma once

#include "isa.h"
#include "rnn.h"
#include "rnn_lstm.h"
#include "rnn_product.h"

namespace {

template <typename T>
constexpr cnnrnn::LstmKernels<T> lstm_kernels() {
  return {kLanesOf<T>,
          kTileRows,
          kRowBlock,
          pack_columns<T>,
          pack_gates<T>,
          pack_bias<T>,
          lstm_project<T>,
          lstm_forward_step<T>,
          lstm_forward_direct<T>,
          lstm_backward_step<T>,
          multiply_packed<T>,
          multiply_unpacked<T>,
          kProductScratch<T>,
          sum_rows<T>};
}

}  // namespace

namespace cnnrnn {
extern const RnnKernels CNNRNN_TABLE(rnn);
const RnnKernels CNNRNN_TABLE(rnn) = {lstm_kernels<float>(), lstm_kernels<double>()};
}  // namespace cnnrnn
