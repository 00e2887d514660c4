// Element types of the CUDA launchers.
#pragma once

namespace cnnrnn::cuda {

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

}  // namespace cnnrnn::cuda
