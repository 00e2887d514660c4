"""Compiles and runs a C++ test of the kernels' own source, which has an oracle of its own and counts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cnnrnn_ext import _library

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=gnu++17", "-O0", "-w", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def run_kernel_program(name, folder, defines, wide=True):
    """(bytes of a vector, checks made) of tests/NAME.cpp; fails unless all of them passed.

    Args:
        defines: compiler flags, such as what to emulate.
        wide: with AVX2 where the machine has it.
    """
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    isa = ["-mavx2", "-mfma"] if wide and _library.build_module().best_isa() != "baseline" else []
    program = folder / name
    includes = [f"-I{ROOT / 'csrc' / 'cpu'}", f"-I{ROOT / 'tests'}"]
    source = ROOT / "tests" / f"{name}.cpp"
    command = [*compiler, *FLAGS, *isa, *defines, *includes, source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}"
    last = done.stdout.splitlines()[-1]  # "64-byte vectors: 1234 checks, 0 failures"
    assert last.endswith(" 0 failures")
    return int(last.split("-")[0]), int(last.split()[2])
