"""The raw operators: schemas, opcheck of each, layouts, what they keep, dtypes."""

import copy

import pytest
import torch
from _operator_cases import (
    CHECKS,
    FLAGS,
    NAMES,
    OPCHECK_CASES,
    backward_arguments,
    cell_arguments,
    conv_arguments,
    detached,
    narrow_arguments,
    operators,
    rnn_arguments,
    sample_arguments,
    tensors_of,
)
from _oracle import CELLS, compiled_missing
from torch.testing._internal.optests import opcheck as _opcheck

from cnnrnn_ext import _library


def in_dtype(value, dtype):
    """A tensor, or a list of them, in dtype; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    return [in_dtype(v, dtype) for v in value] if isinstance(value, list) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "case"), OPCHECK_CASES)
def test_opcheck(name, case):
    """Schema, fake kernel and autograd registration, traced with dynamic shapes."""
    trains = name.endswith(("_train", "_backward"))
    base = name.removesuffix("_train").removesuffix("_backward")
    arguments = next(a for n, c, a in sample_arguments(trains) if (n, c) == (base, case))
    if name.endswith("_backward"):
        arguments = backward_arguments(base, arguments, grad=True)
    # Tracing a backward and its own double backward takes seconds: once each is enough.
    traced = case in ("default", "lstm", "gru") or not name.endswith("_backward")
    checks = CHECKS if traced else CHECKS[:-1]
    _opcheck(getattr(operators, name).default, arguments, test_utils=checks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rnn", "rnn_train", "rnn_backward"])
def test_opcheck_in_bfloat16(name):
    """What is kept for the backward is in float32 then; everything else in x's dtype."""
    arguments = next(a for n, c, a in sample_arguments(name != "rnn") if (n, c) == ("rnn", "lstm"))
    arguments = [in_dtype(argument, torch.bfloat16) for argument in arguments]
    if name == "rnn_backward":
        arguments = backward_arguments("rnn", arguments, grad=True)
    _opcheck(getattr(operators, name).default, arguments, test_utils=CHECKS[:3], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["rnn_train", "rnn_backward"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck_recomputing_gates(cell, name):
    """The reserve is empty then, and the backward computes what it would hold."""
    arguments = next(a for n, c, a in sample_arguments(True) if (n, c) == ("rnn", cell))
    train = (*arguments, False, True)
    if name == "rnn_train":
        arguments = train
    else:
        reserve = operators.rnn_train(*detached(train))[-1]
        assert reserve.numel() == 0
        before, behind = 4 + len(arguments) + 2, FLAGS["rnn"]  # the gradients, output and cells; the flags
        arguments = backward_arguments("rnn", arguments, grad=True)
        arguments = (*arguments[:before], reserve, *arguments[-behind:])
    _opcheck(getattr(operators, name).default, arguments, test_utils=CHECKS[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bfloat16"])
@pytest.mark.parametrize("base", ["rnn", "rnn_cell"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck_narrow(cell, base, int8):
    arguments = narrow_arguments(base, cell, int8)
    _opcheck(getattr(operators, base + "_narrow").default, arguments, test_utils=CHECKS, rtol=1e-4, atol=1e-4)


def test_every_operator_is_checked():
    elsewhere = {"rnn_narrow", "rnn_cell_narrow", "rnn_layer"}  # above, and test_rnn_layer.py
    assert {name for name, _ in OPCHECK_CASES} | elsewhere == set(NAMES)
    assert {schema.split("(")[0] for schema in _library.schemas()} == set(NAMES)


# ---- fake kernels against the real ones, beyond what opcheck compares ----


@pytest.mark.parametrize("case", ["default", "everything", "channels_last", "channels_last, everything"])
def test_fake_layout_is_the_real_layout(case):
    arguments = next(a for n, c, a in sample_arguments(False) if (n, c) == ("conv_pool2d", case))
    meta = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
    for real, fake in zip(
        operators.conv_pool2d_train(*arguments), operators.conv_pool2d_train(*meta), strict=True
    ):
        assert real.shape == fake.shape
        assert real.stride() == fake.stride()
        assert real.dtype == fake.dtype


# ---- schemas ----


@pytest.mark.pure
@pytest.mark.parametrize("schema", _library.schemas(), ids=lambda s: s.split("(")[0])
def test_registered_schema_is_the_file(schema):
    """The C++ library (or Python without it) registered exactly what operators.schema says."""
    name = schema.split("(")[0]
    parsed = torch._C.parse_schema(f"cnnrnn_ext::{schema}")
    registered = getattr(operators, name).default._schema
    assert str(registered) == str(parsed)
    assert not registered.is_mutable


# ---- the operators against the reference ----


@pytest.mark.parametrize("case", ["default", "everything"])
def test_code_names_the_winner(case):
    """code is the winner's place in its window, or 255: recomputed here from the map before the pool."""
    arguments = conv_arguments(case)
    x, weight, bias, stride, padding, dilation, groups, activation, _, size, step, pad, _ = arguments
    y, code, _ = operators.conv_pool2d_train(*arguments)
    conv = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    conv = conv.relu() if activation == "relu" else conv
    assert code.dtype == torch.uint8
    assert code.shape == y.shape
    for (n, k, i, j), winner in zip(
        torch.cartesian_prod(*map(torch.arange, y.shape)).tolist(), code.flatten().tolist(), strict=True
    ):
        if winner == 255:
            assert activation == "relu"
            assert y[n, k, i, j] == 0
            continue
        row, column = i * step[0] - pad[0] + winner // size[1], j * step[1] - pad[1] + winner % size[1]
        torch.testing.assert_close(conv[n, k, row, column], y[n, k, i, j])


@pytest.mark.parametrize("cell", CELLS)
def test_reserve_holds_what_the_schema_says(cell):
    arguments = rnn_arguments(cell)
    _, x, h_0, c_0, (w_ih,), (w_hh,), (b_ih,), (b_hh,) = arguments[:8]
    output, h_n, c_n, cells, reserve = operators.rnn_train(*arguments)
    h, c = h_0[0], None if c_0 is None else c_0[0]
    for t in range(len(x)):
        from_x, from_h = x[t] @ w_ih.t() + b_ih, h @ w_hh.t() + b_hh
        expected = []
        if cell == "lstm":
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            expected = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
            c = expected[1] * c + expected[0] * expected[2]
            h = expected[3] * c.tanh()
            torch.testing.assert_close(cells[t], c)
        elif cell == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n_part) = from_x.chunk(3, -1), from_h.chunk(3, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * h_n_part).tanh()
            expected = [r, z, n, h_n_part]
            h = (1 - z) * n + z * h
        else:
            h = (from_x + from_h).tanh() if cell == "rnn_tanh" else (from_x + from_h).relu()
        if expected:
            torch.testing.assert_close(reserve[0, t], torch.stack(expected, 1))
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(h_n[0], h)
    if cell == "lstm":
        torch.testing.assert_close(c_n[0], c)
    else:
        assert [list(t.shape) for t in (c_n, cells)] == [[0], [0]]
        assert list(reserve.shape) == [1, 4, 2, 4 if cell == "gru" else 0, 5]


@pytest.mark.pure
def test_inference_operator_is_the_train_operators_output():
    for name, _, arguments in sample_arguments(False):
        inference = getattr(operators, name)(*arguments)
        training = getattr(operators, name + "_train")(*arguments)
        inference = inference if isinstance(inference, tuple) else (inference,)
        for a, b in zip(inference, training[: len(inference)], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["conv_pool2d", "rnn", "rnn_cell"])
def test_inference_operator_warns_of_a_gradient(name):
    """The inference forms have no gradient: asking for one through the raw operator is not silent."""
    arguments = next(a for n, _, a in sample_arguments(True) if n == name)
    result = getattr(operators, name)(*arguments)
    loss = (result[0] if isinstance(result, tuple) else result).sum()
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        loss.backward()


def test_arguments_are_not_modified():
    for name, case, arguments in sample_arguments(False):
        for form, given in (("_train", arguments), ("_backward", backward_arguments(name, arguments))):
            before = copy.deepcopy(given)
            getattr(operators, name + form)(*given)
            for a, b in zip(tensors_of(given), tensors_of(before), strict=True):
                assert torch.equal(a, b), f"{name}{form} {case}"


# ---- dtypes without a kernel ----


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ("conv_pool2d", "rnn", "rnn_cell")
        for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.complex64)
        if dtype != torch.bfloat16 or name == "rnn_cell"
    ],
    ids=str,
)
def test_raw_operator_refuses_other_dtypes(name, dtype):
    """The compiled operators name what they do not take; functional composes for those."""
    if reason := compiled_missing():
        pytest.skip(f"no compiled kernels: {reason}")
    make = {"conv_pool2d": conv_arguments, "rnn": rnn_arguments, "rnn_cell": cell_arguments}[name]

    arguments = [in_dtype(a, dtype) for a in make()]
    for form in ("", "_train"):
        with pytest.raises(RuntimeError, match=r"(?i)dtype|float32|float64"):
            getattr(operators, name + form)(*arguments)
