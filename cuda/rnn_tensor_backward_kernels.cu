// Entry points of the backward pass on tensor cores.

#include "rnn_tensor_backward.cuh"
#include "rnn_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

struct TensorBackward {
  using Params = RnnBackward;

  template <typename Cell, typename E, typename Variant>
  struct Launch {
    static auto kernel() { return rnn_tensor_backward<Cell, E, Variant>; }
    static size_t shared_bytes(const RnnShape&, const UnitCut& cut) {
      return BackwardMemory<Cell, E, Variant>(cut).bytes;
    }
  };
};

}  // namespace

bool rnn_tensor_backward_fits(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  return tensor_fits<TensorBackward>(cell, dtype, s, group);
}

bool rnn_tensor_backward_at_once(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  return tensor_at_once<TensorBackward>(cell, dtype, s, group);
}

size_t rnn_tensor_backward_exchange(const RnnShape& s, int blocks) {
  const size_t groups = size_t(ceil_div(s.batch, kTileRows)) * s.directions;
  return 2 * groups * ceil_div(s.hidden, kGroupUnits) * blocks * 32 * kWordBytes;
}

void rnn_tensor_backward_layer(RnnCell cell, DType dtype, const RnnBackward& p, const TensorGroup& group,
                               void* stream) {
  tensor_launch<TensorBackward>(cell, dtype, p, group, stream);
}

}  // namespace cnnrnn::cuda
