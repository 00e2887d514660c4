// How the gate arithmetic is inlined into kernels for either device.
#pragma once

#if defined(__CUDACC__)
#define CNNRNN_GATES_INLINE __host__ __device__ __forceinline__
#else
#define CNNRNN_GATES_INLINE inline __attribute__((always_inline))
#endif
