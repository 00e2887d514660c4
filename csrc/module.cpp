// pybind11 module `_C`: what was built and what this machine can run. Never a tensor: it includes no
// torch header, so it loads under every torch.

#include <pybind11/pybind11.h>

#include "cpu/capability.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of cnnrnn_ext.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = CNNRNN_VERSION;
        info["compiler"] = CNNRNN_COMPILER;
        info["torch_built_with"] = CNNRNN_TORCH_VERSION;
        info["torch_minimum"] = CNNRNN_TORCH_TARGET;
        info["cpp_standard"] = static_cast<long>(__cplusplus);
        return info;
      },
      "Versions this library was compiled with.");
  m.def(
      "best_isa", [] { return cnnrnn::isa_name(cnnrnn::best_isa()); },
      "Widest instruction set of this machine that the kernels support.");
  m.def(
      "active_isa", [] { return cnnrnn::isa_name(cnnrnn::active_isa()); },
      "Instruction set the kernels use; CNNRNN_CPU_ISA overrides it.");
}
