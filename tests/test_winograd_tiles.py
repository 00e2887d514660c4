"""The Winograd kernels' own source for 512-bit vectors, run on any machine, against plain loops."""

import platform

import pytest
from _kernel_program import run_kernel_program


@pytest.mark.parametrize(
    ("defines", "vector"),
    [(["-DCNNRNN_EMULATE_512", "-DCNNRNN_EMULATE_AMX"], 64), ([], None), (["-mno-avx"], 16)],
    ids=["512", "own", "baseline"],
)
def test_tiles(compiled, tmp_path, defines, vector):
    """Every pool, layout, padding and hanging window at the edges of memory, in two slices."""
    if "-mno-avx" in defines and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not x86: its own vectors are as short")
    bytes_, checks = run_kernel_program("winograd_tiles", tmp_path, defines, wide="-mno-avx" not in defines)
    assert vector in (None, bytes_)
    assert checks > 10**5
