// Entry points of the forward pass on tensor cores.

#include "rnn_tensor_forward.cuh"
#include "rnn_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

struct TensorForward {
  using Params = RnnForward;

  template <typename Cell, typename E, typename Variant>
  struct Launch {
    static auto kernel() { return rnn_tensor_forward<Cell, E, Variant>; }
    static size_t shared_bytes(const RnnShape& s, const UnitCut& cut) {
      return ForwardMemory<Cell, E, Variant>(s.hidden, cut.most()).bytes;
    }
  };
};

}  // namespace

int rnn_tensor_forward_launches(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  return tensor_launches<TensorForward>(cell, dtype, s, group);
}

bool rnn_tensor_forward_at_once(RnnCell cell, DType dtype, const RnnShape& s, const TensorGroup& group) {
  return groups_of(s) <= tensor_groups_at_once<TensorForward>(cell, dtype, s, group);
}

size_t rnn_tensor_forward_exchange(DType dtype, const RnnShape& s) {
  const size_t groups = groups_of(s);
  const size_t element = dtype == DType::kFloat ? sizeof(float) : sizeof(Half);
  return 2 * groups * kTileRows * ceil_div(s.hidden, kGroupUnits) * kGroupUnits * element;
}

void rnn_tensor_forward_layer(RnnCell cell, DType dtype, const RnnForward& p, const TensorGroup& group,
                              void* stream) {
  tensor_launch<TensorForward>(cell, dtype, p, group, stream);
}

}  // namespace cnnrnn::cuda
