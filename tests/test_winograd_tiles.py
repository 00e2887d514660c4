"""The Winograd kernels' own source for 512-bit vectors, run on any machine, against plain loops."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from cnnrnn_ext import _library

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=gnu++17", "-O0", "-w", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


@pytest.mark.parametrize(
    ("defines", "vector"),
    [(["-DCNNRNN_EMULATE_512"], 64), ([], None), (["-mno-avx"], 16)],
    ids=["512", "own", "baseline"],
)
def test_tiles(compiled, tmp_path, defines, vector):
    """Every pool, layout, padding and hanging window at the edges of memory, in two slices."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]}")
    wide = [] if _library.build_module().best_isa() == "baseline" else ["-mavx2", "-mfma"]
    if "-mno-avx" in defines:
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("not x86: its own vectors are as short")
        wide = []
    program = tmp_path / "winograd_tiles"
    includes = [f"-I{ROOT / 'csrc' / 'cpu'}", f"-I{ROOT / 'tests'}"]
    source = ROOT / "tests" / "winograd_tiles.cpp"
    command = [*compiler, *FLAGS, *wide, *defines, *includes, source, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}"
    last = done.stdout.splitlines()[-1]
    assert vector is None or last.startswith(f"{vector}-byte vectors")
    assert last.endswith(" 0 failures")
    assert int(last.split()[2]) > 10**5
