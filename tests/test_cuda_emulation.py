"""The CUDA sources, host files and kernels, run on the CPU: see tests/cuda_emulation/emulator.h.

What passes here is "emulated": logic, indexing, barriers and bounds. Nothing is said about a GPU's alignment
rules, resource limits, fast-math instructions or speed.
"""

import re

import pytest
import torch


@pytest.fixture
def library(emulation):
    return emulation


# Here the emulator itself; the families: test_cuda_emulation_*.py.

PLANTED = {
    "missing barrier": (0, "race|uninitialised"),
    "state kept once": (1, "race"),
    "half a block waits": (2, "deadlock in block .*: 48 of 96 threads wait at planted_bugs.cu:"),
    "two barriers": (3, "divergent block barriers"),
    "past a tensor": (4, "write out of bounds"),
    "past shared memory": (5, "write out of bounds"),
    "never written": (6, "uninitialised read in shared memory, byte 20"),
    "blocks collide": (7, "race .* in tensor 0, byte 0"),
    "cluster swaps early": (8, "race|uninitialised|block that has not begun"),
    "cluster returns early": (9, "access to a block that has returned"),
    "misaligned": (10, "misaligned access"),
    "copy not waited for": (11, "uninitialised read in shared memory"),
    "copy over a reader": (12, "race|uninitialised"),
    "mma as a barrier": (13, "race|uninitialised"),
    "pair swaps": (14, "race|uninitialised"),
    "push is not awaited": (15, "race|uninitialised"),
    "push is miscounted": (16, "deadlock .* 192 of 192 threads wait at planted_bugs.cu:"),
    "flag too early": (17, "race .* in tensor 0"),
    "flag is not awaited": (18, "race .* in tensor 0"),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_reported(library, bug, seed):
    which, pattern = PLANTED[bug]
    library.emulator_seed(seed)

    def run(sound):
        data = torch.arange(192, dtype=torch.int32)
        data[-1] = 0  # a flag
        return library.run_planted(which, data.data_ptr(), sound).decode()

    assert not run(True)
    report = run(False)
    assert re.search(pattern, report), report


def test_sound_kernel_computes(library):
    data = torch.arange(192, dtype=torch.int32)
    assert not library.run_planted(0, data.data_ptr(), True)
    assert torch.equal(data, torch.arange(192, dtype=torch.int32).view(2, 96).roll(-1, 1).flatten())


@pytest.mark.parametrize("loaded", [False, True], ids=["by words", "by load_matrices"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_matrix_fragments(library, dtype, loaded):
    """D = A B from fragments as primitives_mma.cuh lays them out; float32 as TF32, exact for few bits."""
    depth = 8 if dtype == torch.float32 else 16
    a, b = torch.randint(-9, 10, (16, depth)).to(dtype), torch.randint(-9, 10, (8, depth)).to(dtype)
    d = torch.full((16, 8), float("nan"))
    which = [torch.float16, torch.bfloat16, torch.float32].index(dtype)
    assert not library.run_fragments(which, a.data_ptr(), b.data_ptr(), d.data_ptr(), loaded)
    assert torch.equal(d, a.float() @ b.float().T)


def test_transposed_load(library):
    """load_matrices_transposed reads the fragment of A from a matrix stored by columns."""
    a, b = torch.randint(-9, 10, (16, 16)).half(), torch.randint(-9, 10, (8, 16)).half()
    d = torch.full((16, 8), float("nan"))
    columns = a.T.contiguous()
    assert not library.run_fragments(3, columns.data_ptr(), b.data_ptr(), d.data_ptr(), True)
    assert torch.equal(d, a.float() @ b.float().T)
