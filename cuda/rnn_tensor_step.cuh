// A recurrent layer of any size on tensor cores, one launch a time step: for weights that no schedule can
// keep on chip. They stream through shared memory at every step, past the state of up to 64 batch rows.
//
// The warps of a block share the reduction: each takes every eighth slice of 64 bytes for all the block's
// rows and columns. So nothing is loaded twice, and since weights are packed in the order of fragments and
// the states have rows of whole slices, a lane itself copies the words that it multiplies: the ring of a warp
// needs no barrier. The warps' sums meet in shared memory, are added in the order of the warps, and the gates
// follow in the same kernel. It leaves the operand of the next one in p.exchange, of which there are two in
// turn: [2][direction][batch row][slices of 64 bytes]. Forward that is the state, backward the gradients of
// the state's gates, gate after gate. Columns beyond the layer are zeros from the beginning.
#pragma once

#include "primitives_tiles.cuh"
#include "rnn_step_unit.cuh"
#include "rnn_tensor.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kStreamWarps = 8, kStreamThreads = 32 * kStreamWarps;

// A block makes so many tiles of 16 rows, and eights of units.
template <int kRowTiles_, int kEights_>
struct StreamTile {
  static constexpr int kRowTiles = kRowTiles_, kEights = kEights_;
  static constexpr int kRows = kRowTiles * kTileRows;
  static constexpr int kStages = kRowTiles == 1 ? 3 : 2;  // of a warp's ring
};

// Slices of a sum over the units, or over all their gates.
template <typename E>
__host__ __device__ __forceinline__ int unit_slices(int hidden) {
  return ceil_div(hidden, kSliceUnits<E>);
}

// The product of one block: kColumns columns of 8.
template <typename E, typename Tile, int kColumns>
struct StreamProduct {
  static constexpr int kRowTiles = Tile::kRowTiles;
  static constexpr int kWordsOfRows = kRowTiles * 2 * 32;  // of a slice
  static constexpr int kStageWords = kWordsOfRows + kColumns * 32;
  static constexpr int kPartWords = kRowTiles * kColumns * 32;  // of a warp's sums, which follow in its ring
  static constexpr int kWarpWords = std::max(Tile::kStages * kStageWords, kPartWords);
  static constexpr size_t kBytes = size_t(kStreamWarps) * kWarpWords * kWordBytes;

  // rows: `there` rows of `slices` slices; packed: `columns` times [slice][lane].
  static __device__ __forceinline__ void multiply(const unsigned char* rows, int there, const Words4* packed,
                                                  int columns, int slices) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
    Words4* ring = shared_memory<Words4>() + warp * kWarpWords;
    const auto load = [&](int slice, int stage) {
      if (slice < slices) {
        Words4* to = ring + stage * kStageWords + lane;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const int row = 8 * i + g;
          const int64_t at = (int64_t(row) * slices + slice) * kSliceBytes + q * kWordBytes;
          async_copy(to + i * 32, rows + (row < there ? at : 0), row < there);
        }
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
          async_copy(to + kWordsOfRows + i * 32,
                     packed + (i < columns ? (int64_t(i) * slices + slice) * 32 + lane : 0), i < columns);
      }
      async_commit();
    };
#pragma unroll
    for (int stage = 0; stage + 1 < Tile::kStages; ++stage) load(warp + stage * kStreamWarps, stage);

    float acc[kRowTiles][kColumns][4] = {};
    int stage = 0;
    for (int slice = warp; slice < slices; slice += kStreamWarps) {
      const int last = stage == 0 ? Tile::kStages - 1 : stage - 1;
      load(slice + (Tile::kStages - 1) * kStreamWarps, last);
      async_wait<Tile::kStages - 1>();
      const Words4* of_stage = ring + stage * kStageWords;
      Words4 weights[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) weights[i] = of_stage[kWordsOfRows + i * 32 + lane];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        multiply_slice_of<E>(acc[r], reinterpret_cast<const unsigned char*>(of_stage + r * 64), kSliceBytes,
                             0, g, q, kColumns, [&](int i) { return weights[i]; });
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        ring[(r * kColumns + i) * 32 + lane] =
            bits_as<Words4>(Pack<float, 4>{{acc[r][i][0], acc[r][i][1], acc[r][i][2], acc[r][i][3]}});
    block_barrier();  // the warps' sums are complete
  }

  // After multiply(): the sums of a lane's row (g, or g + 8 with half = 1, of row tile r) in its two columns.
  static __device__ __forceinline__ Pack<float, 2> sums(int r, int column, int lane, int half) {
    const auto* part = pack_at<const Pack<float, 2>>(shared_memory<Words4>());
    Pack<float, 2> sum = {};
#pragma unroll
    for (int warp = 0; warp < kStreamWarps; ++warp) {
      const auto next = part[(warp * kWarpWords + (r * kColumns + column) * 32 + lane) * 2 + half];
      sum.v[0] += next.v[0], sum.v[1] += next.v[1];
    }
    return sum;
  }
};

// Where a block stands, and what its threads do after the product: each takes two neighbouring units of one
// row at a time.
template <typename Tile>
struct StreamPlace {
  int first_eight = blockIdx.x * Tile::kEights, first_row = blockIdx.y * Tile::kRows, direction = blockIdx.z;

  // function(row tile, eight, lane, half, row of the layer, first unit)
  template <typename Function>
  __device__ __forceinline__ void for_units(const RnnShape& s, const Function& function) const {
    for (int i = threadIdx.x; i < Tile::kRowTiles * Tile::kEights * 64; i += kStreamThreads) {
      const int lane = i % 32, half = i / 32 % 2, eight = i / 64 % Tile::kEights, r = i / 64 / Tile::kEights;
      const int row = first_row + r * kTileRows + half * 8 + lane / 4;
      const int unit = (first_eight + eight) * kGroupUnits + lane % 4 * 2;
      if (row < s.batch && unit < s.hidden) function(r, eight, lane, half, row, unit);
    }
  }
};

// Row `row` of the operand of an even or an odd step.
__device__ __forceinline__ unsigned char* stream_operand(void* exchange, const RnnShape& s, int step,
                                                         int direction, int row, int slices) {
  const int64_t at = (int64_t(step & 1) * s.directions + direction) * s.batch + row;
  return static_cast<unsigned char*>(exchange) + at * slices * kSliceBytes;
}

// With step = -1 only what the first step starts from is made.
template <typename Cell, typename E, typename Tile>
__global__ void __launch_bounds__(kStreamThreads, 1) rnn_stream_forward(RnnForward p, int step) {
  using T = StoredAs<E>;
  constexpr int kGates = Cell::kGates;
  using Product = StreamProduct<E, Tile, Tile::kEights * kGates>;
  const RnnShape s = p.shape;
  const StreamPlace<Tile> place;
  const int direction = place.direction, slices = unit_slices<E>(s.hidden);
  const int eights = ceil_div(s.hidden, kGroupUnits);
  if (step >= 0)
    Product::multiply(stream_operand(p.exchange, s, step, direction, place.first_row, slices),
                      s.batch - place.first_row,
                      static_cast<const Words4*>(p.packed) +
                          (int64_t(direction) * eights + place.first_eight) * kGates * slices * 32,
                      (eights - place.first_eight) * kGates, slices);

  place.for_units(s, [&](int r, int eight, int lane, int half, int row, int unit) {
    float h[2] = {};
    if (step >= 0) {
      Values<float, kGates> from_state[2];
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const Pack<float, 2> sum = Product::sums(r, eight * kGates + gate, lane, half);
        from_state[0].v[gate] = sum.v[0], from_state[1].v[gate] = sum.v[1];
      }
#pragma unroll
      for (int u = 0; u < 2; ++u)
        if (unit + u < s.hidden)
          h[u] = step_unit_forward<Cell, T>(p, step, direction, row, unit + u, from_state[u]);
    }
    if (step + 1 == s.steps) return;
    const Moment next(s, direction, step + 1, row);
    Pack<T, 2> operand = {};
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (next.runs && !next.cut && unit + u < s.hidden)
        operand.v[u] = round_to<E>(
            next.first ? load_or_zero<float, T>(p.h_0, state_at(s, direction, row, unit + u)) : h[u]);
    *pack_at<Pack<T, 2>>(stream_operand(p.exchange, s, step + 1, direction, row, slices) +
                         unit * int(sizeof(T))) = operand;
  });
}

// The gradients of step's parts, from those of step + 1. With step = -1 the gradient of h_0 and c_0.
template <typename Cell, typename E, typename Tile>
__global__ void __launch_bounds__(kStreamThreads, 1) rnn_stream_backward(RnnBackward p, int step) {
  using T = StoredAs<E>;
  constexpr int kGates = Cell::kGates;
  using Product = StreamProduct<E, Tile, Tile::kEights>;
  const RnnShape s = p.shape;
  const StreamPlace<Tile> place;
  const int direction = place.direction, of_gate = unit_slices<E>(s.hidden), slices = kGates * of_gate;
  const int eights = ceil_div(s.hidden, kGroupUnits);
  const bool last = step == s.steps - 1;  // no step comes after it
  if (!last)
    Product::multiply(stream_operand(p.exchange, s, step + 1, direction, place.first_row, slices),
                      s.batch - place.first_row,
                      static_cast<const Words4*>(p.packed) +
                          (int64_t(direction) * eights + place.first_eight) * slices * 32,
                      eights - place.first_eight, slices);

  place.for_units(s, [&](int r, int eight, int lane, int half, int row, int unit) {
    const Pack<float, 2> from_next = last ? Pack<float, 2>{} : Product::sums(r, eight, lane, half);
    Values<float, kGates> gates[2] = {};
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (unit + u < s.hidden)
        gates[u] = step_unit_backward<Cell, T>(p, step, direction, row, unit + u, from_next.v[u]);
    if (step < 0) return;
    unsigned char* to = stream_operand(p.exchange, s, step, direction, row, slices) + unit * int(sizeof(T));
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate)
      *pack_at<Pack<T, 2>>(to + gate * of_gate * kSliceBytes) = {
          {round_to<E>(gates[0].v[gate]), round_to<E>(gates[1].v[gate])}};
  });
}

// packed [direction][eight][gate][slice][lane] of 16 bytes: fragments of
//   forward   columns gate * H + 8 * eight + g of the transposed weights, a sum over the old state's units
//   backward  columns 8 * eight + g of the weights, a sum over the gates' units
template <typename E, bool kForward>
__global__ void __launch_bounds__(kPackThreads)
    rnn_pack_fragments(WeightPointers weights, int hidden, int gates, Words4* packed) {
  using T = StoredAs<E>;
  const int slices = unit_slices<E>(hidden);
  const int64_t count = int64_t(ceil_div(hidden, kGroupUnits)) * gates * slices * 32;
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  if (index >= count) return;
  const int lane = index % 32, slice = index / 32 % slices, gate = index / 32 / slices % gates;
  const int column = index / 32 / slices / gates * kGroupUnits + lane / 4;
  const int k = slice * kSliceUnits<E> + lane % 4 * kWordUnits<E>;
  const int64_t row = int64_t(gate) * hidden + (kForward ? column : k);
  const T* from =
      static_cast<const T*>(weights.direction[blockIdx.y]) + row * hidden + (kForward ? k : column);
  packed[blockIdx.y * count + index] =
      gather_word<E>(from, kForward ? 1 : hidden, column < hidden ? hidden - k : 0);
}

}  // namespace
}  // namespace cnnrnn::cuda
