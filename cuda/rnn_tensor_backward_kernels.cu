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

int rnn_tensor_backward_launches(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  return tensor_launches<TensorBackward>(cell, dtype, s, group);
}

bool rnn_tensor_backward_at_once(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  return groups_of(s) <= tensor_groups_at_once<TensorBackward>(cell, dtype, s, group);
}

size_t rnn_tensor_backward_exchange(const RnnShape& s, int blocks) {
  const size_t groups = groups_of(s);
  return 2 * groups * ceil_div(s.hidden, kGroupUnits) * blocks * 32 * kWordBytes;
}

void rnn_tensor_backward_layer(RnnCell cell, DType dtype, const RnnBackward& p, const TensorGroup& group,
                               void* stream) {
  tensor_launch<TensorBackward>(cell, dtype, p, group, stream);
}

}  // namespace cnnrnn::cuda
