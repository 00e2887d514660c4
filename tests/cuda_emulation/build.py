"""Builds the emulation: the CUDA sources and the emulator, compiled by the C++ compiler into one library.

The operators appear as ``torch.ops.cnnrnn_emulated.*``: the CUDA host files and kernels, on CPU tensors.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_emulation"

HOST = ["cuda/conv_pool_cuda.cpp", "cuda/rnn_cuda.cpp"]
KERNELS = sorted(f"cuda/{path.name}" for path in (ROOT / "cuda").glob("*_kernels.cu"))
KERNELS += [f"tests/cuda_emulation/{name}.cu" for name in ("fragments", "planted_bugs")]
EMULATOR = [
    f"tests/cuda_emulation/{name}.cpp"
    for name in (
        "async_copies",
        "collectives",
        "emulator",
        "launches",
        "memory_checks",
        "operators",
        "tensor_cores",
    )
]


def build():
    """Compiles what changed; returns the library's path. Raises CalledProcessError if a compiler fails."""
    torch_root = Path(torch.__file__).parent
    includes = [f"-I{ROOT / folder}" for folder in ("cuda", "csrc", "tests/cuda_emulation")]
    includes += [f"-isystem {torch_root / sub}" for sub in ("include", "include/torch/csrc/api/include")]
    flags = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-g1", "-DCNNRNN_EMULATE", *includes]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    # Kernels only: each of their loads and stores becomes a call into memory_checks.cpp.
    checked = ["-O1", "-fsanitize=thread", "-x c++", "-Wno-tsan"]
    cxx = os.environ.get("CXX", "g++")
    library = BUILD / "cuda_emulation.so"
    lines = [
        f"rule compile\n  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared -Wl,-z,defs $in -o $out -L{torch_root / 'lib'} -ltorch_cpu",
    ]
    objects = []
    for source in [*HOST, *KERNELS, *EMULATOR]:
        special = checked if source in KERNELS else ["-O2" if source in EMULATOR else "-O1"]
        objects.append(f"{Path(source).name}.o")
        lines.append(f"build {objects[-1]}: compile {ROOT / source}\n  flags = {' '.join(flags + special)}")
    lines.append(f"build {library}: link {' '.join(objects)}")
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulation did not compile:\n{done.stdout[-8000:]}")
    return library


def missing():
    """Why the emulation cannot be built here, or None."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    return None if shutil.which(compiler) else f"{compiler} not found"
