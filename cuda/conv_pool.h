// The CUDA kernels of conv_pool as the host file sees them: raw pointers, sizes, a stream. No torch.
// Every launcher enqueues on `stream` and returns at once; errors throw std::runtime_error.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace cnnrnn::cuda {

struct Size2 {
  int h, w;
  friend constexpr bool operator==(Size2 a, Size2 b) { return a.h == b.h && a.w == b.w; }
};

enum class Activation { kNone, kRelu, kRelu6, kLeakyRelu, kTanh, kSigmoid, kElu, kSilu, kGelu };
constexpr const char* kActivationNames[] = {"none",    "relu", "relu6", "leaky_relu", "tanh",
                                            "sigmoid", "elu",  "silu",  "gelu"};

// Whether it falls somewhere: its derivative does not follow from its value.
constexpr bool falls(Activation a) { return a == Activation::kSilu || a == Activation::kGelu; }

// y [n, k, out] = max_pool(activation(conv(x [n, c, in], weight [k, c/groups, kernel]) + bias [k]))
struct ConvPoolShape {
  int n, c, k, groups;
  Size2 in, kernel, stride, padding, dilation;
  Size2 conv;  // size of the map between convolution and pooling
  Size2 pool, pool_stride, pool_padding;
  Size2 out;
  Activation activation;
};

// A tensor [N, C, H, W] of any strides (in elements).
struct Map {
  void* data;
  int64_t n, c, h, w;
};

constexpr uint8_t kNoGradient = 255;  // a code: no position of this window has a gradient

// What a forward writes, maps [n, k, out]. The data of code and kept may be null.
struct ConvPoolResults {
  Map y;
  Map code;  // which position of its window won
  Map kept;  // the winner before its activation
};

// ---- forward ----
void conv_pool_forward(DType, const ConvPoolShape&, Map x, const void* weight, const void* bias,
                       const ConvPoolResults&, void* stream);

// ---- the same on tensor cores: kHalf, kBFloat16, and kFloat as TF32 ----
// Whether these kernels cover a convolution, on the current device; also the backward ones below.
bool conv_pool_tensor_covers(const ConvPoolShape&);
// Whether x must have its channels in units of 16 bytes (conv_pool_has_units), or may have any strides.
bool conv_pool_tensor_reads_units(DType, const ConvPoolShape&);
bool conv_pool_tensor_grad_weight_reads_units(const ConvPoolShape&);
int64_t conv_pool_tensor_forward_workspace(DType, const ConvPoolShape&);  // bytes, 16-byte aligned
void conv_pool_tensor_forward(DType, const ConvPoolShape&, Map x, const void* weight, const void* bias,
                              const ConvPoolResults&, void* workspace, void* stream);

// Whether the channels of a map are adjacent, and every `of_unit` of them one aligned access.
bool conv_pool_has_units(int element_bytes, const Map&, int of_unit);
// A copy of a map [n, c, size] that has, the channels of each group padded with zeros to whole units.
Map conv_pool_pack_units(int element_bytes, const Map&, int n, int c, int groups, Size2 size, int of_unit,
                         void* memory, void* stream);

// ---- backward ----
// grad [n, k, size]: grad_y times the derivative of the activation, from what its forward kept.
void conv_pool_activation_gradient(DType, const ConvPoolShape&, Map grad_y, Map kept, Map grad, void* stream);

// grad_x is written whole. grad [n, k, out], of the winners before their activation.
void conv_pool_grad_x(DType, const ConvPoolShape&, Map grad, Map code, const void* weight, Map grad_x,
                      void* stream);

// Elements (of double for kDouble, else of float) of the workspace of conv_pool_grad_weight.
int64_t conv_pool_grad_weight_workspace(const ConvPoolShape&);

// grad_weight [k, c/groups, kernel] and grad_bias [k]; either may be null.
void conv_pool_grad_weight(DType, const ConvPoolShape&, Map grad, Map code, Map x, void* workspace,
                           void* grad_weight, void* grad_bias, void* stream);

// ---- the same on tensor cores, kFloat as TF32: grad and code have units of as many channels as 16 bytes of
// grad hold; x too, where conv_pool_tensor_grad_weight_reads_units() ----
int64_t conv_pool_tensor_grad_x_workspace(DType, const ConvPoolShape&);  // bytes, 16-byte aligned
void conv_pool_tensor_grad_x(DType, const ConvPoolShape&, Map grad, Map code, const void* weight, Map grad_x,
                             void* workspace, void* stream);
int64_t conv_pool_tensor_grad_weight_workspace(DType, const ConvPoolShape&);  // floats
void conv_pool_tensor_grad_weight(DType, const ConvPoolShape&, Map grad, Map code, Map x, void* workspace,
                                  void* grad_weight, void* grad_bias, void* stream);

// ---- average pools ----
// Average pooling by itself: y [n, k, out] of the map [n, k, conv], activated first if its activation falls.
// The divisor is torch's, which counts the pool's padding and no more.
void conv_pool_average(DType, const ConvPoolShape&, Map map, Map y, void* stream);

// grad_map [n, k, conv], before the activation. kept: the map; unused where there is no activation.
void conv_pool_spread(DType, const ConvPoolShape&, Map grad_y, Map kept, Map grad_map, void* stream);

}  // namespace cnnrnn::cuda
