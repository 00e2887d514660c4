"""The CUDA sources, host files and kernels, run on the CPU: see tests/cuda_emulation/emulator.h.

What passes here is "emulated": logic, indexing, barriers and bounds. Nothing is said about a GPU's alignment
rules, resource limits, fast-math instructions or speed.
"""

import re

import _cuda_cases as cases
import pytest
import torch
from _emulation import NO_SHARED_MEMORY, SM_80, SM_90, check_every_barrier_is_needed

from cnnrnn_ext.functional._schedule import describe_plan


@pytest.fixture
def library(emulation):
    return emulation


@pytest.fixture
def ops(emulated):
    return emulated


# ---- the emulator itself ----

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


def _every_schedule(library, ops):
    """Runs every recurrent kernel that has barriers, so that each of its loops goes round at least twice."""
    for device, case in (
        (SM_90, cases.Rnn(3, 5, 3, 9)),
        (SM_90, cases.Rnn(3, 2, 3, 130)),
        (SM_80, cases.Rnn(2, 5, 2, 150)),
    ):
        library.emulator_device(*device)
        operands = cases._convert(case.draw("lstm"), "cpu", torch.float32)
        cases.rnn_train_and_backward(ops, "lstm", cases.WHOLE, operands)
    for device, hidden in ((SM_90, 20), (SM_90, 70), (SM_80, 70)):  # a block, a cluster of 4, the grid
        library.emulator_device(*device)
        operands = cases._convert(cases.Rnn(5, 5, 3, hidden).draw("lstm"), "cpu", torch.bfloat16)
        cases.rnn_train_and_backward(ops, "lstm", cases.WHOLE, operands)


def test_every_barrier_is_needed(library, ops):
    """Without any one of the kernels' barriers the emulator reports a violation."""
    check_every_barrier_is_needed(library, lambda: _every_schedule(library, ops), at_least=15)


# ---- rnn ----

CELLS = tuple(cases.GATES)


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", cases.RNNS.values(), ids=cases.RNNS)
def test_rnn(ops, case, cell, dtype):
    cases.check_rnn(ops, "cpu", cell, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", ["odd", "few_rows", "many_rows", "lengths_over_a_cluster"])
def test_rnn_a_launch_a_step(library, ops, case, cell, dtype):
    """On a GPU without clusters more units than fit one block take a launch a step."""
    library.emulator_device(*SM_80)
    cases.check_rnn(ops, "cpu", cell, cases.RNNS[case], dtype)


@pytest.mark.parametrize("device", [SM_90, NO_SHARED_MEMORY], ids=["resident", "a launch a step"])
@pytest.mark.parametrize("rows", ["lengths", "reset", "lengths, reset", "packed", "packed, reset"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_rows(library, ops, cell, rows, device):
    library.emulator_device(*device)
    cases.check_rnn(ops, "cpu", cell, cases.Rnn(4, 6, 2, 9, d=2, rows=rows), torch.float64)


TENSOR_CORES = {  # of half types: (device, hidden_size)
    "a block": (SM_90, 20),
    "a cluster of 2": (SM_90, 37),
    "a cluster of 4": (SM_90, 70),
    "a cluster of 2, 12 warps a block": ((227 * 1024, 2, 132), 90),
    "a block of the grid": ((227 * 1024, 0, 132), 20),
    "the grid": (SM_80, 70),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("device", "hidden"), TENSOR_CORES.values(), ids=TENSOR_CORES)
def test_rnn_on_tensor_cores(library, ops, device, hidden, cell, rows, dtype):
    library.emulator_device(*device)
    directions = 1 if rows == "whole" else 2
    cases.check_rnn(ops, "cpu", cell, cases.Rnn(4, 18, 4, hidden, d=directions, rows=rows), dtype)


PLANS = [
    (SM_90, torch.bfloat16, 20, "forward: one block a tile, tensor cores"),
    (SM_90, torch.bfloat16, 128, "forward: clusters of 4, tensor cores"),
    ((227 * 1024, 16, 132), torch.float16, 512, "forward: clusters of 16, tensor cores"),
    (SM_80, torch.bfloat16, 128, "forward: groups of 4 blocks, tensor cores"),
    ((227 * 1024, 16, 132), torch.bfloat16, 1024, "forward: groups of 32 blocks, tensor cores"),
    (SM_80, torch.bfloat16, 4096, "forward: a launch a step"),
    (SM_90, torch.float32, 100, "forward: one block a tile"),
    (SM_90, torch.float64, 150, "forward: clusters of 8"),
    (SM_80, torch.float32, 150, "forward: a launch a step"),
]


@pytest.mark.parametrize(("device", "dtype", "hidden", "plan"), PLANS)
def test_plan(library, ops, device, dtype, hidden, plan):
    """The schedule is chosen by shape and by what the device can hold, and told in words."""
    library.emulator_device(*device)
    assert describe_plan(ops, "lstm", torch.empty(0, dtype=dtype), 16, hidden, 1, False) == plan


def test_plan_when_the_grid_is_full(library, ops):
    """Groups of the grid must run at once; clusters may follow each other."""
    library.emulator_device(*SM_80)
    x = torch.empty(0, dtype=torch.bfloat16)
    assert "groups of 4" in describe_plan(ops, "lstm", x, 16 * 27, 128, 1, False)
    assert "a launch a step" in describe_plan(ops, "lstm", x, 16 * 28, 128, 1, False)
    library.emulator_device(*SM_90)
    told = describe_plan(ops, "gru", x, 16 * 28, 128, 2, True)
    assert told == "forward: clusters of 4, tensor cores; backward: clusters of 4, tensor cores"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("device", "hidden"), TENSOR_CORES.values(), ids=TENSOR_CORES)
def test_tensor_cores_do_not_depend_on_the_schedule(library, ops, device, hidden, seed):
    torch.manual_seed(0)
    library.emulator_device(*device)
    case = cases.Rnn(6, 5, 2, hidden, d=2, rows="lengths, reset")
    operands = cases._convert(case.draw("gru"), "cpu", torch.bfloat16)
    first = cases.rnn_train_and_backward(ops, "gru", case.steps("cpu"), operands)
    library.emulator_seed(1 + seed)
    for a, b in zip(
        first, cases.rnn_train_and_backward(ops, "gru", case.steps("cpu"), operands), strict=True
    ):
        assert torch.equal(a, b)


def test_rnn_large_on_tensor_cores(ops):
    """More weights than registers hold, and in the backward more columns than a warp makes at a time."""
    cases.check_rnn(ops, "cpu", "lstm", cases.Rnn(2, 3, 2, 520), torch.bfloat16)


def test_rnn_lengths_out_of_bounds(ops):
    """The host does not look at lengths on a device; kernels keep within their rows."""
    case = cases.Rnn(4, 3, 2, 5)
    operands = cases._convert(case.draw("lstm"), "cpu", torch.float32)
    beyond, within = torch.tensor([9, -2, 3]), torch.tensor([4, 0, 3])
    got = cases.rnn_train_and_backward(ops, "lstm", (None, beyond, None), operands)
    want = cases.rnn_train_and_backward(ops, "lstm", (None, within, None), operands)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_rnn_many_packed_steps(ops):
    """batch_sizes travel in kernel arguments, some hundred at a time."""
    sizes = torch.tensor([3] * 450 + [2] * 100 + [1] * 360)
    case = cases.Rnn(len(sizes), 3, 1, 2)
    x, *rest = cases._convert(case.draw("rnn_tanh"), "cpu", torch.float64)
    padded = torch.zeros(len(sizes), 3, dtype=torch.bool)
    for t, size in enumerate(sizes):
        padded[t, :size] = True
    lengths = padded.sum(0)
    want, h_n, _ = ops.rnn("rnn_tanh", x, *rest, None, lengths, None)
    got, last, _ = ops.rnn("rnn_tanh", x[padded], *rest, sizes, None, None)
    assert torch.equal(got, want[padded])
    assert torch.equal(last, h_n)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", ["odd", "few_rows", "lengths"])
def test_rnn_missing_gradients(ops, case, cell):
    cases.check_rnn_parts(ops, "cpu", cell, cases.RNNS[case])


@pytest.mark.parametrize("device", [SM_90, SM_80], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", ["odd", "few_rows"])
def test_rnn_without_states(library, ops, case, cell, device):
    library.emulator_device(*device)
    cases.check_rnn_without_states(ops, "cpu", cell, cases.RNNS[case])


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "case", [cases.Rnn(1, 5, 4, 33), cases.Rnn(1, 3, 2, 7, bias=False)], ids=["bias", "no_bias"]
)
def test_cell(ops, case, cell, dtype):
    cases.check_cell(ops, "cpu", cell, case, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_rnn_layer(ops, cell):
    for case in (cases.Rnn(3, 4, 2, 5), cases.Rnn(3, 4, 2, 5, bias=False)):
        x, h_0, c_0, *weights = cases._convert(case.draw(cell), "cpu", torch.float32)
        single = [w[0] if w else None for w in weights]
        want = ops.rnn(cell, x, h_0, c_0, *weights, *cases.WHOLE)
        for got, theirs in zip(ops.rnn_layer(cell, x, h_0, c_0, *single), want, strict=True):
            assert torch.equal(got, theirs)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (2, 0)])
def test_rnn_empty(ops, steps, batch, states, cell):
    case = cases.Rnn(steps, batch, 4, 5)
    x, h_0, c_0, *weights = cases._convert(case.draw(cell), "cpu", torch.float32)
    given = (h_0, c_0) if states else (None, None)
    h_0, c_0 = (s if states or s is None else torch.zeros_like(s) for s in (h_0, c_0))
    operands = (x, *given, *weights)
    results, reserve = cases.rnn_train(ops, cell, cases.WHOLE, operands)
    output, h_n, c_n, cells = results
    assert output.shape == (steps, batch, 5)
    assert reserve.shape == (1, steps, batch, cases.KEPT[cell], 5)
    assert torch.equal(h_n, h_0)
    if c_0 is not None:
        assert torch.equal(c_n, c_0)
        assert cells.shape == output.shape
    ones = torch.ones_like(h_n)
    outer = (None, ones, None, None)
    grads = cases.rnn_backward(ops, cell, cases.WHOLE, outer, operands, results, reserve)
    assert torch.equal(grads[1], ones)
    assert not grads[2].any()
    assert not any(g.any() for group in grads[3:] for g in group)


def test_rnn_refuses(ops):
    x, h_0, c_0, *weights = cases._convert(cases.Rnn(2, 3, 4, 5).draw("lstm"), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=r"h_0: expected shape \[1, 3, 5\], got \[1, 3, 4\]"):
        ops.rnn("lstm", x, h_0[..., :4], c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected shape \[20, 3\], got \[20, 4\]"):
        ops.rnn("lstm", x[..., :3], h_0, c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected shape \[15, 4\], got \[20, 4\]"):
        ops.rnn("gru", x, h_0, None, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match="c_0: only lstm has one"):
        ops.rnn("gru", x, h_0, c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh: give both or neither"):
        ops.rnn("lstm", x, h_0, c_0, *weights[:3], [], *cases.WHOLE)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh: give both or neither"):
        ops.rnn_cell("lstm", x[0], h_0[0], c_0[0], *(w[0] for w in weights[:3]), None)
    with pytest.raises(
        RuntimeError, match="cell: expected 'lstm', 'gru', 'rnn_tanh' or 'rnn_relu', got 'LSTM'"
    ):
        ops.rnn("LSTM", x, h_0, c_0, *weights, *cases.WHOLE)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((torch.tensor([3, 3]), None, None), r"x: expected shape \[R, I\], got \[2, 3, 4\]"),
        ((None, torch.tensor([2, 1]), None), r"lengths: expected shape \[3\], got \[2\]"),
        ((None, torch.tensor([2.0, 1.0, 2.0]), None), "lengths: expected int64 on x's device"),
        ((None, None, torch.zeros(3, 2, dtype=torch.bool)), r"reset: expected shape \[2, 3\], got \[3, 2\]"),
        ((None, None, torch.zeros(2, 3)), "reset: expected bool on x's device"),
    ],
)
def test_rnn_refuses_rows(ops, steps, message):
    operands = cases._convert(cases.Rnn(2, 3, 4, 5).draw("lstm"), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=message):
        ops.rnn("lstm", *operands, *steps)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2, 3], "none larger than the one before, got 2 at step 1"),
        ([3, 2], "expected a sum of 6, the rows of x, got 5"),
    ],
)
def test_rnn_refuses_batch_sizes(ops, sizes, message):
    x, h_0, *rest = cases._convert(cases.Rnn(2, 3, 4, 5).draw("gru"), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=message):
        ops.rnn("gru", x.flatten(0, 1), h_0, *rest, torch.tensor(sizes), None, None)


@pytest.mark.parametrize(
    ("argument", "wrong", "expected"),
    [
        ("grad_cells", (2, 3, 6), "2, 3, 5"),
        ("cells", (1, 2, 3, 5), "2, 3, 5"),
        ("reserve", (1, 2, 3, 5, 5), "1, 2, 3, 4, 5"),
    ],
)
def test_rnn_backward_refuses(ops, argument, wrong, expected):
    operands = cases._convert(cases.Rnn(2, 3, 4, 5).draw("lstm"), "cpu", torch.float32)
    results, reserve = cases.rnn_train(ops, "lstm", cases.WHOLE, operands)
    spoiled = {"grad_cells": None, "cells": results[3], "reserve": reserve} | {argument: torch.zeros(wrong)}
    with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[{expected}\]"):
        cases.rnn_backward(
            ops, "lstm", cases.WHOLE, (None, None, None, spoiled["grad_cells"]), operands,
            [*results[:3], spoiled["cells"]], spoiled["reserve"],
        )  # fmt: skip


@pytest.mark.parametrize("argument", ["h_1", "c_1", "reserve"])
def test_cell_backward_refuses(ops, argument):
    made = {"h_1": torch.zeros(3, 5), "c_1": torch.zeros(3, 5), "reserve": torch.zeros(3, 4, 5)}
    made[argument] = torch.zeros(3, 5, 5)
    weights = (torch.zeros(20, 4), torch.zeros(20, 5), None, None)
    with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[3, .*5\], got \[3, 5, 5\]"):
        ops.rnn_cell_backward(
            None, None, "lstm", torch.zeros(3, 4), None, None, *weights, *made.values(), *cases.ALL
        )


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_the_schedule(library, ops, seed):
    torch.manual_seed(0)
    rnn = cases.RNNS["odd"]
    operands = {cell: cases._convert(rnn.draw(cell), "cpu", torch.float32) for cell in CELLS}

    def run():
        return [
            t for cell in CELLS for t in cases.rnn_train_and_backward(ops, cell, cases.WHOLE, operands[cell])
        ]

    first = run()
    library.emulator_seed(1 + seed)
    second = run()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
