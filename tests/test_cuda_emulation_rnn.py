"""The recurrent CUDA operators run on the CPU; what that says and does not: test_cuda_emulation.py."""

import _cuda_rnn_cases as cases
import pytest
import torch
from _cuda_cases import ALL_DTYPES, error
from _emulation import (
    CLUSTERS_OF_16,
    NO_SHARED_MEMORY,
    NOTHING_AT_ONCE,
    SM_80,
    SM_90,
    check_every_barrier_is_needed,
)

from cnnrnn_ext.functional._schedule import describe_plan


@pytest.fixture
def library(emulation):
    return emulation


@pytest.fixture
def ops(emulated):
    return emulated


CELLS = tuple(cases.GATES)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", cases.RNNS.values(), ids=cases.RNNS)
def test_rnn(ops, case, cell, dtype):
    cases.check_rnn(ops, "cpu", cell, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", ["odd", "few_rows", "many_rows", "lengths_over_a_cluster"])
def test_rnn_a_launch_a_step(library, ops, case, cell, dtype):
    """Where nothing fits a block's shared memory."""
    library.emulator_device(*NO_SHARED_MEMORY)
    cases.check_rnn(ops, "cpu", cell, cases.RNNS[case], dtype)


STEPS_ON_TENSOR_CORES = {  # (dtype, tf32, what is told)
    "float16": (torch.float16, False, ", tensor cores"),
    "bfloat16": (torch.bfloat16, False, ", tensor cores"),
    "tf32": (torch.float32, True, ", tensor cores, TF32"),
    "float32": (torch.float32, False, ", tensor cores, three TF32 products each"),
}


@pytest.mark.parametrize("case", [
    cases.Rnn(3, 5, 4, 133), cases.Rnn(2, 18, 2, 146, d=2), cases.Rnn(2, 67, 2, 131, bias=False),
    cases.Rnn(4, 6, 4, 134, d=2, rows="lengths"), cases.Rnn(4, 18, 4, 139, d=2, rows="lengths, reset"),
    cases.Rnn(4, 5, 4, 160, d=2, rows="packed, reset"), cases.Rnn(1, 2, 3, 137, rows="packed"),
], ids=lambda case: f"{case.n}x{case.h}, {case.rows}")  # fmt: skip
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("dtype", "tf32", "products"), STEPS_ON_TENSOR_CORES.values(),
                         ids=STEPS_ON_TENSOR_CORES)  # fmt: skip
def test_rnn_a_launch_a_step_on_tensor_cores(library, ops, dtype, tf32, products, cell, case):
    """Where weights fit neither a block nor what runs at once."""
    library.emulator_device(*NOTHING_AT_ONCE)
    plan = describe_plan(ops, cell, torch.empty(0, dtype=dtype), case.n, case.h, case.d, True, tf32)
    assert plan == f"forward: a launch a step{products}; backward: a launch a step{products}"
    cases.check_rnn(ops, "cpu", cell, case, dtype, tf32=tf32)


@pytest.mark.parametrize("device", [SM_90, NO_SHARED_MEMORY], ids=["resident", "a launch a step"])
@pytest.mark.parametrize("rows", ["lengths", "reset", "lengths, reset", "packed", "packed, reset"])
@pytest.mark.parametrize("cell", CELLS)
def test_rnn_rows(library, ops, cell, rows, device):
    library.emulator_device(*device)
    cases.check_rnn(ops, "cpu", cell, cases.Rnn(4, 6, 2, 9, d=2, rows=rows), torch.float64)


CLUSTERS_OF_2 = (227 * 1024, 2, 132)
NO_CLUSTERS = (227 * 1024, 0, 132)
FULL = (227 * 1024, 8, 3)  # clusters would not all run at once
TENSOR_CORES = {  # of half types: (device, hidden_size)
    "a block": (SM_90, 20),
    "a block of 12 eights": (NO_CLUSTERS, 90),
    "a block, the device being full": (FULL, 60),
    "a cluster of 2": (SM_90, 37),
    "a cluster of 4": (SM_90, 70),
    "a cluster of 2, 12 warps a block": (CLUSTERS_OF_2, 90),
    "the grid": (SM_80, 150),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("device", "hidden"), TENSOR_CORES.values(), ids=TENSOR_CORES)
def test_rnn_on_tensor_cores(library, ops, device, hidden, cell, rows, dtype):
    library.emulator_device(*device)
    directions = 1 if rows == "whole" else 2
    cases.check_rnn(ops, "cpu", cell, cases.Rnn(4, 18, 4, hidden, d=directions, rows=rows), dtype)


TF32 = {  # (device, hidden_size), and what the forward is to tell
    "a block": (SM_90, 20, "one block a tile"),
    "a block of 9 eights": (NO_CLUSTERS, 70, "one block a tile"),
    "a cluster of 2": (SM_90, 37, "clusters of 2"),
    "a cluster of 4": (SM_90, 70, "clusters of 4"),
    "a cluster of 2, 12 warps a block": (CLUSTERS_OF_2, 90, "clusters of 2"),
    "the grid": (SM_80, 140, "groups of 5 blocks"),
}


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("device", "hidden", "told"), TF32.values(), ids=TF32)
def test_rnn_tf32(library, ops, device, hidden, told, cell, rows):
    library.emulator_device(*device)
    plan = describe_plan(ops, cell, torch.empty(0), 18, hidden, 1, True, tf32=True)
    assert plan.startswith(f"forward: {told}, tensor cores, TF32; backward: ")
    assert plan.endswith(", tensor cores, TF32")
    directions = 1 if rows == "whole" else 2
    case = cases.Rnn(4, 18, 4, hidden, d=directions, rows=rows)
    cases.check_rnn(ops, "cpu", cell, case, torch.float32, tf32=True)


WHOLE_FLOATS = {  # (cell, device, hidden_size), where fused multiply-adds do not fit: see rnn_plan()
    "a block": ("lstm", NO_CLUSTERS, 120, "one block a tile"),
    "a cluster of 4": ("gru", (227 * 1024, 4, 132), 140, "clusters of 4"),
    "a cluster of 8": ("lstm", FULL, 130, "clusters of 8"),
    "the grid": ("lstm", SM_80, 140, "groups of 5 blocks"),
    "the grid, gru": ("gru", SM_80, 140, "groups of 5 blocks"),
}


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize(("cell", "device", "hidden", "told"), WHOLE_FLOATS.values(), ids=WHOLE_FLOATS)
def test_rnn_float32_on_tensor_cores(library, ops, device, hidden, told, cell, rows):
    """As exact as float32: three products of TF32 for each product."""
    library.emulator_device(*device)
    plan = describe_plan(ops, cell, torch.empty(0), 18, hidden, 1, True)
    assert plan.startswith(f"forward: {told}, tensor cores, three TF32 products each; backward: ")
    directions = 1 if rows == "whole" else 2
    case = cases.Rnn(4, 18, 4, hidden, d=directions, rows=rows)
    cases.check_rnn(ops, "cpu", cell, case, torch.float32)


def test_tf32_is_another_result(library, ops):
    """Float32 is not rounded unless TF32 is asked for; float64 never is."""
    library.emulator_device(*NO_CLUSTERS)
    case = cases.Rnn(3, 5, 2, 120)
    drawn = case.draw("lstm")
    for dtype, same in ((torch.float32, False), (torch.float64, True)):
        operands = cases.convert(drawn, "cpu", dtype)
        exact, rounded = (ops.rnn("lstm", *operands, *cases.WHOLE, tf32)[0] for tf32 in (False, True))
        assert torch.equal(exact, rounded) == same
        assert error(rounded, exact) < 1e-2


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_recomputed_gates(ops, cell, dtype, rows):
    """The reserve is empty, and the gradients are those of the oracle all the same."""
    case = cases.Rnn(4, 6, 4, 20, d=2, rows=rows)
    cases.check_rnn(ops, "cpu", cell, case, dtype, recompute=True)


WHOLE = ", tensor cores, three TF32 products each"
PLANS = [
    (SM_90, torch.bfloat16, 20, "forward: one block a tile, tensor cores"),
    (SM_90, torch.bfloat16, 128, "forward: clusters of 4, tensor cores"),
    (SM_80, torch.bfloat16, 128, "forward: one block a tile, tensor cores"),
    (CLUSTERS_OF_16, torch.float16, 512, "forward: clusters of 16, tensor cores"),
    (SM_80, torch.bfloat16, 256, "forward: groups of 8 blocks, tensor cores"),
    (CLUSTERS_OF_16, torch.bfloat16, 1024, "forward: groups of 32 blocks, tensor cores"),
    (CLUSTERS_OF_16, torch.bfloat16, 2048, "forward: a launch a step, tensor cores"),
    (SM_80, torch.bfloat16, 4096, "forward: a launch a step, tensor cores"),
    (NO_SHARED_MEMORY, torch.bfloat16, 4096, "forward: a launch a step"),
    (SM_90, torch.float32, 2048, f"forward: a launch a step{WHOLE}"),
    (SM_90, torch.float32, 100, "forward: one block a tile"),
    (SM_90, torch.float32, 256, "forward: clusters of 8"),
    (CLUSTERS_OF_16, torch.float32, 1024, f"forward: groups of 128 blocks{WHOLE}"),
    (SM_90, torch.float64, 150, "forward: clusters of 8"),
    (SM_80, torch.float64, 150, "forward: a launch a step"),
]


@pytest.mark.parametrize(("device", "dtype", "hidden", "plan"), PLANS)
def test_plan(library, ops, device, dtype, hidden, plan):
    """The schedule is chosen by shape and by what the device can hold, and told in words."""
    library.emulator_device(*device)
    assert describe_plan(ops, "lstm", torch.empty(0, dtype=dtype), 16, hidden, 1, False) == plan


def test_plan_when_the_device_is_full(library, ops):
    """What does not run at once follows: clusters by themselves, groups of the grid in several launches.
    Small layers then take a block a tile; beyond a few launches a launch a step is ahead."""
    library.emulator_device(*SM_80)
    half, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    for tiles, told in ((13, "groups of 8"), (39, "groups of 8"), (40, "a launch a step")):
        assert told in describe_plan(ops, "lstm", half, 16 * tiles, 256, 1, False)
    for tiles, told in ((26, "groups of 8"), (27, "a launch a step")):
        assert told in describe_plan(ops, "lstm", single, 16 * tiles, 256, 1, False, tf32=True)
    library.emulator_device(*SM_90)
    for hidden, clusters in ((128, 4), (200, 8)):
        told = describe_plan(ops, "gru", half, 16 * 16, hidden, 1, True)
        want = f"clusters of {clusters}, tensor cores"
        assert told == f"forward: {want}; backward: {want}"
    assert "one block a tile" in describe_plan(ops, "gru", half, 16 * 34, 128, 1, False)
    assert "clusters of 8" in describe_plan(ops, "gru", half, 16 * 34, 200, 1, False)


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_rnn_in_several_launches(library, ops, cell, rows):
    """Three tiles of two directions where only four groups of the grid run at once."""
    library.emulator_device(163 * 1024, 0, 20)
    x = torch.empty(0, dtype=torch.bfloat16)
    want = "groups of 5 blocks, tensor cores"
    assert describe_plan(ops, cell, x, 40, 140, 2, True) == f"forward: {want}; backward: {want}"
    cases.check_rnn(ops, "cpu", cell, cases.Rnn(3, 40, 4, 140, d=2, rows=rows), torch.bfloat16)


SCHEDULES = {  # of every kind of kernel: (device, dtype, hidden_size, tf32)
    **{name: (device, torch.bfloat16, hidden, False) for name, (device, hidden) in TENSOR_CORES.items()},
    "fused multiply-adds, a block": (SM_90, torch.float32, 9, False),
    "fused multiply-adds, a cluster": (SM_90, torch.float32, 130, False),
    "TF32, a cluster": (SM_90, torch.float32, 70, True),
    "three TF32 products, the grid": (SM_80, torch.float32, 140, False),
    "a launch a step": (NO_SHARED_MEMORY, torch.float32, 20, False),
    "a launch a step on tensor cores": (NOTHING_AT_ONCE, torch.bfloat16, 133, False),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("device", "dtype", "hidden", "tf32"), SCHEDULES.values(), ids=SCHEDULES)
def test_results_do_not_depend_on_the_order_of_threads(library, ops, device, dtype, hidden, tf32, seed):
    torch.manual_seed(0)
    library.emulator_device(*device)
    case = cases.Rnn(5, 5, 2, hidden, d=2, rows="lengths, reset")
    operands, steps = cases.convert(case.draw("gru"), "cpu", dtype), case.steps("cpu")
    first = cases.rnn_train_and_backward(ops, "gru", steps, operands, tf32)
    library.emulator_seed(1 + seed)
    second = cases.rnn_train_and_backward(ops, "gru", steps, operands, tf32)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_every_barrier_is_needed(library, ops):
    """Without any one of the kernels' barriers the emulator reports a violation."""

    def run():
        for device, case, dtype, tf32 in (
            (SM_90, cases.Rnn(3, 5, 3, 9), torch.float32, False),
            (SM_90, cases.Rnn(3, 2, 3, 130), torch.float32, False),
            (NO_SHARED_MEMORY, cases.Rnn(2, 5, 2, 150), torch.float32, False),
            (SM_90, cases.Rnn(5, 5, 3, 20), torch.bfloat16, False),  # a block,
            (NO_CLUSTERS, cases.Rnn(5, 5, 3, 60), torch.bfloat16, False),  # one of several eights,
            (SM_90, cases.Rnn(5, 5, 3, 70), torch.bfloat16, False),  # a cluster of 4,
            (SM_80, cases.Rnn(5, 5, 3, 140), torch.bfloat16, False),  # the grid,
            (NOTHING_AT_ONCE, cases.Rnn(2, 5, 3, 140), torch.bfloat16, False),  # a launch a step
        ):
            library.emulator_device(*device)
            operands = cases.convert(case.draw("lstm"), "cpu", dtype)
            cases.rnn_train_and_backward(ops, "lstm", cases.WHOLE, operands, tf32)

    check_every_barrier_is_needed(library, run, at_least=25)


def test_rnn_large_on_tensor_cores(ops):
    """More weights than registers hold, and in the backward more columns than a warp makes at a time."""
    cases.check_rnn(ops, "cpu", "lstm", cases.Rnn(2, 3, 2, 520), torch.bfloat16)


def test_launches_of_a_large_layer(library, ops):
    """A block has two tiles of 8 units, and each of its eight warps three stages of 64 + 256 words."""
    library.emulator_device(*CLUSTERS_OF_16)
    operands = cases.convert(cases.Rnn(2, 16, 2, 2048).draw("lstm"), "cpu", torch.bfloat16)
    library.emulator_record_launches(True)
    try:
        ops.rnn("lstm", *operands, *cases.WHOLE, False)
    finally:
        library.emulator_record_launches(False)
    lines = library.emulator_recorded_launches().decode().splitlines()
    launches = [tuple(map(int, line.split()[1:])) for line in lines]  # grid, cluster, threads, shared
    words = 2048 * 8192 * 2 // 16
    assert launches == [(words // 256, 1, 1, 1, 256, 0), *[(128, 1, 1, 1, 256, 8 * 3 * 320 * 16)] * 3]


def test_rnn_lengths_out_of_bounds(ops):
    """The host does not look at lengths on a device; kernels keep within their rows."""
    case = cases.Rnn(4, 3, 2, 5)
    operands = cases.convert(case.draw("lstm"), "cpu", torch.float32)
    beyond, within = torch.tensor([9, -2, 3]), torch.tensor([4, 0, 3])
    got = cases.rnn_train_and_backward(ops, "lstm", (None, beyond, None), operands)
    want = cases.rnn_train_and_backward(ops, "lstm", (None, within, None), operands)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_rnn_many_packed_steps(ops):
    """batch_sizes travel in kernel arguments, some hundred at a time."""
    sizes = torch.tensor([3] * 450 + [2] * 100 + [1] * 360)
    case = cases.Rnn(len(sizes), 3, 1, 2)
    x, *rest = cases.convert(case.draw("rnn_tanh"), "cpu", torch.float64)
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


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    "case", [cases.Rnn(1, 5, 4, 33), cases.Rnn(1, 3, 2, 7, bias=False)], ids=["bias", "no_bias"]
)
def test_cell(ops, case, cell, dtype):
    cases.check_cell(ops, "cpu", cell, case, dtype)


@pytest.mark.parametrize("cell", CELLS)
def test_rnn_layer(ops, cell):
    for case in (cases.Rnn(3, 4, 2, 5), cases.Rnn(3, 4, 2, 5, bias=False)):
        x, h_0, c_0, *weights = cases.convert(case.draw(cell), "cpu", torch.float32)
        single = [w[0] if w else None for w in weights]
        want = ops.rnn(cell, x, h_0, c_0, *weights, *cases.WHOLE)
        for got, theirs in zip(ops.rnn_layer(cell, x, h_0, c_0, *single), want, strict=True):
            assert torch.equal(got, theirs)
