// Entry points of the backward pass on tensor cores.

#include "rnn_tensor_backward.cuh"
#include "rnn_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

struct TensorBackward {
  using Params = RnnBackward;

  template <typename Cell, typename E, int kWarps, bool kGrid>
  struct Launch {
    static auto kernel() { return rnn_tensor_backward<Cell, E, kWarps, kGrid>; }
    static size_t shared_bytes(const RnnShape&, const UnitCut& cut) {
      return BackwardMemory(cut, kSliceUnits<E>, Cell::kGates, kKeptBackward<kWarps, kGrid>, kGrid).bytes;
    }
  };
};

}  // namespace

bool rnn_tensor_backward_fits(RnnCell cell, DType dtype, const RnnShape& s, int blocks, bool grid) {
  return tensor_fits<TensorBackward>(cell, dtype, s, blocks, grid);
}

size_t rnn_tensor_backward_exchange(const RnnShape& s, int blocks) {
  const size_t groups = size_t(ceil_div(s.batch, kTileRows)) * s.directions;
  return 2 * groups * ceil_div(s.hidden, kGroupUnits) * blocks * 32 * kWordBytes;
}

void rnn_tensor_backward_layer(RnnCell cell, DType dtype, const RnnBackward& p, int blocks, bool grid,
                               void* stream) {
  tensor_launch<TensorBackward>(cell, dtype, p, blocks, grid, p.exchange, p.counters, stream);
}

}  // namespace cnnrnn::cuda
