"""functional.lstm_cell and LSTMCell against torch.nn.LSTMCell."""

import itertools

import pytest
import torch
from _oracle import compare, running_on

import cnnrnn_ext as cx

OPS = ["lstm_cell"]
SHAPES = {
    "small": (3, 7, 6),
    "one": (1, 1, 1),
    "odd": (5, 13, 19),
    "wide": (17, 16, 33),
    "real": (32, 256, 128),
}


def cell_tensors(n, i, h, bias=True, dtype=torch.float32):
    tensors = {
        "input": torch.randn(n, i, dtype=dtype),
        "h": torch.randn(n, h, dtype=dtype),
        "c": torch.randn(n, h, dtype=dtype),
        "weight_ih": torch.randn(4 * h, i, dtype=dtype) / h**0.5,
        "weight_hh": torch.randn(4 * h, h, dtype=dtype) / h**0.5,
    }
    if bias:
        tensors |= {name: torch.randn(4 * h, dtype=dtype) for name in ("bias_ih", "bias_hh")}
    return tensors


def ours(input, h, c, **weights):
    return cx.functional.lstm_cell(input, (h, c), **weights)


def stock(input, h, c, **weights):
    cell = torch.nn.LSTMCell(
        input.shape[1], h.shape[1], bias="bias_ih" in weights, device="meta", dtype=input.dtype
    )
    return torch.func.functional_call(cell, weights, (input, (h, c)))


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_torch(mode, shape, bias, dtype):
    compare(ours, stock, cell_tensors(*SHAPES[shape], bias, dtype), mode, OPS)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate", ["i", "f", "g", "o"])
def test_each_gate_over_all_preactivations(mode, gate, dtype):
    """One gate swept through -130 ... 130 in fine steps and to infinity, the other three held open.

    The edges of float's exponential (about ±88.4 to ±88.8) lie inside.
    """
    sweep = torch.cat((torch.linspace(-130, 130, 52001), torch.tensor([1e9, -1e9, 3e38, -3e38])))
    sweep = torch.cat((sweep, torch.tensor([float("inf"), float("-inf")]))).to(dtype)
    position = "ifgo".index(gate)
    tensors = {
        "input": sweep[:, None],
        "h": torch.zeros(len(sweep), 1, dtype=dtype),
        "c": torch.ones(len(sweep), 1, dtype=dtype),
        "weight_ih": torch.eye(4, dtype=dtype)[:, position : position + 1].clone(),
        "weight_hh": torch.zeros(4, 1, dtype=dtype),
        "bias_ih": torch.tensor([40.0, 40.0, 0.5, 40.0], dtype=dtype) * (torch.arange(4) != position),
        "bias_hh": torch.zeros(4, dtype=dtype),
    }
    compare(ours, stock, tensors, mode, OPS, wanted=[])


NAMES = ("input", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.mark.parametrize(
    "wanted",
    [(n,) for n in NAMES] + [tuple(m for m in NAMES if m != n) for n in NAMES],
    ids=lambda w: f"{len(w)} {w[0]}",
)
def test_any_subset_of_gradients(mode, wanted):
    compare(ours, stock, cell_tensors(3, 5, 6), mode, OPS, wanted=list(wanted))


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["h_1", "c_1"])
def test_one_output_in_the_loss(mode, used):
    grads = [torch.randn(3, 6) if u else None for u in used]
    compare(ours, stock, cell_tensors(3, 5, 6), mode, OPS, grad_outputs=grads)


@pytest.mark.pure
def test_zero_size_batch(mode):
    compare(ours, stock, cell_tensors(0, 5, 6), mode, OPS)


def test_strided_operands(mode):
    tensors = {k: torch.stack((v, v), -1)[..., 0] for k, v in cell_tensors(3, 5, 6).items()}
    assert not tensors["input"].is_contiguous()
    compare(ours, stock, tensors, mode, OPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    tensors = {k: v.to(dtype) for k, v in cell_tensors(3, 5, 6).items()}
    with cx.trace() as log:
        ours(**tensors)
    assert [(c.backend, bool(c.reason)) for c in log] == [("reference", True)]
    compare(ours, stock, tensors, "reference", OPS)


@pytest.mark.parametrize(("bias", "batched", "state"), list(itertools.product((True, False), repeat=3)))
def test_module(mode, bias, batched, state):
    """LSTMCell in each of its forms, on nn.LSTMCell's own parameters."""
    stock_cell = torch.nn.LSTMCell(5, 6, bias)
    cell = cx.LSTMCell(5, 6, bias)
    cell.load_state_dict(stock_cell.state_dict(), strict=True)
    x = torch.randn(*((3,) if batched else ()), 5, requires_grad=True)
    hx = tuple(torch.randn(*x.shape[:-1], 6, requires_grad=True) for _ in range(2)) if state else None
    leaves = [x, *(hx or ())]
    with running_on(mode, *OPS):
        result = cell(x, hx)
        grads = torch.autograd.grad(sum((y * y).sum() for y in result), [*leaves, *cell.parameters()])
    expected = stock_cell(x, hx)
    expected_grads = torch.autograd.grad(
        sum((y * y).sum() for y in expected), [*leaves, *stock_cell.parameters()]
    )
    for a, b in zip((*result, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b)


def test_steps_of_the_cell_are_the_sequence(mode):
    """LSTMCell fed step by step gives what LSTM gives at once: the same weights, two operators."""
    lstm = cx.LSTM(5, 6)
    cell = cx.LSTMCell(5, 6)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in lstm.state_dict().items()})
    x = torch.randn(7, 3, 5)
    with running_on(mode, "lstm", "lstm_cell"):
        output, (_, c_n) = lstm(x)
        h = c = torch.zeros(3, 6)
        for t, row in enumerate(x):
            h, c = cell(row, (h, c))
            torch.testing.assert_close(h, output[t])
    torch.testing.assert_close(c, c_n[0])
