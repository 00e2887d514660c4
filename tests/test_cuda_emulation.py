"""The CUDA sources, host files and kernels, run on the CPU: see tests/cuda_emulation/emulator.h.

What passes here is "emulated": logic, indexing, barriers and bounds. Nothing is said about a GPU's alignment
rules, resource limits, fast-math instructions or speed.
"""

import ctypes
import re
import sys
from dataclasses import replace
from pathlib import Path

import _cuda_cases as cases
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import build as emulation_build


@pytest.fixture(scope="module")
def library():
    reason = emulation_build.missing()
    if reason:
        pytest.skip(f"the emulation needs a C++ compiler: {reason}")
    path = emulation_build.build()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.run_planted.restype = ctypes.c_char_p
    library.run_planted.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_bool]
    library.run_fragments.restype = ctypes.c_char_p
    library.run_fragments.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_bool]
    library.emulator_device.argtypes = [ctypes.c_size_t, ctypes.c_bool]
    library.emulator_drop_barrier.argtypes = [ctypes.c_char_p]
    library.emulator_seen_barriers.restype = ctypes.c_char_p
    return library


SM_80, SM_90 = (163 * 1024, False), (227 * 1024, True)  # shared memory of a block, clusters


@pytest.fixture
def ops(library):
    library.emulator_seed(0)
    library.emulator_device(*SM_90)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's idle threads would spin beside the emulator's one
    yield torch.ops.cnnrnn_emulated
    torch.set_num_threads(threads)


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
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_reported(library, bug, seed):
    which, pattern = PLANTED[bug]
    library.emulator_seed(seed)
    data = torch.arange(192, dtype=torch.int32)
    assert not library.run_planted(which, data.data_ptr(), True)
    report = library.run_planted(which, data.data_ptr(), False).decode()
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


def _multi_chunk(library, ops):
    """Runs every kernel that has barriers, so that each of its loops goes round at least twice."""
    conv = [
        cases.Conv((2, 9, 24, 24), 3),
        cases.Conv((1, 9, 24, 24), 3, activation="silu"),
        cases.Conv((2, 9, 24, 24), 3, ceil_mode=True, pool=(3, 3)),
    ]
    for case in conv:
        x, weight, bias, grad_y = case.draw(cases.small_integers)
        cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, grad_y)
    for device, case in (
        (SM_90, cases.Lstm(3, 5, 3, 9)),
        (SM_90, cases.Lstm(3, 2, 3, 130)),
        (SM_80, cases.Lstm(2, 5, 2, 150)),
    ):
        library.emulator_device(*device)
        cases.lstm_train_and_backward(ops, cases._convert(case.draw(), "cpu", torch.float32))


def test_every_barrier_is_needed(library, ops):
    """Without any one of the kernels' barriers the emulator reports a violation."""
    library.emulator_seen_barriers()
    _multi_chunk(library, ops)
    sites = library.emulator_seen_barriers().decode().split()
    assert len(sites) >= 15, sites
    for site in sites:
        library.emulator_drop_barrier(site.encode())
        try:
            with pytest.raises(
                RuntimeError, match=r"emulation: (race|uninitialised|access to a block that has)"
            ):
                _multi_chunk(library, ops)
        except pytest.fail.Exception:
            pytest.fail(f"the barrier at {site} can be left out unnoticed")
        finally:
            library.emulator_drop_barrier(b"")


# ---- conv_pool2d ----


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CONVS.values(), ids=cases.CONVS)
def test_conv_pool_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cpu", case, dtype)


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("case", cases.ACTIVATED.values(), ids=cases.ACTIVATED)
def test_conv_pool_activations(ops, case, activation, dtype):
    cases.check_conv_activation(ops, "cpu", replace(case, activation=activation), dtype)


@pytest.mark.parametrize("activation", ["none", "relu", *cases.ACTIVATIONS])
@pytest.mark.parametrize("case", [n for n, case in cases.ACTIVATED.items() if case.kind == "max"])
def test_conv_pool_indices(ops, case, activation):
    cases.check_conv_indices(ops, "cpu", replace(cases.ACTIVATED[case], activation=activation))


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("pool", [(2, 2), (3, 3)], ids=["3x3 kernel", "general kernel"])
def test_conv_pool_nan_and_infinity(ops, activation, pool):
    cases.check_conv_nan(ops, "cpu", cases.Conv((2, 2, 13, 12), 3, activation=activation, pool=pool))


@pytest.mark.parametrize("case", ["odd", "overlapping_pool"])
def test_conv_pool_random(ops, case):
    case = cases.CONVS[case]
    x, weight, bias, grad_y = case.draw(cases.normal)
    y_got, _, *grads = cases.run_conv(ops, "cpu", case, torch.float64, x, weight, bias, grad_y)
    y = case.oracle(*(t.requires_grad_() for t in (x, weight, bias)))
    expected = (y, *cases.gradients(y, grad_y, (x, weight, bias)))
    for got, want in zip((y_got, *grads), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_conv_pool_any_strides(ops):
    case = cases.Conv((2, 3, 9, 8), 4)
    x, weight, bias, grad_y = case.draw(cases.small_integers)
    base = cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, grad_y)
    spread = torch.zeros(2, 3, 18, 16, dtype=torch.float64)[:, :, ::2, ::2].copy_(x)
    turned = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    expanded = grad_y[:, :1, :1, :1].expand_as(grad_y)
    got = cases.run_conv(ops, "cpu", case, torch.float32, spread, turned, bias, grad_y)
    for ours, want in zip(got, base, strict=True):
        assert torch.equal(ours, want)
    sums = cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, expanded)
    dense = cases.run_conv(ops, "cpu", case, torch.float32, x, weight, bias, expanded.contiguous())
    for ours, want in zip(sums, dense, strict=True):
        assert torch.equal(ours, want)


def test_conv_pool_empty_batch(ops):
    case = cases.Conv((0, 3, 9, 8), 4)
    y, code, grad_x, grad_weight, grad_bias = cases.run_conv(
        ops, "cpu", case, torch.float32, *case.draw(cases.normal)
    )
    assert y.shape == code.shape == (0, 4, 4, 4)
    assert grad_x.shape == (0, 3, 9, 8)
    assert not grad_weight.any()
    assert not grad_bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="tan"), "activation: expected 'none' or the name of an activation, got 'tan'"),
        (dict(kind="min"), "pool: the CUDA kernels cover 'max' and 'avg', got 'min'"),
        (dict(pool=(16, 16)), "pool_size: expected at most 255 positions, got 16x16"),
        (dict(padding=(-1, 0)), "padding: expected at least 0, got -1"),
        (dict(stride=(1, 0)), "stride: expected at least 1, got 0"),
        (dict(groups=2), "groups: expected a divisor of 3"),
        (dict(dilation=(9, 9)), "the kernel .19 with dilation. is larger than the padded input"),
        (dict(pool_padding=(2, 2)), "pool_padding: expected at most half"),
    ],
)
def test_conv_pool_refuses(ops, change, message):
    case = cases.Conv((1, 3, 9, 8), 4, **change)
    with pytest.raises(RuntimeError, match=message):
        ops.conv_pool2d(torch.zeros(1, 3, 9, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4), *case.arguments)


def test_conv_pool_refuses_shapes(ops):
    arguments = cases.Conv((1, 3, 9, 8), 4).arguments
    x, weight, bias = torch.zeros(1, 3, 9, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"x: expected shape \[N, C, H, W\], got \[3, 9, 8\]"):
        ops.conv_pool2d(x[0], weight, bias, *arguments)
    with pytest.raises(RuntimeError, match=r"weight: expected shape \[4, 3, 3, 3\], got \[4, 2, 3, 3\]"):
        ops.conv_pool2d(x, weight[:, :2], bias, *arguments)
    with pytest.raises(RuntimeError, match="weight and x must have the same dtype"):
        ops.conv_pool2d(x, weight.double(), bias, *arguments)
    with pytest.raises(RuntimeError, match="take float32, float64, float16 and bfloat16, got Int"):
        ops.conv_pool2d(x.int(), weight.int(), bias.int(), *arguments)


# ---- lstm ----


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.LSTMS.values(), ids=cases.LSTMS)
def test_lstm(ops, case, dtype):
    cases.check_lstm(ops, "cpu", case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["odd", "few_rows", "many_rows"])
def test_lstm_without_clusters(library, ops, case, dtype):
    """On a GPU without clusters more units than fit one block take a launch a step."""
    library.emulator_device(*SM_80)
    cases.check_lstm(ops, "cpu", cases.LSTMS[case], dtype)


@pytest.mark.parametrize("case", ["odd", "few_rows"])
def test_lstm_missing_gradients(ops, case):
    cases.check_lstm_parts(ops, "cpu", cases.LSTMS[case])


@pytest.mark.parametrize("device", [SM_90, SM_80], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("case", ["odd", "few_rows"])
def test_lstm_without_states(library, ops, case, device):
    library.emulator_device(*device)
    cases.check_lstm_without_states(ops, "cpu", cases.LSTMS[case])


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [cases.Lstm(1, 5, 4, 33), cases.Lstm(1, 3, 2, 7, bias=False)], ids=["bias", "no_bias"]
)
def test_lstm_cell(ops, case, dtype):
    cases.check_lstm_cell(ops, "cpu", case, dtype)


@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (2, 0)])
def test_lstm_empty(ops, steps, batch, states):
    case = cases.Lstm(steps, batch, 4, 5)
    x, h_0, c_0, *weights = cases._convert(case.draw(), "cpu", torch.float32)
    h_0, c_0 = (h_0, c_0) if states else (torch.zeros_like(h_0), torch.zeros_like(c_0))
    operands = (x, *((h_0, c_0) if states else (None, None)), *weights)
    results, reserve = cases.lstm_train(ops, operands)
    output, h_n, c_n, cells = results
    assert output.shape == cells.shape == (steps, batch, 5)
    assert reserve.shape == (1, steps, batch, 4, 5)
    assert torch.equal(h_n, h_0)
    assert torch.equal(c_n, c_0)
    ones = torch.ones_like(h_n)
    grads = cases.lstm_backward(ops, (None, ones, None, None), operands, results, reserve)
    assert torch.equal(grads[1], ones)
    assert not grads[2].any()
    assert not any(g.any() for group in grads[3:] for g in group)


def test_lstm_refuses(ops):
    x, h_0, c_0, *weights = cases._convert(cases.Lstm(2, 3, 4, 5).draw(), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=r"h_0: expected shape \[1, 3, 5\], got \[1, 3, 4\]"):
        ops.rnn("lstm", x, h_0[..., :4], c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected shape \[20, 3\], got \[20, 4\]"):
        ops.rnn("lstm", x[..., :3], h_0, c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh: give both or neither"):
        ops.rnn("lstm", x, h_0, c_0, *weights[:3], [], *cases.WHOLE)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh: give both or neither"):
        ops.rnn_cell("lstm", x[0], h_0[0], c_0[0], *(w[0] for w in weights[:3]), None)


@pytest.mark.parametrize(
    ("argument", "wrong", "expected"),
    [
        ("grad_cells", (2, 3, 6), "2, 3, 5"),
        ("cells", (1, 2, 3, 5), "2, 3, 5"),
        ("reserve", (1, 2, 3, 5, 5), "1, 2, 3, 4, 5"),
    ],
)
def test_lstm_backward_refuses(ops, argument, wrong, expected):
    operands = cases._convert(cases.Lstm(2, 3, 4, 5).draw(), "cpu", torch.float32)
    results, reserve = cases.lstm_train(ops, operands)
    spoiled = {"grad_cells": None, "cells": results[3], "reserve": reserve} | {argument: torch.zeros(wrong)}
    with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[{expected}\]"):
        cases.lstm_backward(
            ops, (None, None, None, spoiled["grad_cells"]), operands, [*results[:3], spoiled["cells"]],
            spoiled["reserve"],
        )  # fmt: skip


@pytest.mark.parametrize("argument", ["h_1", "c_1", "reserve"])
def test_lstm_cell_backward_refuses(ops, argument):
    made = {"h_1": torch.zeros(3, 5), "c_1": torch.zeros(3, 5), "reserve": torch.zeros(3, 4, 5)}
    made[argument] = torch.zeros(3, 5, 5)
    weights = (torch.zeros(20, 4), torch.zeros(20, 5), None, None)
    with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[3, .*5\], got \[3, 5, 5\]"):
        ops.rnn_cell_backward(
            None, None, "lstm", torch.zeros(3, 4), None, None, *weights, *made.values(), *cases.ALL
        )


UNCOVERED = {
    "batch_sizes": torch.tensor([3, 3]),
    "lengths": torch.tensor([2, 1, 2]),
    "reset": torch.zeros(2, 3, dtype=torch.bool),
}


@pytest.mark.parametrize("argument", UNCOVERED)
def test_lstm_refuses_what_no_kernel_covers(ops, argument):
    operands = cases._convert(cases.Lstm(2, 3, 4, 5).draw(), "cpu", torch.float32)
    given = [value if name == argument else None for name, value in UNCOVERED.items()]
    results, reserve = cases.lstm_train(ops, operands)
    output, _, _, cells = results
    for call in (
        lambda: ops.rnn("lstm", *operands, *given),
        lambda: ops.rnn_train("lstm", *operands, *given),
        lambda: ops.rnn_backward(*results, "lstm", *operands, *given, output, cells, reserve, *cases.ALL),
    ):
        with pytest.raises(RuntimeError, match=f"{argument}: the CUDA kernels take none"):
            call()


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu", "LSTM"])
def test_other_cells_are_refused(ops, cell):
    x, h_0, c_0, *weights = cases._convert(cases.Lstm(2, 3, 4, 5).draw(), "cpu", torch.float32)
    step = x[0], h_0[0], c_0[0], *(w[0] for w in weights)
    with pytest.raises(RuntimeError, match=f"cell: the CUDA kernels cover 'lstm', got '{cell}'"):
        ops.rnn(cell, x, h_0, c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match=f"cell: the CUDA kernels cover 'lstm', got '{cell}'"):
        ops.rnn_cell(cell, *step)


@pytest.mark.parametrize("seed", range(3))
def test_results_do_not_depend_on_the_schedule(library, ops, seed):
    torch.manual_seed(0)
    case = cases.CONVS["odd"]
    drawn = case.draw(cases.normal)
    lstm = cases._convert(cases.LSTMS["odd"].draw(), "cpu", torch.float32)

    def run():
        convolved = cases.run_conv(ops, "cpu", case, torch.float32, *drawn)
        return [*convolved, *cases.lstm_train_and_backward(ops, lstm)]

    first = run()
    library.emulator_seed(1 + seed)
    second = run()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
