// The backward pass on tensor cores; see rnn_tensor.cuh. A block has the gradients of its own units' gates,
// and multiplies them with its rows of the weights: a part of the sum for every unit of the layer. The parts
// go to the blocks that own the units, and are summed there in the order of the blocks.
#pragma once

#include "rnn_tensor.cuh"

namespace cnnrnn::cuda {
namespace {

// Columns of 8 units that a warp makes at a time.
template <typename Variant>
constexpr int kBackwardTiles = Variant::kEights > 1 ? 2 : 8;

// Slices of its first tiles' weights that a warp keeps in registers.
template <typename E, typename Variant>
constexpr int kKeptBackward = Variant::kEights > 1  ? (sizeof(StoredAs<E>) == 4 ? 13 : 8)
                              : Variant::kWarps > 8 ? 1
                              : Variant::kGrid      ? 3
                                                    : 4;

// Where things stand in a block's shared memory, bytes.
template <typename Cell, typename E, typename Variant>
struct BackwardMemory {
  static constexpr int kKept = kKeptBackward<E, Variant>, kTiles = kBackwardTiles<Variant>;
  int slices, stride;              // of the gates' gradients: gate * block_units + unit
  int block_units, warps, chunks;  // chunks of kTiles per warp
  int d, parts, targets, weights, bytes;
  __host__ __device__ BackwardMemory(const UnitCut& cut)
      : block_units(cut.most() * kGroupUnits), warps(Variant::warps(cut.most())) {
    slices = ceil_div(Cell::kGates * block_units, kSliceUnits<E>);
    stride = row_bytes(slices);
    chunks = ceil_div(cut.total, warps * kTiles);
    d = 2 * sizeof(Arrivals);            // [2][16 rows]
    parts = d + 2 * kTileRows * stride;  // [2][block that made it][eight][lane] of 16 bytes
    targets = parts + (Variant::kGrid ? 0 : 2 * cut.blocks * cut.most() * 32 * kWordBytes);
    weights = targets + ceil_div(warps * kTiles * int(sizeof(int)), kWordBytes) * kWordBytes;  // [warp][tile]
    bytes = weights + warps * per_warp() * kWordBytes;
  }
  // Words of a warp: its chunks one after the other, the first without the slices in registers.
  __host__ __device__ int first_chunk() const { return (slices > kKept ? slices - kKept : 0) * kTiles * 32; }
  __host__ __device__ int chunk() const { return slices * kTiles * 32; }
  __host__ __device__ int per_warp() const { return first_chunk() + (chunks - 1) * chunk(); }
};

template <typename Cell, typename E, typename Variant>
__global__ void __launch_bounds__(Variant::kWarps * 32, 1)
    rnn_tensor_backward(RnnBackward p, UnitCut cut, GridExchange exchange, int first_group) {
  using T = StoredAs<E>;
  using Memory = BackwardMemory<Cell, E, Variant>;
  constexpr int kTiles = Memory::kTiles, kGates = Cell::kGates, kEights = Variant::kEights;
  constexpr bool kGrid = Variant::kGrid;
  const RnnShape s = p.shape;
  const TensorPlace place(s, cut, first_group);
  const TileSteps steps(s, place.tile, place.direction);
  const Memory memory(cut);
  const int direction = place.direction, row = place.row, stride = memory.stride;
  const int first_unit = cut.first(place.block) * kGroupUnits, units = memory.block_units;

  auto* shared = shared_memory<unsigned char>();
  auto* barriers = pack_at<Arrivals>(shared);
  unsigned char* d_rows = shared + memory.d;
  auto* parts = pack_at<Words4>(shared + memory.parts);

  // Weights of the eights that this warp makes: warp, warp + warps, ...
  const T* weight = static_cast<const T*>(p.weight_hh[direction]);
  const auto load_chunk = [&](auto& into, Words4* memory_of, int chunk) {
    const int first = chunk * kTiles * memory.warps + place.warp;
    const int tiles = min(kTiles, max(0, ceil_div(cut.total - first, memory.warps)));
    into.load(memory_of, memory.slices, tiles, [&](int slice, int tile) {
      const int column = slice * kSliceUnits<E> + place.q * kWordUnits<E>;  // these are of one gate
      const int gate = column / units, own = column % units, unit = first_unit + own;
      const int k = (first + tile * memory.warps) * kGroupUnits + place.g;
      const int own_units = min(cut.count(place.block) * kGroupUnits, s.hidden - first_unit);
      return gather_word<E>(weight + (int64_t(gate) * s.hidden + unit) * s.hidden + k, s.hidden,
                            gate < kGates && k < s.hidden ? own_units - own : 0);
    });
  };
  Words4* own_weights = pack_at<Words4>(shared + memory.weights) + place.warp * memory.per_warp();
  WarpWeights<E, kTiles, Memory::kKept> weights;
  load_chunk(weights, own_weights, 0);
  own_weights += memory.first_chunk();
  WarpWeights<E, kTiles, 0> more_weights;
  for (int chunk = 1; chunk < memory.chunks; ++chunk)
    load_chunk(more_weights, own_weights + (chunk - 1) * memory.chunk(), chunk);

  for (int i = threadIdx.x; i < 2 * kTileRows * stride / kWordBytes; i += blockDim.x)
    *pack_at<Words4>(d_rows + i * kWordBytes) = Words4{};  // columns of units that nobody has stay so
  const unsigned bytes = cut.blocks * cut.count(place.block) * 32 * kWordBytes;  // that come in a step
  if (!kGrid && cut.blocks > 1 && threadIdx.x == 0)
    for (int b = 0; b < 2; ++b) {
      arrivals_init(&barriers[b], 1);
      arrivals_expect(&barriers[b], bytes);
    }

  State<float> grad[kEights][2] = {};
#pragma unroll
  for (int e = 0; e < kEights; ++e)
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (place.owns(s, e, u))
        grad[e][u] = load_state<Cell, float, T>(s, p.grad_h_n, p.grad_c_n, direction, row, place.unit(e) + u);
  if (!kGrid && cut.blocks > 1)
    cluster_barrier();  // every block's barriers are there
  else
    block_barrier();

  // The n-th parts (n = 1, 2, ...) of this lane's two units, from every block.
  const auto grid_parts = [&](int n, int eight) {
    return reinterpret_cast<Words4*>(exchange.data) +
           (((n % 2) * int64_t(exchange.groups) + place.group) * cut.total + eight) * cut.blocks * 32;
  };
  const auto add_parts = [&](int n) {
    if constexpr (kGrid) {
      grid_group_barrier(&exchange.arrived[place.group], cut.blocks, n);
    } else if (cut.blocks == 1) {
      block_barrier();  // the parts are complete
    } else if (place.has(0)) {
      arrivals_wait(&barriers[n % 2], parity_of(n));
      if (threadIdx.x == 0 && n + 2 <= steps.count) arrivals_expect(&barriers[n % 2], bytes);
    }
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      if (!place.has(e)) continue;
      for (int block = 0; block < cut.blocks; ++block) {
        Pack<float, 2> part;
        if constexpr (kGrid) {
          const auto* from = grid_parts(n, place.first(e) / kGroupUnits) + block * 32 + place.lane;
          part = load_shared_by_grid(reinterpret_cast<const Pack<float, 2>*>(from) + place.half);
        } else {
          const auto* from =
              parts + (((n % 2) * cut.blocks + block) * cut.most() + place.eight(e)) * 32 + place.lane;
          part = reinterpret_cast<const Pack<float, 2>*>(from)[place.half];
        }
        grad[e][0].h += part.v[0];
        grad[e][1].h += part.v[1];
      }
    }
  };
  // Outside the grid a warp has one chunk. Where its parts go: the owner's word of lane 0, * 32 + owner.
  int* targets = pack_at<int>(shared + memory.targets) + place.warp * kTiles;
  if (!kGrid && place.lane < kTiles) {
    const int eight = min(place.lane * memory.warps + place.warp, cut.total - 1), owner = cut.owner(eight);
    targets[place.lane] = (place.block * cut.most() + eight - cut.first(owner)) * 32 * 32 + owner;
  }
  const auto hand_over = [&](int n, int chunk, int tile, const float (&acc)[4]) {
    const int eight = (chunk * kTiles + tile) * memory.warps + place.warp;
    const Words4 words = bits_as<Words4>(Pack<float, 4>{{acc[0], acc[1], acc[2], acc[3]}});
    if constexpr (kGrid) {
      grid_parts(n, eight)[place.block * 32 + place.lane] = words;
    } else {
      Words4* to = parts + n % 2 * cut.blocks * cut.most() * 32 + targets[tile] / 32 + place.lane;
      if (cut.blocks == 1)
        *to = words;
      else
        push(to, words, &barriers[n % 2], targets[tile] % 32);
    }
  };

  for (int n = 0; n < steps.count; ++n) {
    const int step = steps.begin + steps.count - 1 - n;
    const Moment now = row < s.batch ? Moment(s, direction, step, row) : Moment();
    StepMade<Cell, float> made[2];
    const auto load_made = [&](int e) {
#pragma unroll
      for (int u = 0; u < 2; ++u)
        if (now.runs && place.owns(s, e, u))
          made[u] = load_step<Cell, float, T>(p, now, direction, row, place.unit(e) + u);
    };
    load_made(0);
    if (n > 0) add_parts(n);

    unsigned char* d_now = d_rows + (n % 2) * kTileRows * stride;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      if (!place.has(e)) continue;
      if (e > 0) load_made(e);
      Values<float, kGates> gates[2] = {};
#pragma unroll
      for (int u = 0; u < 2; ++u)
        if (now.runs && place.owns(s, e, u)) {
          Values<float, Cell::kParts> d;
          grad[e][u] =
              step_gradients<Cell, float, T>(p, now, made[u], direction, place.unit(e) + u, grad[e][u], d);
          if (!now.cut) gates[u] = state_gates<Cell>(d);
        }
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        const int column = gate * units + place.eight(e) * kGroupUnits + 2 * place.q;
        *pack_at<Pack<T, 2>>(d_now + place.local_row * stride + column * int(sizeof(T))) = {
            {round_to<E>(gates[0].v[gate]), round_to<E>(gates[1].v[gate])}};
      }
    }
    block_barrier();  // the gates' gradients are complete

    for (int chunk = 0; chunk < memory.chunks; ++chunk) {
      float acc[kTiles][4] = {};
      int tiles = weights.tiles;
      if (chunk == 0) {
        weights.multiply(acc, d_now, stride, place.g, place.q);
      } else {
        WarpWeights<E, kTiles, 0> later = more_weights;
        later.rest = own_weights + (chunk - 1) * memory.chunk() + place.lane;
        if (chunk + 1 < memory.chunks) later.tiles = kTiles;
        later.multiply(acc, d_now, stride, place.g, place.q);
        tiles = later.tiles;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        if (tile < tiles) hand_over(n + 1, chunk, tile, acc[tile]);
    }
  }
  if (steps.count > 0) add_parts(steps.count);
#pragma unroll
  for (int e = 0; e < kEights; ++e)
#pragma unroll
    for (int u = 0; u < 2; ++u)
      if (place.owns(s, e, u))
        store_state<Cell, T>(s, grad[e][u], p.grad_h_0, p.grad_c_0, direction, row, place.unit(e) + u);
}

}  // namespace
}  // namespace cnnrnn::cuda
