"""The recurrent kernels' own source for 512-bit vectors, run on any machine, against plain loops."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cnnrnn_ext import _library

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=gnu++17", "-O0", "-w", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def test_tiles_of_512_bits(compiled, tmp_path):
    """Every cell and product: each tile height, whole and partial panels, packed, direct, narrow weights.

    Optimisation off: two thirds of the time go into compiling. rnn_tiles.cpp has its own oracle and counts.
    """
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    wide = [] if _library.build_module().best_isa() == "baseline" else ["-mavx2", "-mfma"]
    program = tmp_path / "rnn_tiles"
    source = ROOT / "tests" / "rnn_tiles.cpp"
    command = [
        *compiler,
        *FLAGS,
        *wide,
        "-DCNNRNN_EMULATE_512",
        "-DCNNRNN_EMULATE_AMX",
        f"-I{ROOT / 'csrc' / 'cpu'}",
        source,
        "-o",
        program,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("64-byte vectors")
    assert last.endswith(" 0 failures")
    assert int(last.split()[2]) > 10**6
