// conv_pool on tile registers on the CPU: when.
#pragma once

#include "conv_pool_panels.h"
#include "cpu/capability.h"

namespace cnnrnn {

#if defined(__x86_64__)
inline const ConvPoolTiles* tiles() { return active_isa() == Isa::kAmx ? &conv_pool_amx : nullptr; }
#else
inline const ConvPoolTiles* tiles() { return nullptr; }
#endif

// Whether the kernels cover a call: a strip is at least one row of the map, and stays in cache.
inline bool tiles_serve(const ConvPoolShape& s) {
  constexpr int64_t kMostBytes = 4 << 20, kMostTaps = 64;
  return tiles() && s.groups == 1 && s.kernel.h * s.kernel.w <= kMostTaps &&
         tiles()->f32.scratch_bytes(s) < kMostBytes;
}

// Whether float32 is faster there than on the direct kernels. Both are counted in cycles for one pixel of the
// map and 16 outputs: six products of parts for every 32 values under a row of the kernel, and the input's
// copy, against two multiply-adds a cycle, of vectors that run along a row of outputs. The copy and the
// margin were fitted to 20 shapes of 3 to 256 channels on one processor; the batch has no say, so that it
// changes no result.
inline bool tiles_pay(const ConvPoolShape& s) {
  if (!tiles_serve(s)) return false;
  constexpr double kCopy = 24, kMargin = 1.5;
  const auto blocks = [](int64_t count, int64_t size) {
    return static_cast<double>((count + size - 1) / size);
  };
  const double rows = static_cast<double>(s.dilation.w == 1 ? s.kernel.h : s.kernel.h * s.kernel.w);
  const int64_t depth = s.channels * (s.dilation.w == 1 ? s.kernel.w : 1);
  const double width = static_cast<double>(s.conv.w), apart = 16 * blocks(s.conv.w, 16);
  const double in_width = static_cast<double>(s.input.w + 2 * s.padding.w);
  const double pitch = s.stride.h == 1 && s.stride.w == 1 ? std::min(apart, in_width) : apart;
  const double copied = static_cast<double>(s.input.h * s.input.w) / static_cast<double>(s.conv.h * s.conv.w);
  const double cycles = 6 * rows * blocks(depth, 32) * pitch / width +
                        kCopy * copied * blocks(s.channels, 32) / blocks(s.outputs, 16);
  const double of_vectors = 16 * blocks(s.pooled.w, 16) / static_cast<double>(s.pooled.w);
  return kMargin * cycles < static_cast<double>(s.kernel.h * s.kernel.w * s.channels) / 2 * of_vectors;
}

// Whether the kernels whose pixels are columns of tiles cover a call and are faster than the direct ones:
// where channels are few and pixels many, and both fill tiles (measured at 1 to 16 channels, kernels of 9 to
// 251 taps, maps of 20 to 5325 columns; channels last they lose where codes are written).
inline bool columns_pay(const ConvPoolShape& s) {
  constexpr int64_t kMostBytes = 4 << 20, kMostChannels = 8, kMostTaps = 256, kFewestWindows = 512;
  const auto fills = [](int64_t count) { return 5 * count >= 4 * ((count + 15) / 16 * 16); };
  return tiles() && s.groups == 1 && !s.channels_last && !s.keyed && (s.dilation.h == 1 || s.kernel.h == 1) &&
         s.channels <= kMostChannels && s.channels * s.kernel.h * s.kernel.w <= kMostTaps &&
         s.outputs >= 32 && s.windows() >= kFewestWindows && fills(s.outputs) && fills(s.pooled.w) &&
         tiles()->columns.scratch_bytes(s) < kMostBytes;
}

}  // namespace cnnrnn
