// What the CUDA host files share: device, stream, element types, pointers for kernels.
// With CNNRNN_EMULATE the operators run on CPU tensors, for the tests (see tests/cuda_emulation).
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "dtype.h"
#include "tensor.h"

#ifdef CNNRNN_EMULATE
#include "emulator.h"
#define CNNRNN_OPERATORS cnnrnn_emulated
#define CNNRNN_DISPATCH_KEY CPU
#else
#include <dlfcn.h>
#define CNNRNN_OPERATORS cnnrnn_ext
#define CNNRNN_DISPATCH_KEY CUDA
#endif

namespace cnnrnn::cuda {

#ifndef CNNRNN_EMULATE

// Torch's current stream. The getter exists only in CUDA builds of torch, and is looked up in the loaded
// library so that this one also loads under a CPU build.
inline void* current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const auto getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(getter != nullptr, "the installed torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return stream;
}

// For the life of this object the tensor's device is the current one. Kernels go to its current stream.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  void* const stream;
};

inline void announce(const Tensor&) {}

#else

class Device {
 public:
  explicit Device(const Tensor&) {}
  ~Device() { emulator::forget_memory(); }
  void* const stream = nullptr;
};

inline void announce(const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  int64_t bytes = 1;
  switch (t.scalar_type()) {
    case ScalarType::Double:
    case ScalarType::Long:
      bytes = 8;
      break;
    case ScalarType::Float:
    case ScalarType::Int:
      bytes = 4;
      break;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      bytes = 2;
      break;
    default:
      break;
  }
  emulator::announce_memory(t.const_data_ptr(), (last + 1) * bytes, bytes);
}

#endif

// The pointers kernels get: what a tensor holds, or null for one that is not there.
inline const void* input(const Tensor& t) {
  announce(t);
  return t.const_data_ptr();
}
inline const void* input(const OptionalTensor& t) { return t ? input(*t) : nullptr; }
inline void* output(const Tensor& t) {
  announce(t);
  return t.mutable_data_ptr();
}
inline void* output(const OptionalTensor& t) { return t ? output(*t) : nullptr; }

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      check(false, "x: the CUDA kernels take float32, float64, float16 and bfloat16, got ",
            torch::headeronly::toString(x.scalar_type()));
  }
  return DType::kFloat;
}

// The type of sums, and of workspaces.
inline ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor nothing(const Tensor& x) { return empty_like_of(x, {0}); }  // a gradient nobody asked for

}  // namespace cnnrnn::cuda
