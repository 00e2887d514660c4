"""cnnrnn_ext.reference against torch.nn on its own: what everything else may be compared with."""

import ast
import functools
import inspect
from pathlib import Path

import pytest
import torch
from _oracle import (
    CELLS,
    as_states,
    cell_class,
    check_error,
    conv_tensors,
    flat,
    functional_rnn,
    nonlinearity,
    outputs_and_gradients,
    rnn_tensors,
    sequence_class,
    stock_conv_pool2d,
    stock_rnn,
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
RNN_OPTIONS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"batch_first": True, "num_layers": 2},
]
RNN_CASES = [
    *((cell, options) for cell in CELLS for options in RNN_OPTIONS),
    ("lstm", {"batch_first": True, "proj_size": 3}),
    ("lstm", {"num_layers": 3, "proj_size": 2, "bidirectional": True}),
]


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
@pytest.mark.parametrize(("cell", "options"), RNN_CASES, ids=str)
def test_sequence(cell, options, dtype):
    shape = {k: v for k, v in options.items() if k != "batch_first"}
    tensors = {k: v.to(dtype) for k, v in rnn_tensors(cell, 5, 5, 7, 6, **shape).items()}
    check(functional_rnn(cx.reference, cell, **options), stock_rnn(cell, **options), tensors)


@pytest.mark.pure
@pytest.mark.parametrize(("cell", "proj_size"), [*((cell, 0) for cell in CELLS), ("lstm", 3)])
def test_packed(cell, proj_size):
    """batch_sizes as torch.nn reads it, forward and reverse, with a projection."""
    options = {"num_layers": 2, "bidirectional": True, **({"proj_size": proj_size} if proj_size else {})}
    stock = sequence_class(torch.nn, cell)(5, 6, **options, **nonlinearity(cell))
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(6, 3, 5), [6, 4, 1])
    output, *finals = flat(stock(packed))
    function = functional_rnn(cx.reference, cell, batch_sizes=packed.batch_sizes, **options)
    states = dict(zip(("h_0", "c_0"), map(torch.zeros_like, finals), strict=False))
    result = function(packed.data, **states, **dict(stock.named_parameters()))
    for a, b in zip(result, (output.data, *finals), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.pure
@pytest.mark.parametrize("cell", CELLS)
def test_cell(cell):
    stock = cell_class(torch.nn, cell)(5, 6, **nonlinearity(cell))
    x, states = torch.randn(3, 5), as_states(cell, torch.randn(3, 6), torch.randn(3, 6))
    function = getattr(cx.reference, cell_class(cx, cell).__name__.lower().replace("cell", "_cell"))
    torch.testing.assert_close(
        function(x, states, *stock.parameters(), **nonlinearity(cell)), stock(x, states)
    )


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
