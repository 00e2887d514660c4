// conv_pool forward on tensor cores for 1 to 4 input channels, straight from x of any layout.
//
// The products of a 2x2 block's position are a run of 3 * C adjacent elements (kx, c) in each of three rows
// of the halo, kept pixel by pixel in shared memory. A run is cut into words of 32 bits, and those of the
// three rows are the words of a fragment's rows: lane t reads words t and t + 4 of each step by itself, no
// ldmatrix. With an odd number of 16-bit channels, a run that begins at an odd element is read from a second
// copy of the halo, one element on. Words beyond a run would multiply what stands there by zero, which an
// infinity does not forgive: they are masked.
#pragma once

#include "conv_pool_tensor_forward.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kMostFewChannels = 4;
constexpr int kFewTiles = 4, kFewWide = 16;

template <typename T, int kChannels>
struct FewChannels {
  static constexpr int kOfWord = 4 / sizeof(T);
  static constexpr int kRun = 3 * kChannels, kRunWords = (kRun + kOfWord - 1) / kOfWord;
  static constexpr int kWords = 3 * kRunWords, kSteps = (kWords + 7) / 8;
  static constexpr int kCopies = kRun % kOfWord == 0 ? 1 : 2;
  // One element more than the pixels, for the shifted copy, and one for the last word.
  static constexpr int kRowElements = (Halo<kFewWide>::kCols * kChannels + 2) / 2 * 2;
  static constexpr int kCopyElements = Halo<kFewWide>::kRows * kRowElements;
  static constexpr int kPackedBytes = kSteps * kFewTiles * 256;  // weights of a channel tile
};

template <typename T, int kChannels>
constexpr size_t few_shared_bytes(Activation activation) {
  using Few = FewChannels<T, kChannels>;
  const size_t halo = sizeof(T) * Few::kCopies * Few::kCopyElements;
  return has_keys(activation) ? std::max(halo, sizeof(float) * 4 * kFewTiles * 4 * kTensorThreads) : halo;
}

// Weights as fragments, [channel tile][step][pair of tiles][lane][16 bytes]; a thread writes one word.
template <typename T, int kChannels>
__global__ void __launch_bounds__(kPackThreads)
    pack_few_weights(const T* weight, int outputs, uint32_t* packed) {
  using Few = FewChannels<T, kChannels>;
  constexpr int kWordsOfTile = Few::kPackedBytes / 4;
  const int index = blockIdx.x * kPackThreads + threadIdx.x;
  if (index >= ceil_div(outputs, 8 * kFewTiles) * kWordsOfTile) return;
  const int word = index % kWordsOfTile, tile_k = index / kWordsOfTile;
  const int r = word % 4, lane = word / 4 % 32, j = word / 128 % (kFewTiles / 2) * 2 + r / 2;
  const int step = word / 128 / (kFewTiles / 2), g = lane / 4, t = lane % 4;
  const int k = tile_k * 8 * kFewTiles + g / 2 * 2 * kFewTiles + 2 * j + g % 2;
  const int q = step * 8 + t + r % 2 * 4, ky = q / Few::kRunWords;
  Pack<T, Few::kOfWord> elements;
#pragma unroll
  for (int i = 0; i < Few::kOfWord; ++i) {
    const int of_run = q % Few::kRunWords * Few::kOfWord + i, c = of_run % kChannels, kx = of_run / kChannels;
    const bool real = q < Few::kWords && of_run < Few::kRun && k < outputs;
    elements.v[i] = real ? weight[(int64_t(k) * kChannels + c) * kTaps + ky * 3 + kx] : narrow_to<T>(0.0f);
  }
  if constexpr (std::is_same_v<T, float>) {
    packed[index] = to_tf32(elements.v[0]);
  } else {
    *pack_at<Pack<T, Few::kOfWord>>(reinterpret_cast<T*>(packed + index)) = elements;
  }
}

// The halo pixel by pixel, zeros outside of the image, in one or two copies.
template <typename T, int kChannels>
__device__ __forceinline__ void stage_few(T* halo, const ConvPoolShape& s, const Map& x,
                                          const TilePlace<kFewWide>& place) {
  using Few = FewChannels<T, kChannels>;
  using Tile = Halo<kFewWide>;
  const int in_y = 2 * place.block_y - s.padding.h, in_x = 2 * place.block_x - s.padding.w;
  for (int i = threadIdx.x; i < Tile::kRows * Few::kRowElements; i += kTensorThreads) {
    // By rows of one channel, along which NCHW is adjacent, then what is left of the row.
    const int row = i / Few::kRowElements, rest = i % Few::kRowElements;
    const int c = rest / Tile::kCols, col = rest % Tile::kCols;
    const int h = in_y + row, w = in_x + col;
    T value = narrow_to<T>(0.0f);
    int place_of_value = rest;  // the last elements of a row are no pixels
    if (c < kChannels) {
      place_of_value = col * kChannels + c;
      if (h >= 0 && h < s.in.h && w >= 0 && w < s.in.w) value = *at<const T>(x, place.n, c, h, w);
      if constexpr (std::is_same_v<T, float>) value = bits_to_float(to_tf32(value));
    }
    T* to = halo + row * Few::kRowElements;
    to[place_of_value] = value;
    if (Few::kCopies == 2)
      to[Few::kCopyElements + (place_of_value + Few::kRowElements - 1) % Few::kRowElements] = value;
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_forward_few(ConvPoolShape s, Map x, const unsigned char* packed, const T* bias,
                       ConvPoolResults out) {
  using Few = FewChannels<T, kChannels>;
  using Element = typename MmaElement<T>::type;
  TilePlace<kFewWide> place(blocks_of(s), 1);
  T* halo = shared_memory<T>();
  stage_few<T, kChannels>(halo, s, x, place);
  block_barrier();

  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t a[4][Few::kSteps][4];  // by position
#pragma unroll
  for (int step = 0; step < Few::kSteps; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int q = step * 8 + t + r / 2 * 4, of_run = q % Few::kRunWords * Few::kOfWord;
      const bool real = q < Few::kWords;
      const uint32_t mask = !real ? 0u : of_run + Few::kOfWord > Few::kRun ? 0xFFFFu : 0xFFFFFFFFu;
      const Size2 block = block_of_row<kFewWide>(threadIdx.x / 32, g + r % 2 * 8);
      const int first = (2 * block.h + (real ? q / Few::kRunWords : 0)) * Few::kRowElements +
                        2 * block.w * kChannels + (real ? of_run : 0);
#pragma unroll
      for (int position = 0; position < 4; ++position) {
        // The second copy stands one element on, so that an odd begin is even there.
        const int shift = position % 2 * kChannels;
        const int copy = Few::kCopies == 2 && shift % 2 == 1 ? Few::kCopyElements - 1 : 0;
        const T* from = halo + first + position / 2 * Few::kRowElements + shift + copy;
        a[position][step][r] = *pack_at<const uint32_t>(from) & mask;
      }
    }
  }
  if (has_keys(s.activation)) block_barrier();  // the halo has been read

  const int tiles_k = ceil_div(s.k, 8 * kFewTiles);
  for (place.tile_k = 0; place.tile_k < tiles_k; ++place.tile_k) {
    const unsigned char* weights = packed + int64_t(place.tile_k) * Few::kPackedBytes + lane * 16;
    BlockSums<kFewTiles> sum;
#pragma unroll
    for (int i = 0; i < 4 * kFewTiles * 4; ++i) sum[i / (kFewTiles * 4)][i / 4 % kFewTiles][i % 4] = 0.0f;
#pragma unroll
    for (int step = 0; step < Few::kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kFewTiles; j += 2) {
        const auto b = *pack_at<const Pack<uint32_t, 4>>(
            reinterpret_cast<const uint32_t*>(weights + (step * kFewTiles + j) * 256));
#pragma unroll
        for (int position = 0; position < 4; ++position) {
          const auto& run = a[position][step];
          mma<Element>(sum[position][j], run[0], run[1], run[2], run[3], b.v[0], b.v[1]);
          mma<Element>(sum[position][j + 1], run[0], run[1], run[2], run[3], b.v[2], b.v[3]);
        }
      }
    }
    finish_tile<T, kFewTiles, kFewWide>(s, bias, sum, shared_memory<float>() + threadIdx.x, place, out);
  }
}

// Calls function(channels), a compile-time number.
template <typename Function>
void with_few_channels(int channels, const Function& function) {
  if (channels == 1) return function(std::integral_constant<int, 1>{});
  if (channels == 2) return function(std::integral_constant<int, 2>{});
  if (channels == 3) return function(std::integral_constant<int, 3>{});
  function(std::integral_constant<int, 4>{});
}

}  // namespace
}  // namespace cnnrnn::cuda
