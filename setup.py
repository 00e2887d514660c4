"""Build of cnnrnn_ext: which libraries, from which sources, with which flags.

Three libraries, each optional:

    _ops_cpu    C++ operators, torch's stable ABI      needs a C++ compiler and an importable torch
    _ops_cuda   CUDA operators, torch's stable ABI     needs nvcc too
    _C          build information                      needs pybind11

Without a compiler or torch the package is pure Python and says so. Environment switches:

    CNNRNN_REQUIRE_EXT=1      what cannot be compiled is an error, not a warning
    CNNRNN_CUDA=0|1           default: on if nvcc is found and torch is a CUDA build
    TORCH_CUDA_ARCH_LIST      default: "8.0;9.0a"
    CXX, NVCC, CXXFLAGS       compilers and extra flags
    MAX_JOBS                  parallel compilations
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = "cnnrnn_ext"
VERSION = re.search(r'__version__ = "(.*?)"', (ROOT / PACKAGE / "_version.py").read_text())[1]

# Oldest torch whose stable ABI the libraries use; they load under this one and every later one.
TORCH_TARGET = (2, 10)

COMMON_FLAGS = ["-std=gnu++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Contraction to FMA is asked for by name: ISO modes of some compilers switch it off.
KERNEL_FLAGS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
AVX512_FLAGS = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mbmi2 -mprefer-vector-width=512"
ISA_SOURCES = {  # one source a set: the same kernels, compiled once for each
    "csrc/cpu/isa_baseline.cpp": [],
    "csrc/cpu/isa_avx2.cpp": ["-mavx2", "-mfma", "-mbmi2"],
    "csrc/cpu/isa_avx512.cpp": AVX512_FLAGS.split(),
    "csrc/cpu/isa_amx.cpp": AVX512_FLAGS.split(),
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

CPU_SOURCES = ["csrc/ops.cpp", "csrc/conv_pool_cpu.cpp", "csrc/rnn_cpu.cpp", "csrc/cpu/capability.cpp"]
CUDA_HOST_SOURCES = ["cuda/conv_pool_cuda.cpp", "cuda/rnn_cuda.cpp"]
CUDA_KERNEL_SOURCES = [
    f"cuda/{name}_kernels.cu"
    for name in (
        "conv_pool",
        "conv_pool_tensor",
        "conv_pool_tensor_grad",
        "conv_pool_tensor_gather",
        "conv_pool_tensor_gather_grad",
        "rnn",
        "rnn_tensor_forward",
        "rnn_tensor_backward",
        "rnn_tensor_step",
    )
]
INFO_SOURCES = ["csrc/module.cpp", "csrc/cpu/capability.cpp"]


def flag(name):
    return os.environ.get(name, "").strip().lower() in ("1", "on", "true", "yes")


def find_tools():
    """The compilers and torch, or the reason why nothing can be compiled."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        return None, "no C++ compiler found (g++, clang++, c++, or the one named by CXX)"
    if importlib.util.find_spec("torch") is None:
        return None, (
            "torch cannot be imported in the build environment; "
            "build into your own torch with: "
            "pip install 'setuptools>=77' ninja pybind11 && pip install --no-build-isolation ."
        )
    for module in ("ninja", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return None, f"{module} is missing in the build environment: pip install ninja pybind11"
    try:
        import torch
    except (ImportError, OSError) as error:
        return None, f"the installed torch cannot be imported: {error}"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_TARGET:
        return None, f"torch {torch.__version__} is older than {TORCH_TARGET[0]}.{TORCH_TARGET[1]}"
    return {"cxx": compiler, "torch": torch}, None


def find_cuda(torch):
    """(path of nvcc, None), or (None, the reason why CUDA is not built)."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    wish = os.environ.get("CNNRNN_CUDA", "").strip()
    if wish == "0":
        return None, "switched off by CNNRNN_CUDA=0"
    if nvcc is None or shutil.which(nvcc) is None:
        if wish == "1":
            raise RuntimeError("CNNRNN_CUDA=1, but nvcc was not found (PATH or NVCC)")
        return None, "nvcc not found"
    if wish != "1" and torch.version.cuda is None:
        return None, "this torch is a CPU build (CNNRNN_CUDA=1 compiles the CUDA library all the same)"
    return nvcc, None


def gencode_flags():
    flags = []
    for arch in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0a"):
        number = arch.replace(".", "").replace("+PTX", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Ninja:
    """Writes one build.ninja: incremental, parallel, headers tracked, flags of their own per source."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []
        folder.mkdir(parents=True, exist_ok=True)

    def rule(self, name, command, **more):
        self.lines.append(f"rule {name}\n  command = {command}")
        self.lines += [f"  {key} = {value}" for key, value in more.items()]

    def compile(self, rule, source, library, flags):
        target = f"{library}/{source}.o"
        self.lines.append(f"build {target}: {rule} {self.path(ROOT / source)}")
        self.lines.append(f"  flags = {self.quoted(flags)}")
        return target

    def link(self, rule, output, objects, flags):
        self.lines.append(f"build {self.path(output)}: {rule} {' '.join(objects)}")
        self.lines.append(f"  flags = {self.quoted(flags)}")

    @staticmethod
    def path(path):
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    @staticmethod
    def quoted(flags):
        return shlex.join(map(str, flags)).replace("$", "$$")

    def run(self):
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.call([sys.executable, "-m", "ninja", "-C", str(self.folder), *jobs]):
            raise RuntimeError("compilation failed; pip install -v shows the compiler's messages")


class BuildLibraries(build_ext):
    """Compiles the libraries with ninja; on failure leaves a pure-Python package and one warning."""

    def run(self):
        status = {"version": VERSION, "cpu": None, "cuda": None}
        try:
            tools, reason = find_tools()
            if tools is None:
                raise RuntimeError(reason)
            status["cuda"] = self.compile_all(tools)
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            if flag("CNNRNN_REQUIRE_EXT"):
                raise
            self.remove_outputs(keep=())
            status["cpu"] = str(error)
            status["cuda"] = "the C++ library was not built"
            warnings.warn(
                f"{PACKAGE} is installed without compiled kernels and will run on plain PyTorch: {error}",
                stacklevel=1,
            )
        self.package_folder().mkdir(parents=True, exist_ok=True)
        (self.package_folder() / "_build.json").write_text(json.dumps(status, indent=2) + "\n")

    def package_folder(self):
        return ROOT / PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE

    def get_source_files(self):
        """What a source distribution needs to compile from."""
        files = (path for folder in ("csrc", "cuda") for path in (ROOT / folder).rglob("*"))
        return sorted(str(path.relative_to(ROOT)) for path in files if path.is_file())

    def remove_outputs(self, keep):
        """Removes libraries of an earlier build that this one does not make: a stale one would be loaded."""
        for path in map(Path, self.get_outputs()):
            if path.name not in keep:
                path.unlink()

    def get_outputs(self):
        return [str(path) for path in self.package_folder().glob("_*.so")]

    def compile_all(self, tools):
        """Compiles everything; returns why CUDA was left out, or None."""
        import pybind11

        torch, cxx = tools["torch"], tools["cxx"]
        nvcc, no_cuda = find_cuda(torch)
        torch_root = Path(torch.__file__).parent
        target = (TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)
        ops_flags = [
            *("-isystem", torch_root / "include"),
            *("-isystem", torch_root / "include/torch/csrc/api/include"),
            f"-DTORCH_TARGET_VERSION=0x{target:016x}ULL",
            f"-I{ROOT}/csrc",
        ]
        user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        out = self.package_folder().resolve()

        # One folder for every in-place build, pip's editable install included: each stays incremental.
        folder = ROOT / "build/inplace" if out == ROOT / PACKAGE else Path(self.build_temp).resolve()
        ninja = Ninja(folder / f"ninja-{sys.implementation.cache_tag}")
        names = []
        ninja.rule(
            "cxx",
            f"{cxx} -MMD -MF $out.d $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="CXX $in",
        )
        ninja.rule("link", f"{cxx} -shared $in -o $out $flags", description="LINK $out")

        def library(name, sources, flags, link_flags, extra=(), link="link"):
            names.append(f"{name}.so")
            objects = [
                ninja.compile("cxx", s, name, [*COMMON_FLAGS, *flags, *ISA_FLAGS.get(s, []), *user_flags])
                for s in sources
            ]
            ninja.link(link, out / f"{name}.so", [*objects, *extra], link_flags)

        ISA_FLAGS = {
            source: KERNEL_FLAGS + (flags if IS_X86 else []) for source, flags in ISA_SOURCES.items()
        }
        isa_sources = [s for s in ISA_SOURCES if IS_X86 or s.endswith("isa_baseline.cpp")]
        torch_link = [f"-L{torch_root}/lib", "-ltorch_cpu"]
        library("_ops_cpu", CPU_SOURCES + isa_sources, ops_flags, torch_link)

        python_include = Path(sysconfig.get_paths()["include"])
        if (python_include / "Python.h").exists():  # systems may package it apart; the operators need none
            said = subprocess.check_output([*cxx.split(), "--version"], text=True)
            compiler_name = next(iter(said.splitlines()), cxx)
            defines = {
                "CNNRNN_VERSION": VERSION,
                "CNNRNN_COMPILER": compiler_name,
                "CNNRNN_TORCH_VERSION": torch.__version__,
                "CNNRNN_TORCH_TARGET": ".".join(map(str, TORCH_TARGET)),
            }
            info_flags = [
                f"-I{pybind11.get_include()}",
                *("-isystem", python_include),
                *(f'-D{key}="{value}"' for key, value in defines.items()),
            ]
            info_name = "_C" + sysconfig.get_config_var("EXT_SUFFIX").removesuffix(".so")
            library(info_name, INFO_SOURCES, info_flags, [])

        if nvcc:
            ninja.rule(
                "nvcc",
                f"{nvcc} -ccbin {cxx} -MD -MF $out.d $flags -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="NVCC $in",
            )
            # nvcc links, because it knows where its libraries are. cudart goes in statically: the library
            # brings its own and shares torch's driver context.
            ninja.rule("nvlink", f"{nvcc} -ccbin {cxx} -shared -cudart static $in -o $out $flags")
            nvcc_flags = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", f"-I{ROOT}/csrc"]
            nvcc_flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode_flags()]
            kernels = [ninja.compile("nvcc", s, "_ops_cuda", nvcc_flags) for s in CUDA_KERNEL_SOURCES]
            host_flags = [*ops_flags, f"-I{ROOT}/cuda"]
            library("_ops_cuda", CUDA_HOST_SOURCES, host_flags, torch_link, extra=kernels, link="nvlink")
        out.mkdir(parents=True, exist_ok=True)
        self.remove_outputs(keep=names)
        ninja.run()
        return no_cuda


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(
    version=VERSION,
    distclass=BinaryDistribution,
    ext_modules=[Extension(f"{PACKAGE}._ops_cpu", [])],  # sources and flags: BuildLibraries
    cmdclass={"build_ext": BuildLibraries},
)
