// The forward pass on tensor cores; see rnn_tensor.cuh.
#pragma once

#include "rnn_tensor.cuh"

namespace cnnrnn::cuda {
namespace {

// Slices of the weights of an eight that a warp keeps in registers, of which splitting floats takes some.
template <typename Cell, typename E, typename Variant>
constexpr int kKeptForward = std::min(8, (Variant::kEights > 1  ? 4
                                          : Variant::kWarps > 8 ? (kIsWhole<E> ? 8 : 12)
                                                                : (kIsWhole<E> ? 24 : 32)) /
                                             Cell::kGates);

// Where things stand in a block's shared memory, bytes.
template <typename Cell, typename E, typename Variant>
struct ForwardMemory {
  static constexpr int kKept = kKeptForward<Cell, E, Variant>, kBuffers = Variant::kGrid ? 1 : 2;
  static constexpr int kTurns = Variant::kEights > 1 ? 2 : 1;
  int slices;  // of the state, an even number
  int stride, h, sums, weights, bytes;
  // most: eights of a block
  __host__ __device__ ForwardMemory(int hidden, int most) {
    slices = ceil_div(ceil_div(hidden, kSliceUnits<E>), 2) * 2;
    stride = row_bytes(slices);
    h = 2 * sizeof(Arrivals);                  // [kBuffers][16 rows]
    sums = h + kBuffers * kTileRows * stride;  // [pair][in turn][half][gate][lane] of 2 floats
    weights = sums + Variant::warps(most) * kTurns * Cell::kGates * 32 * 2 * int(sizeof(float));
    // [eight][half][slice][gate][lane] of 16 bytes
    bytes = weights + most * 2 * rest() * Cell::kGates * 32 * kWordBytes;
  }
  __host__ __device__ int per_warp() const { return slices / 2; }
  __host__ __device__ int rest() const { return per_warp() > kKept ? per_warp() - kKept : 0; }
};

// A lane's two units of h, and those of its three neighbours: 8 units of one row.
template <typename E>
struct RowPiece {
  static constexpr int kWords = sizeof(StoredAs<E>) / 2;  // of a lane
  Words4 part[kWords];

  __device__ RowPiece(float first, float second, int lane) {
    const Pack<StoredAs<E>, 2> own = {{round_to<E>(first), round_to<E>(second)}};
    const auto words = bits_as<Pack<uint32_t, kWords>>(own);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const int at = i * kWords + j;
        part[at / 4].v[at % 4] = shuffle(words.v[j], (lane & ~3) + i);
      }
  }
};

template <typename Cell, typename E, typename Variant>
__global__ void __launch_bounds__(Variant::kWarps * 32, 1)
    rnn_tensor_forward(RnnForward p, UnitCut cut, GridExchange exchange, int first_group) {
  using T = StoredAs<E>;
  using Two = Pack<float, 2>;
  using Parts = Values<float, Cell::kParts>;
  using Memory = ForwardMemory<Cell, E, Variant>;
  constexpr int kGates = Cell::kGates, kEights = Variant::kEights;
  constexpr bool kGrid = Variant::kGrid;
  const RnnShape s = p.shape;
  const TensorPlace place(s, cut, first_group);
  const TileSteps steps(s, place.tile, place.direction);
  const Memory memory(s.hidden, cut.most());
  const int direction = place.direction, row = place.row, stride = memory.stride;

  auto* shared = shared_memory<unsigned char>();
  auto* barriers = pack_at<Arrivals>(shared);
  unsigned char* h = shared + memory.h;
  const int first_slice = place.half * memory.per_warp();

  WarpWeights<E, kGates, Memory::kKept> weights[kEights];
  const T* weight = static_cast<const T*>(p.weight_hh[direction]);
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int column = place.first(e) + place.g;  // of the weights' products: a unit
    const int own = (2 * place.eight(e) + place.half) * memory.rest() * kGates * 32;
    weights[e].load(pack_at<Words4>(shared + memory.weights) + own, place.has(e) ? memory.per_warp() : 0,
                    kGates, [&](int slice, int gate) {
                      const int k = (first_slice + slice) * kSliceUnits<E> + place.q * kWordUnits<E>;
                      return gather_word<E>(weight + (int64_t(gate) * s.hidden + column) * s.hidden + k, 1,
                                            column < s.hidden ? s.hidden - k : 0);
                    });
  }

  // h_0, and zeros in the columns beyond the layer, of which nobody hands over.
  const int pairs = memory.slices * kSliceUnits<E> / 2;
  for (int i = threadIdx.x; i < (kGrid ? 1 : 2) * kTileRows * pairs; i += blockDim.x) {
    const int r = i / pairs % kTileRows, k = i % pairs * 2, n = place.tile * kTileRows + r;
    const bool there = i < kTileRows * pairs && n < s.batch && !Moment(s, direction, steps.begin, n).cut;
    Pack<T, 2> two;
#pragma unroll
    for (int u = 0; u < 2; ++u)
      two.v[u] = round_to<E>(
          there && k + u < s.hidden ? load_or_zero<float, T>(p.h_0, state_at(s, direction, n, k + u)) : 0.0f);
    *pack_at<Pack<T, 2>>(h + i / pairs * stride + k * int(sizeof(T))) = two;
  }
  const unsigned bytes = cut.total * kTileRows * kGroupUnits * sizeof(T);  // of a hand-over
  if (!kGrid && cut.blocks > 1 && threadIdx.x == 0)
    for (int b = 0; b < 2; ++b) {
      arrivals_init(&barriers[b], 1);
      arrivals_expect(&barriers[b], bytes);
    }

  State<float> state[kEights][2] = {};
  Parts bias[kEights][2] = {};
#pragma unroll
  for (int e = 0; e < kEights; ++e)
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (place.owns(s, e, u)) {
        const int unit = place.unit(e) + u;
        state[e][u] = load_state<Cell, float, T>(s, p.h_0, p.c_0, direction, row, unit);
        add_biases<Cell, float, T>(bias[e][u], p.bias_ih[direction], p.bias_hh[direction], unit, s.hidden);
      }
  if (!kGrid && cut.blocks > 1)
    cluster_barrier();  // every block's barriers and h are there
  else
    block_barrier();

  Moment now = row < s.batch ? Moment(s, direction, steps.begin, row) : Moment();
  // In a cluster, warps without units would fall behind the others and miss phases of the barriers.
  const int count = !kGrid && cut.blocks > 1 && !place.has(0) ? 0 : steps.count;
  for (int n = 0; n < count; ++n) {
    // The input's part of the pre-activations of eight e.
    const auto begin = [&](int e, Parts(&a)[2]) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        a[u] = bias[e][u];
        if (now.runs && place.owns(s, e, u))
          add_gates_x<Cell, float, T>(a[u], p, direction, now.row, place.unit(e) + u);
      }
    };
    Parts a[2];
    begin(0, a);

    // The state that this step starts from, in all its units.
    const unsigned char* h_now = h + (kGrid ? 0 : n % 2) * kTileRows * stride;
    if constexpr (kGrid) {
      if (n > 0) {
        grid_group_barrier(&exchange.arrived[place.group], cut.blocks, n);
        const int words = cut.total * kGroupUnits * int(sizeof(T)) / kWordBytes;  // of a row
        const auto* from = reinterpret_cast<const Words4*>(exchange.data) +
                           ((n % 2) * int64_t(exchange.groups) + place.group) * kTileRows * words;
        for (int i = threadIdx.x; i < kTileRows * words; i += blockDim.x)
          *pack_at<Words4>(h + i / words * stride + i % words * kWordBytes) = load_shared_by_grid(from + i);
        block_barrier();  // h is complete
      }
    } else if (n > 0 && cut.blocks == 1) {
      block_barrier();  // h is complete
    } else if (n > 0) {
      arrivals_wait(&barriers[n % 2], parity_of(n));
      if (threadIdx.x == 0 && n + 2 < steps.count) arrivals_expect(&barriers[n % 2], bytes);
    }

    const bool more = n + 1 < steps.count;
    const Moment next = more && row < s.batch ? Moment(s, direction, steps.begin + n + 1, row) : Moment();
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      if (e > 0) begin(e, a);
      float acc[kGates][4] = {};
      weights[e].multiply(acc, h_now + first_slice * kSliceBytes, stride, place.g, place.q);
      // The other warp of the pair gets the sums of its rows. Pairs have as many eights as the first of them.
      auto* sums = pack_at<Two>(shared + memory.sums) +
                   (place.pair * Memory::kTurns + e % Memory::kTurns) * 2 * kGates * 32 + place.lane;
      if (place.has(e))
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          sums[((1 - place.half) * kGates + gate) * 32] = {
              {place.half ? acc[gate][0] : acc[gate][2], place.half ? acc[gate][1] : acc[gate][3]}};
      pair_barrier();
      if (place.has(e))
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          const Two theirs = sums[(place.half * kGates + gate) * 32];
#pragma unroll
          for (int u = 0; u < 2; ++u)
            a[u].v[part_of_gate<Cell>(gate)] += (place.half ? acc[gate][2 + u] : acc[gate][u]) + theirs.v[u];
        }

#pragma unroll
      for (int u = 0; u < 2; ++u)
        if (now.runs && place.owns(s, e, u)) {
          Values<float, Cell::kKept> kept{};
          state[e][u] = Cell::forward(a[u], now.cut ? State<float>{0, 0} : state[e][u], kept);
          store_step<Cell, T>(p, state[e][u], kept, direction, now.row, place.unit(e) + u);
        }
      // Nothing is handed over in the last step: a block may have returned by then.
      if (!more || !place.has(e)) continue;
      const RowPiece<E> piece(next.cut ? 0.0f : state[e][0].h, next.cut ? 0.0f : state[e][1].h, place.lane);
      const int at = place.first(e) * int(sizeof(T));
      unsigned char* to = h + (((n + 1) % 2) * kTileRows + place.local_row) * stride + at;
#pragma unroll
      for (int part = 0; part < RowPiece<E>::kWords; ++part) {
        if constexpr (kGrid) {
          const int64_t group = ((n + 1) % 2) * int64_t(exchange.groups) + place.group;
          const int64_t bytes_of_row = int64_t(cut.total) * kGroupUnits * sizeof(T);
          if (place.q == part)
            *pack_at<Words4>(exchange.data + (group * kTileRows + place.local_row) * bytes_of_row + at +
                             part * kWordBytes) = piece.part[part];
        } else if (cut.blocks == 1) {
          if (place.q == part) *pack_at<Words4>(to + part * kWordBytes) = piece.part[part];
        } else {
          for (int block = place.q; block < cut.blocks; block += 4)
            push(to + part * kWordBytes, piece.part[part], &barriers[(n + 1) % 2], block);
        }
      }
    }
    now = next;
  }
  const int length = row < s.batch ? length_of(s, row) : 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e)
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (place.owns(s, e, u)) {
        const int unit = place.unit(e) + u;
        // An h that takes no part in the next step by itself would only take a register all the time.
        if (!Cell::kBlends)
          state[e][u].h = length == 0
                              ? load_or_zero<float, T>(p.h_0, state_at(s, direction, row, unit))
                              : load_or_zero<float, T>(
                                    p.output, output_at(s, row_at(s, direction == 0 ? length - 1 : 0, row),
                                                        direction, unit));
        store_state<Cell, T>(s, state[e][u], p.h_n, p.c_n, direction, row, unit);
      }
}

}  // namespace
}  // namespace cnnrnn::cuda
