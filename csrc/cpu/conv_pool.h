// The CPU kernels of conv_pool as the host file sees them: raw pointers, sizes, one table per instruction
// set.
#pragma once

#include <cstdint>

namespace cnnrnn {

constexpr uint8_t kDead = 255;  // code of an output that passes no gradient

struct Pair {
  int64_t h, w;
};

// An activation: a row of the table of each instruction set.
template <typename T>
struct ActivationOf {
  const char* name;
  bool of_output;  // it never falls, and its derivative follows from its value
  // y may be z, and out may be kept or grad.
  void (*value)(const T* z, T* y, int64_t n);
  // grad times the derivative; kept is y where of_output, else z.
  void (*gradient)(const T* kept, const T* grad, T* out, int64_t n);
};

constexpr int kNoActivation = -1;

// One call: y [N, K, pooled] = max_pool(activation(conv(x [N, C, input], weight [K, C / groups, kernel]))).
struct ConvPoolShape {
  int64_t batch, channels, outputs, groups;  // N, C, K
  Pair input, kernel, stride, padding, dilation;
  Pair conv;                          // size of the map before the pool
  Pair window, step, margin, pooled;  // pool: window size, stride, padding, output size
  // ReLU has kernels of its own and shows in the codes. Any other activation is a row of the table, applied
  // to what the pool leaves. keyed: the pool compares activated values, for those that fall somewhere.
  bool relu, keyed;
  int activation = kNoActivation;
  bool channels_last;   // of x, y, code and their gradients
  bool across = false;  // see PanelForward::fill

  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t positions() const { return window.h * window.w; }
  int64_t windows() const { return pooled.h * pooled.w; }
};

// Every function works on units [begin, end) of its own kind, which the host file spreads over threads;
// scratch belongs to one such call alone.
template <typename T>
struct ConvPoolKernelsOf {
  const ActivationOf<T>* activations;
  int64_t activation_count;

  // Forward. code and kept (the winners before the activation) may be null.
  int64_t (*forward_packed_size)(const ConvPoolShape&);
  void (*forward_pack)(const ConvPoolShape&, const T* weight, const T* bias, T* packed);
  int64_t (*forward_units)(const ConvPoolShape&);
  int64_t (*forward_scratch_bytes)(const ConvPoolShape&);
  void (*forward)(const ConvPoolShape&, const T* x, const T* packed, T* y, uint8_t* code, T* kept,
                  void* scratch, int64_t begin, int64_t end);

  // Gradients of weight and bias: each call adds into a zeroed partial of its own, reduced afterwards for
  // outputs [begin, end).
  int64_t (*weight_partial_size)(const ConvPoolShape&);
  int64_t (*weight_units)(const ConvPoolShape&);
  int64_t (*weight_scratch_bytes)(const ConvPoolShape&);
  void (*weight)(const ConvPoolShape&, const T* x, const T* grad_y, const uint8_t* code, T* partial,
                 void* scratch, int64_t begin, int64_t end);
  void (*weight_reduce)(const ConvPoolShape&, const T* partials, int64_t count, T* grad_weight, T* grad_bias,
                        int64_t begin, int64_t end);

  // Gradient of x.
  int64_t (*input_packed_size)(const ConvPoolShape&);
  void (*input_pack)(const ConvPoolShape&, const T* weight, T* packed);
  int64_t (*input_units)(const ConvPoolShape&);
  int64_t (*input_scratch_bytes)(const ConvPoolShape&);
  void (*input)(const ConvPoolShape&, const T* packed, const T* grad_y, const uint8_t* code, T* grad_x,
                void* scratch, int64_t begin, int64_t end);

  // Average pooling by itself: y from the map [N, K, conv], activated first by row `activation` unless that
  // is kNoActivation; and the gradient of the map before that row from that of y, with what the row has kept.
  int64_t (*average_units)(const ConvPoolShape&);
  int64_t (*average_scratch_bytes)(const ConvPoolShape&);
  void (*average)(const ConvPoolShape&, int activation, const T* map, T* y, void* scratch, int64_t begin,
                  int64_t end);
  int64_t (*spread_units)(const ConvPoolShape&);
  void (*spread)(const ConvPoolShape&, int activation, const T* kept, const T* grad_y, T* grad_map,
                 int64_t begin, int64_t end);
};

// A forward whose outputs come in panels, from weights that are transformed once a call.
template <typename T>
struct PanelForward {
  int64_t (*output_panels)(const ConvPoolShape&);
  int64_t (*packed_size)(const ConvPoolShape&);
  // Of output panels [begin, end). mirrored: weight is [C, K, KH, KW], of the convolution whose gradient of
  // the input this is.
  void (*pack)(const ConvPoolShape&, const T* weight, bool mirrored, float* packed, int64_t begin,
               int64_t end);
  int64_t (*units)(const ConvPoolShape&);
  int64_t (*scratch_bytes)(const ConvPoolShape&);
  // Units [begin, end), output panels [out_begin, out_end). bias, code and kept may be null. not_finite [N],
  // zeroed: becomes 1 for images that this algorithm cannot compute, because inf or NaN is among their
  // outputs.
  void (*run)(const ConvPoolShape&, const T* x, const float* packed, const float* bias, T* y, uint8_t* code,
              T* kept, uint8_t* not_finite, void* scratch, int64_t begin, int64_t end, int64_t out_begin,
              int64_t out_end);
  // Null unless panels are of one size, and going over the input again for each costs little: those can be
  // packed one by one. streams: whether the weights of a call are better packed in passing; stream: all units
  // of such a call, each weight packed right where it is used.
  bool (*streams)(const ConvPoolShape&) = nullptr;
  void (*stream)(const ConvPoolShape&, const T* x, const T* weight, bool mirrored, const float* bias, T* y,
                 uint8_t* code, T* kept, uint8_t* not_finite, void* scratch, int64_t out_begin,
                 int64_t out_end) = nullptr;
  // Null unless pixels of kImagesAcross images can go through the kernel together, as one unit, which
  // s.across asks for. The part of its vectors that pixels of one image fill, 1 where images cannot go
  // together. Both ways give the same bits.
  double (*fill)(const ConvPoolShape&) = nullptr;
};
constexpr int64_t kImagesAcross = 16;

// Winograd's F(ExE, 3x3): float, 3x3 kernels, stride, dilation and groups 1, windows of 1 or 2 along each
// dimension, side by side and unpadded.
struct WinogradKernels {
  PanelForward<float> of_2, of_4;  // by E

  // The gradient of the map from (grad_y, code): rows [begin, end) of all its planes, or of all images if
  // channels are last.
  void (*unpool)(const ConvPoolShape&, const float* grad_y, const uint8_t* code, float* grad_map,
                 int64_t begin, int64_t end);

  // Gradients of weight and bias where there is no pool, by E = 2: each call adds into a zeroed partial of
  // its own. x and grad [N, K, conv] in the shape's order; units and output panels as those of the forward.
  // The reduction works on outputs [begin, end) and tells whether all of its results are finite.
  int64_t (*weight_partial_size)(const ConvPoolShape&);
  int64_t (*weight_scratch_bytes)(const ConvPoolShape&);
  void (*weight)(const ConvPoolShape&, const float* x, const float* grad, float* partial, void* scratch,
                 int64_t begin, int64_t end, int64_t out_begin, int64_t out_end);
  bool (*weight_reduce)(const ConvPoolShape&, const float* partials, int64_t count, float* grad_weight,
                        float* grad_bias, int64_t begin, int64_t end);
};

struct ConvPoolKernels {
  ConvPoolKernelsOf<float> f32;
  ConvPoolKernelsOf<double> f64;
  WinogradKernels winograd;
};

extern const ConvPoolKernels conv_pool_baseline, conv_pool_avx2, conv_pool_avx512;

// The gradients of a convolution without a pool as products of matrices on tile registers, of a batch whole
// or part by part. What they read more than once is parted beforehand, into memory that the host provides.
// grad_y passes where code is 0, or everywhere if that is null. Both tell whether their results are finite;
// if not, this algorithm cannot compute them.
struct TilesGradients {
  // Of weight and bias: x by images [begin, end), grad_y by tiles of 16 outputs, whose sum is added to
  // grad_bias unless that is null. Then panels [begin, end) of columns (taps and channels), at tiles
  // [out_begin, out_end) of outputs; written with the last part.
  struct Part {
    bool first, last;
    float* kept;         // sums from part to part, of weight_sums numbers; null for one part alone
    int64_t begin, end;  // steps of 32 pixels of this batch
  };
  int64_t (*weight_panels)(const ConvPoolShape&);
  int64_t (*weight_sums)(const ConvPoolShape&);
  int64_t (*weight_input_bytes)(const ConvPoolShape&);
  int64_t (*weight_map_bytes)(const ConvPoolShape&);
  int64_t (*weight_scratch_bytes)(const ConvPoolShape&);
  void (*weight_part_input)(const ConvPoolShape&, const float* x, void* input, int64_t begin, int64_t end);
  void (*weight_part_map)(const ConvPoolShape&, const float* grad_y, const uint8_t* code, void* map,
                          float* grad_bias, int64_t begin, int64_t end);
  bool (*weight)(const ConvPoolShape&, const void* input, const void* map, const Part& part,
                 float* grad_weight, void* scratch, int64_t begin, int64_t end, int64_t out_begin,
                 int64_t out_end);

  // Of x: grad by tiles [begin, end) of all pixels, then units [begin, end) of channels in groups
  // [group_begin, group_end) of images.
  int64_t (*input_units)(const ConvPoolShape&);
  int64_t (*input_groups)(const ConvPoolShape&);
  int64_t (*input_map_tiles)(const ConvPoolShape&);
  int64_t (*input_map_bytes)(const ConvPoolShape&);
  int64_t (*input_scratch_bytes)(const ConvPoolShape&);
  void (*input_part_map)(const ConvPoolShape&, const float* grad_y, const uint8_t* code, void* map,
                         int64_t begin, int64_t end);
  bool (*input)(const ConvPoolShape&, const float* weight, const void* map, float* grad_x, void* scratch,
                int64_t begin, int64_t end, int64_t group_begin, int64_t group_end);
};

// On tile registers, groups 1: float as three bfloat16 parts, directly and by Winograd's algorithm, and
// bfloat16.
struct ConvPoolTiles {
  PanelForward<float> f32, columns;
  PanelForward<float> winograd_of_2, winograd_of_4;
  PanelForward<uint16_t> bf16, columns_bf16;
  TilesGradients gradients;
};
extern const ConvPoolTiles conv_pool_amx;

}  // namespace cnnrnn
