"""The operator of one direction without lists: it is ``rnn``, in its results and in what it refuses."""

import pytest
import torch
from _oracle import CELLS, GATES
from torch.testing._internal.optests import opcheck

operators = torch.ops.cnnrnn_ext


def arguments(cell, bias=True, state=True, dtype=torch.float32, steps=4, batch=2):
    rows = GATES[cell] * 5
    h, c = (torch.randn(1, batch, 5, dtype=dtype) if state else None for _ in range(2))
    biases = torch.randn(2, rows, dtype=dtype).unbind() if bias else (None, None)
    weights = torch.randn(rows, 3, dtype=dtype), torch.randn(rows, 5, dtype=dtype)
    x = torch.randn(steps, batch, 3, dtype=dtype)
    return cell, x, h, c if cell == "lstm" else None, *weights, *biases


def in_lists(args):
    weights = [[w] if w is not None else [] for w in args[4:]]
    return *args[:4], *weights, None, None, None


@pytest.mark.parametrize("sizes", [(4, 2), (1, 1), (0, 2), (3, 0), (40, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_as_with_lists(compiled, cell, state, bias, dtype, sizes):
    args = arguments(cell, bias, state, dtype, *sizes)
    for ours, expected in zip(operators.rnn_layer(*args), operators.rnn(*in_lists(args)), strict=True):
        assert ours.dtype == expected.dtype
        assert ours.shape == expected.shape
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, bias):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(operators.rnn_layer.default, arguments(cell, bias), test_utils=checks)


def test_strided_operands(compiled):
    args = arguments("lstm")
    strided = [torch.stack((a, a), -1)[..., 0] if isinstance(a, torch.Tensor) else a for a in args]
    assert not strided[1].is_contiguous()
    for ours, expected in zip(operators.rnn_layer(*strided), operators.rnn_layer(*args), strict=True):
        assert torch.equal(ours, expected)


NAMES = ("cell", "x", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
WRONG = {
    "cell": ["", "LSTM", "lstm "],
    "x": [torch.randn(4, 3), torch.randn(4, 2, 4), torch.randn(4, 2, 3).half(), torch.empty(0)],
    "h_0": [torch.randn(2, 2, 5), torch.randn(1, 2, 6), torch.randn(2, 5), torch.randn(1, 2, 5).double()],
    "c_0": [torch.randn(2, 2, 5), torch.randn(1, 3, 5), torch.randn(1, 2, 5).double()],
    "weight_ih": [torch.randn(20, 4), torch.randn(15, 3), torch.randn(20), torch.randn(20, 3).double()],
    "weight_hh": [torch.randn(20, 4), torch.randn(15, 5), torch.randn(20), torch.randn(20, 5).double()],
    "bias_ih": [None, torch.randn(15), torch.randn(20, 1), torch.randn(20).double()],
    "bias_hh": [None, torch.randn(15), torch.randn(20, 1), torch.randn(20).double()],
}


@pytest.mark.parametrize(("name", "index"), [(name, i) for name in WRONG for i in range(len(WRONG[name]))])
def test_refuses_what_rnn_refuses(compiled, name, index):
    args = list(arguments("lstm"))
    args[NAMES.index(name)] = WRONG[name][index]
    with pytest.raises(RuntimeError) as expected:
        operators.rnn(*in_lists(args))
    with pytest.raises(RuntimeError) as ours:
        operators.rnn_layer(*args)
    assert str(ours.value) == str(expected.value)


def test_a_cell_without_c_refuses_one(compiled):
    args = list(arguments("gru"))
    args[3] = torch.randn(1, 2, 5)
    with pytest.raises(RuntimeError, match="c_0: only lstm has one"):
        operators.rnn_layer(*args)
