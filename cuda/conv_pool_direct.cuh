// conv_pool forward by direct convolution of any kernel, stride, dilation and pool, operands in shared memory
// and sums in registers. A thread makes two 2x2 blocks of convolution outputs in kOut channels: kOut * 2 * 4
// sums. Windows that make up such blocks are pooled in registers, others from the tile's outputs in shared
// memory: tiles then overlap by what windows need.
//
// The two blocks of a thread lie half a tile's width apart, and the columns of the input are stored by their
// remainder by the distance of two blocks: so neighbouring threads read neighbouring words, whatever the
// stride.
#pragma once

#include "conv_pool_windows.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kTileThreads = 128;

template <typename A>
constexpr int kTileOut = sizeof(A) == 8 ? 4 : 8;

// ---- what follows the sums [channel][dy][column of the two blocks] of a thread ----
template <int kOut, typename T, typename A>
__device__ __forceinline__ void add_bias(A (&sum)[kOut * 8], const T* bias, int k_begin, int k_count) {
#pragma unroll
  for (int i = 0; i < kOut * 8; ++i) sum[i] += bias && i / 8 < k_count ? widen(bias[k_begin + i / 8]) : A(0);
}

// Pools the windows that the blocks are made of; block_x(0) and block_x(1) are the columns of the two. keys:
// shared memory of the thread, used for activations other than relu.
template <typename T, int kOut, typename A, typename BlockX>
__device__ __forceinline__ void store_blocks(const ConvPoolShape& s, const A (&sum)[kOut * 8], A* keys,
                                             int threads, int64_t n, int k_begin, int k_count, int block_y,
                                             const BlockX& block_x, const ConvPoolResults& out) {
  if (has_keys(s.activation))
    compute_keys<kOut * 8>(s.activation, [&](int i) { return sum[i]; }, keys, threads);
  with_block_windows(s.pool, [&](auto windows) {
    using Windows = decltype(windows);
#pragma unroll
    for (int k = 0; k < kOut; ++k) {
#pragma unroll
      for (int i = 0; i < 2 * Windows::kCount; ++i) {
        const int window = i % Windows::kCount, block = i / Windows::kCount;
        const int h = block_y * Windows::kDown + window / Windows::kAcross;
        const int w = block_x(block) * Windows::kAcross + window % Windows::kAcross;
        if (k >= k_count || h >= s.out.h || w >= s.out.w) continue;
        const auto place = [&](int dy, int dx) { return k * 8 + dy * 4 + 2 * block + dx; };
        const auto value = [&](int dy, int dx) { return sum[place(dy, dx)]; };
        const auto key = [&](int dy, int dx) {
          return has_keys(s.activation) ? keys[place(dy, dx) * threads] : value(dy, dx);
        };
        Windows::template winner<A>(s, window, block_y, block_x(block), key, value)
            .template store<T>(out, n, k_begin + k, h, w);
      }
    }
  });
}

// How a convolution is cut. All sizes of one tile.
struct DirectTile {
  int across = 0, down;     // threads
  Size2 step;               // convolution outputs from tile to tile
  Size2 windows;            // not in blocks
  Size2 tiles;              // of an image
  Size2 in;                 // input, halo included
  int column_pitch, pitch;  // words of the columns with one remainder, and of a row
  int channels;             // staged at a time
  size_t bytes;             // of shared memory
  bool in_blocks;
  bool covers() const { return across > 0; }
  __host__ __device__ int rows() const { return 2 * down; }
  __host__ __device__ int columns() const { return 4 * across; }
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 4 : 2)
    conv_pool_forward_direct(ConvPoolShape s, DirectTile tile, Map x, const T* weight, const T* bias,
                             ConvPoolResults out) {
  using A = Accumulator<T>;
  constexpr int kOut = kTileOut<A>;
  const int channels = s.c / s.groups, outputs = s.k / s.groups, taps = s.kernel.h * s.kernel.w;
  A* weights = shared_memory<A>();                    // [tile.channels][taps][kOut]
  A* inputs = weights + tile.channels * taps * kOut;  // [tile.channels][tile.in.h][tile.pitch]
  int* places = reinterpret_cast<int*>(inputs + tile.channels * tile.in.h * tile.pitch);  // [tile.in.w]

  const int tid = threadIdx.x;
  const int tile_x = blockIdx.x % tile.tiles.w, tile_y = blockIdx.x / tile.tiles.w % tile.tiles.h;
  const int64_t n = blockIdx.x / tile.tiles.w / tile.tiles.h;
  const int tiles_k = ceil_div(outputs, kOut), group = blockIdx.y / tiles_k;
  const int k_begin = group * outputs + static_cast<int>(blockIdx.y) % tiles_k * kOut;
  const int k_count = min(kOut, (group + 1) * outputs - k_begin);
  const int conv_y = tile_y * tile.step.h - s.pool_padding.h,
            conv_x = tile_x * tile.step.w - s.pool_padding.w;
  const int in_y = conv_y * s.stride.h - s.padding.h, in_x = conv_x * s.stride.w - s.padding.w;
  const int row = tid / tile.across, column = tid % tile.across;

  const int remainders = 2 * s.stride.w;
  for (int i = tid; i < tile.in.w; i += kTileThreads)
    places[i] = i % remainders * tile.column_pitch + i / remainders;

  A sum[kOut * 8] = {};
  for (int c_begin = 0; c_begin < channels; c_begin += tile.channels) {
    const int c_count = min(tile.channels, channels - c_begin);
    block_barrier();  // the last chunk has been read, and the places are there
    for (int line = tid / 32; line < c_count * tile.in.h; line += kTileThreads / 32) {
      const int c = line / tile.in.h, h = in_y + line % tile.in.h;
      const bool row_inside = h >= 0 && h < s.in.h;
      for (int i = tid % 32; i < tile.in.w; i += 32) {
        const int w = in_x + i;
        inputs[line * tile.pitch + places[i]] =
            row_inside && w >= 0 && w < s.in.w
                ? widen(*at<const T>(x, n, group * channels + c_begin + c, h, w))
                : A(0);
      }
    }
    for (int i = tid; i < c_count * taps * kOut; i += kTileThreads) {
      const int k = i % kOut, element = i / kOut;  // element = (channel, tap)
      weights[i] =
          k < k_count ? widen(weight[(int64_t(k_begin + k) * channels + c_begin) * taps + element]) : A(0);
    }
    block_barrier();
    const A* of_tap = weights;
    for (int c = 0; c < c_count; ++c)
      for (int y = 0; y < s.kernel.h; ++y) {
        const A* line =
            inputs + column + (c * tile.in.h + 2 * row * s.stride.h + y * s.dilation.h) * tile.pitch;
        for (int tap_x = 0; tap_x < s.kernel.w; ++tap_x, of_tap += kOut) {
          const int left = places[tap_x * s.dilation.w], right = places[tap_x * s.dilation.w + s.stride.w];
          A in[8];
#pragma unroll
          for (int i = 0; i < 8; ++i)
            in[i] = line[i / 4 * s.stride.h * tile.pitch + i / 2 % 2 * tile.across + (i % 2 ? right : left)];
          const auto w = *pack_at<const Pack<A, kOut>>(of_tap);
#pragma unroll
          for (int k = 0; k < kOut; ++k)
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[k * 8 + i] += w.v[k] * in[i];
        }
      }
  }

  add_bias<kOut>(sum, bias, k_begin, k_count);
  block_barrier();  // the operands have been read
  if (tile.in_blocks)
    return store_blocks<T, kOut>(
        s, sum, shared_memory<A>() + tid, kTileThreads, n, k_begin, k_count, tile_y * tile.down + row,
        [&](int block) { return (2 * tile_x + block) * tile.across + column; }, out);

  A* finished = shared_memory<A>();  // [kOut][row][column]
#pragma unroll
  for (int i = 0; i < kOut * 8; ++i)
    finished[((i / 8 * tile.down + row) * 2 + i / 4 % 2) * tile.columns() +
             2 * (column + i / 2 % 2 * tile.across) + i % 2] = sum[i];
  block_barrier();
  const int windows = tile.windows.h * tile.windows.w;
  for (int i = tid; i < k_count * windows; i += kTileThreads) {
    const int k = i / windows, y = i % windows / tile.windows.w, w = i % windows % tile.windows.w;
    const int out_h = tile_y * tile.windows.h + y, out_w = tile_x * tile.windows.w + w;
    if (out_h >= s.out.h || out_w >= s.out.w) continue;
    const A* corner =
        finished + (k * tile.rows() + y * s.pool_stride.h) * tile.columns() + w * s.pool_stride.w;
    WindowMax<A> window;
    bool first = true;
    for (int position = 0; position < s.pool.h * s.pool.w; ++position) {
      const int dy = position / s.pool.w, dx = position % s.pool.w;
      const int h = conv_y + y * s.pool_stride.h + dy, v = conv_x + w * s.pool_stride.w + dx;
      if (h < 0 || h >= s.conv.h || v < 0 || v >= s.conv.w) continue;
      const A value = corner[dy * tile.columns() + dx];
      const A key = has_keys(s.activation) ? activate(s.activation, value) : value;
      if (first) window.start(key, value, position);
      if (!first) window.add(key, value, position);
      first = false;
    }
    window.finish(s.activation == Activation::kRelu);
    window.template store<T>(out, n, k_begin + k, out_h, out_w);
  }
}

// ---- launchers ----
// The tile of so many threads across; one that covers nothing where a window or the input does not fit.
template <typename T>
DirectTile direct_tile_of(const ConvPoolShape& s, int across) {
  using A = Accumulator<T>;
  constexpr int kOut = kTileOut<A>;
  constexpr size_t kWanted = 48 * 1024;  // bytes of shared memory: four blocks a multiprocessor
  DirectTile t;
  t.down = kTileThreads / across;
  const Size2 size{2 * t.down, 4 * across};
  t.in_blocks = is_in_blocks(s);
  if (!t.in_blocks && (s.pool.h > size.h || s.pool.w > size.w)) return t;
  t.windows = {(size.h - s.pool.h) / s.pool_stride.h + 1, (size.w - s.pool.w) / s.pool_stride.w + 1};
  t.step = t.in_blocks ? size : Size2{t.windows.h * s.pool_stride.h, t.windows.w * s.pool_stride.w};
  t.tiles = t.in_blocks ? Size2{ceil_div(blocks_of(s).h, t.down), ceil_div(blocks_of(s).w, 2 * across)}
                        : Size2{ceil_div(s.out.h, t.windows.h), ceil_div(s.out.w, t.windows.w)};
  const int64_t in_h = int64_t(size.h - 1) * s.stride.h + int64_t(s.kernel.h - 1) * s.dilation.h + 1;
  const int64_t in_w = int64_t(size.w - 1) * s.stride.w + int64_t(s.kernel.w - 1) * s.dilation.w + 1;
  const int64_t column_pitch = ceil_div(in_w, int64_t(2) * s.stride.w);
  int64_t pitch = column_pitch * 2 * s.stride.w;
  // The threads of a warp in other rows take other banks, where some pitch makes them.
  for (int more = 0; across < 32 && more < 32; ++more)
    if (2 * s.stride.h * (pitch + more) % 32 == across) {
      pitch += more;
      break;
    }
  const int64_t taps = int64_t(s.kernel.h) * s.kernel.w, elements = in_h * pitch + taps * kOut;
  const int64_t places = in_w * int64_t(sizeof(int)), limit = shared_memory_limit();
  const int64_t fit = (int64_t(kWanted) - places) / int64_t(elements * sizeof(A));
  const int64_t channels = std::max<int64_t>(1, std::min<int64_t>(fit, s.c / s.groups));
  const int64_t bytes =
      std::max<int64_t>(channels * elements * sizeof(A) + places, sizeof(A) * kOut * 8 * kTileThreads);
  if (bytes > limit) return t;
  t.across = across;
  t.in = {static_cast<int>(in_h), static_cast<int>(in_w)};
  t.column_pitch = static_cast<int>(column_pitch), t.pitch = static_cast<int>(pitch);
  t.channels = static_cast<int>(channels), t.bytes = static_cast<size_t>(bytes);
  return t;
}

// The tile of which the fewest cover the map. None for so few outputs that most sums would be idle.
template <typename T>
DirectTile direct_tile(const ConvPoolShape& s) {
  DirectTile best;
  if (2 * (s.k / s.groups) < kTileOut<Accumulator<T>>) return best;
  const auto count = [](const DirectTile& t) { return int64_t(t.tiles.h) * t.tiles.w; };
  for (const int across : {32, 16, 8}) {
    const DirectTile tile = direct_tile_of<T>(s, across);
    if (tile.covers() && (!best.covers() || count(tile) < count(best))) best = tile;
  }
  return best;
}

template <typename T>
void launch_direct(const ConvPoolShape& s, const DirectTile& tile, Map x, const T* weight, const T* bias,
                   const ConvPoolResults& out, void* stream) {
  const int tiles_k = s.groups * ceil_div(s.k / s.groups, kTileOut<Accumulator<T>>);
  launch(conv_pool_forward_direct<T>, dim3(grid_size(int64_t(s.n) * tile.tiles.h * tile.tiles.w), tiles_k),
         kTileThreads, tile.bytes, stream, s, tile, x, weight, bias, out);
}

}  // namespace
}  // namespace cnnrnn::cuda
