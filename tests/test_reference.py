"""cnnrnn_ext.reference against torch.nn on its own: what everything else may be compared with."""

import ast
import functools
import inspect
from pathlib import Path

import pytest
import torch
from _oracle import (
    check_error,
    conv_tensors,
    lstm_tensors,
    outputs_and_gradients,
    stock_conv_pool2d,
    stock_lstm,
)

import cnnrnn_ext as cx

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CONV_OPTIONS = {
    "default": {},
    "everything": {
        "stride": 2,
        "padding": 2,
        "dilation": (1, 2),
        "groups": 2,
        "pool_size": 3,
        "pool_stride": 2,
        "pool_padding": 1,
        "ceil_mode": True,
    },
    "average": {"pool": "avg", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "no pool": {"pool": "none", "padding": "same"},
    **{a: {"activation": a} for a in cx.reference.ACTIVATIONS},
}
LSTM_OPTIONS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"batch_first": True, "proj_size": 3},
    {"num_layers": 3, "proj_size": 2, "bidirectional": True},
]


def reference_lstm(input, h_0, c_0, _options=None, **weights):
    options = dict(_options or {})
    bias = options.pop("bias", True)
    output, states = cx.reference.lstm(input, (h_0, c_0), list(weights.values()), has_biases=bias, **options)
    return output, *states


def check(function, stock, tensors):
    """The rule of error, calling the reference directly: no backend, no operator, no module of ours."""
    theirs, their_grads, grads = outputs_and_gradients(stock, tensors)
    exact, exact_grads, _ = outputs_and_gradients(stock, {k: v.double() for k, v in tensors.items()}, grads)
    with cx.trace() as log:
        ours, our_grads, _ = outputs_and_gradients(function, tensors, grads)
    assert log == []
    for index, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        check_error(f"output {index}", *triple)
    for name, gradient in our_grads.items():
        check_error(f"grad of {name}", gradient, their_grads[name], exact_grads[name])


@pytest.mark.pure
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONV_OPTIONS)
def test_conv_pool2d(name, dtype):
    options = CONV_OPTIONS[name]
    tensors = conv_tensors(2, 4, 14, 13, 6, 3, groups=options.get("groups", 1), dtype=torch.float64)
    if dtype == torch.bfloat16:  # few enough digits for every sum to be exact: rounding decides no winner
        tensors = {k: (v * 4).round().clamp(-8, 8) / 4 for k, v in tensors.items()}
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    check(
        functools.partial(cx.reference.conv_pool2d, **options),
        functools.partial(stock_conv_pool2d, **options),
        tensors,
    )


@pytest.mark.pure
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LSTM_OPTIONS, ids=str)
def test_lstm(options, dtype):
    shape = {k: v for k, v in options.items() if k != "batch_first"}
    tensors = {k: v.to(dtype) for k, v in lstm_tensors(5, 5, 7, 6, **shape).items()}
    check(
        functools.partial(reference_lstm, _options=options),
        functools.partial(stock_lstm, _options=options),
        tensors,
    )


@pytest.mark.pure
def test_lstm_packed():
    """batch_sizes as nn.LSTM reads it, forward and reverse, with a projection."""
    for proj_size in (0, 3):
        stock = torch.nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=proj_size)
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 5), [6, 4, 1])
        expected, (h_n, c_n) = stock(packed)
        hx = torch.zeros_like(h_n), torch.zeros_like(c_n)
        output, states = cx.reference.lstm(
            packed.data,
            hx,
            list(stock.parameters()),
            num_layers=2,
            bidirectional=True,
            proj_size=proj_size,
            batch_sizes=packed.batch_sizes,
        )
        torch.testing.assert_close(output, expected.data)
        torch.testing.assert_close(states, (h_n, c_n))


@pytest.mark.pure
def test_lstm_cell():
    stock = torch.nn.LSTMCell(5, 6)
    x, h, c = torch.randn(3, 5), torch.randn(3, 6), torch.randn(3, 6)
    torch.testing.assert_close(cx.reference.lstm_cell(x, (h, c), *stock.parameters()), stock(x, (h, c)))


def test_no_import_of_ours():
    """The reference stands alone: of this package it imports nothing but itself."""
    files = sorted(Path(cx.reference.__file__).parent.glob("*.py"))
    assert len(files) > 1
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("cnnrnn_ext.reference.")
                assert own or name.split(".")[0] in ("torch", "typing", "collections"), (file.name, name)


FUNCTIONS = [name for name in cx.functional.__all__ if name.islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_signature_as_functional(name):
    ours, reference = getattr(cx.functional, name), getattr(cx.reference, name)
    assert inspect.signature(ours) == inspect.signature(reference)
