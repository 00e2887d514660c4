"""functional.lstm_cell, gru_cell, rnn_cell and their modules against torch.nn's cells."""

import itertools

import pytest
import torch
from _oracle import (
    CELLS,
    FUNCTION,
    GATES,
    as_states,
    cell_class,
    compare,
    nonlinearity,
    running_on,
    sequence_class,
)

import cnnrnn_ext as cx

SHAPES = {
    "small": (3, 7, 6),
    "one": (1, 1, 1),
    "odd": (5, 13, 19),
    "wide": (17, 16, 33),
    "wide, two tiles": (40, 16, 70),
    "streaming": (1, 40, 130),
    "real": (32, 256, 128),
}


def ops(cell):
    return [FUNCTION[cell] + "_cell"]


def cell_tensors(cell, n, i, h, bias=True, dtype=torch.float32):
    rows = GATES[cell] * h
    tensors = {
        "input": torch.randn(n, i, dtype=dtype),
        "h": torch.randn(n, h, dtype=dtype),
        "c": torch.randn(n, h, dtype=dtype),
        "weight_ih": torch.randn(rows, i, dtype=dtype) / h**0.5,
        "weight_hh": torch.randn(rows, h, dtype=dtype) / h**0.5,
    }
    if cell != "lstm":
        del tensors["c"]
    if bias:
        tensors |= {name: torch.randn(rows, dtype=dtype) for name in ("bias_ih", "bias_hh")}
    return tensors


def ours(cell):
    def function(input, h, c=None, **weights):
        call = getattr(cx.functional, ops(cell)[0])
        return call(input, as_states(cell, h, c), **weights, **nonlinearity(cell))

    return function


def stock(cell):
    def function(input, h, c=None, **weights):
        module = cell_class(torch.nn, cell)(
            input.shape[1], h.shape[1], bias="bias_ih" in weights, device="meta", dtype=input.dtype,
            **nonlinearity(cell),
        )  # fmt: skip
        return torch.func.functional_call(module, weights, (input, as_states(cell, h, c)))

    return function


def check(cell, tensors, mode, **options):
    return compare(ours(cell), stock(cell), tensors, mode, ops(cell), **options)


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_against_torch(mode, cell, shape, bias, dtype):
    check(cell, cell_tensors(cell, *SHAPES[shape], bias, dtype), mode, few=shape == "one")


# Which rows of the weights a gate has; the values at which the others are held.
HELD_OPEN = {
    "lstm": (40.0, 40.0, 0.5, 40.0),
    "gru": (40.0, -40.0, 0.5),
    "rnn_tanh": (0.0,),
    "rnn_relu": (0.0,),
}
SWEPT = [("lstm", 0), ("lstm", 1), ("lstm", 2), ("lstm", 3), ("gru", 0), ("gru", 1), ("gru", 2)]
SWEPT += [("rnn_tanh", 0), ("rnn_relu", 0)]


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "gate"), SWEPT)
def test_each_gate_over_all_preactivations(mode, cell, gate, dtype):
    """One gate swept through -130 ... 130 in fine steps and to infinity, the others held open.

    The edges of float's exponential (about ±88.4 to ±88.8) lie inside.
    """
    sweep = torch.cat((torch.linspace(-130, 130, 52001), torch.tensor([1e9, -1e9, 3e38, -3e38])))
    sweep = torch.cat((sweep, torch.tensor([float("inf"), float("-inf")]))).to(dtype)
    gates = GATES[cell]
    tensors = {
        "input": sweep[:, None],
        "h": torch.zeros(len(sweep), 1, dtype=dtype),
        "c": torch.ones(len(sweep), 1, dtype=dtype),
        "weight_ih": torch.eye(gates, dtype=dtype)[:, gate : gate + 1].clone(),
        "weight_hh": torch.zeros(gates, 1, dtype=dtype),
        "bias_ih": torch.tensor(HELD_OPEN[cell], dtype=dtype) * (torch.arange(gates) != gate),
        "bias_hh": torch.zeros(gates, dtype=dtype),
    }
    if cell == "gru":  # r shows through the state's part of n, z through the distance of h and n
        tensors["bias_hh"][2] = 0.7
        tensors["h"].fill_(0.3)
    if cell != "lstm":
        del tensors["c"]
    check(cell, tensors, mode, wanted=[])


NAMES = ("input", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


SUBSETS = [(n,) for n in NAMES] + [tuple(m for m in NAMES if m != n) for n in NAMES]


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [(cell, w) for cell in ("lstm", "gru", "rnn_relu") for w in SUBSETS if cell == "lstm" or w != ("c",)],
    ids=lambda w: w if isinstance(w, str) else f"{len(w)} {w[0]}",
)
def test_any_subset_of_gradients(mode, cell, wanted):
    tensors = cell_tensors(cell, 3, 5, 6)
    check(cell, tensors, mode, wanted=[name for name in wanted if name in tensors])


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["h_1", "c_1"])
def test_one_output_in_the_loss(mode, used):
    grads = [torch.randn(3, 6) if u else None for u in used]
    check("lstm", cell_tensors("lstm", 3, 5, 6), mode, grad_outputs=grads)


@pytest.mark.pure
@pytest.mark.parametrize("cell", CELLS)
def test_zero_size_batch(mode, cell):
    check(cell, cell_tensors(cell, 0, 5, 6), mode)


@pytest.mark.parametrize("cell", CELLS)
def test_strided_operands(mode, cell):
    tensors = {k: torch.stack((v, v), -1)[..., 0] for k, v in cell_tensors(cell, 3, 5, 6).items()}
    assert not tensors["input"].is_contiguous()
    check(cell, tensors, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_half_precision(mode, cell, dtype):
    """The kernels by way of float32, the reference in halves: both within torch's own error."""
    check(cell, {k: v.to(dtype) for k, v in cell_tensors(cell, 3, 5, 6).items()}, mode)


@pytest.mark.parametrize(("bias", "batched", "state"), list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("cell", CELLS)
def test_module(mode, cell, bias, batched, state):
    """The module in each of its forms, on the stock cell's own parameters."""
    stock_cell = cell_class(torch.nn, cell)(5, 6, bias, **nonlinearity(cell))
    module = cell_class(cx, cell)(5, 6, bias, **nonlinearity(cell))
    module.load_state_dict(stock_cell.state_dict(), strict=True)
    x = torch.randn(*((3,) if batched else ()), 5, requires_grad=True)
    states = [torch.randn(*x.shape[:-1], 6, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    hx = as_states(cell, *states) if state else None
    leaves = [x, *(states if state else ())]

    def as_tuple(result):
        return result if isinstance(result, tuple) else (result,)

    with running_on(mode, *ops(cell)):
        result = as_tuple(module(x, hx))
        grads = torch.autograd.grad(sum((y * y).sum() for y in result), [*leaves, *module.parameters()])
    expected = as_tuple(stock_cell(x, hx))
    expected_grads = torch.autograd.grad(
        sum((y * y).sum() for y in expected), [*leaves, *stock_cell.parameters()]
    )
    for a, b in zip((*result, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_the_cell_are_the_sequence(mode, cell):
    """The cell fed step by step gives what the layer gives at once: the same weights, two operators."""
    layer = sequence_class(cx, cell)(5, 6, **nonlinearity(cell))
    module = cell_class(cx, cell)(5, 6, **nonlinearity(cell))
    module.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(7, 3, 5)
    with running_on(mode, FUNCTION[cell], *ops(cell)):
        output, finals = layer(x)
        hx = None
        for t, row in enumerate(x):
            hx = module(row, hx)
            torch.testing.assert_close(hx[0] if cell == "lstm" else hx, output[t])
    if cell == "lstm":
        torch.testing.assert_close(hx[1], finals[1][0])
