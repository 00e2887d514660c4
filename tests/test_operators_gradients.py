"""The raw operators' gradients: gradcheck and gradgradcheck of each, and those not asked for."""

import copy
import functools
import itertools

import pytest
import torch
from _operator_cases import (
    CONV_CONFIGS,
    GRADIENTS,
    SAVED,
    backward_arguments,
    cell_arguments,
    conv_arguments,
    detached,
    operators,
    rnn_arguments,
    with_conv_saved,
)
from _oracle import CELLS


def run_flat(operator, arguments, positions, kept):
    """``operator`` as a function of the tensors at ``positions`` (nested positions as pairs)."""

    def function(*tensors):
        filled = list(copy.copy(arguments))
        for position, tensor in zip(positions, tensors, strict=True):
            if isinstance(position, tuple):
                filled[position[0]] = [*filled[position[0]]]
                filled[position[0]][position[1]] = tensor
            else:
                filled[position] = tensor
        outputs = operator(*filled)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        flat = [t for o in outputs for t in (o if isinstance(o, (tuple, list)) else (o,))]
        return tuple(t for t in flat[:kept] if t.requires_grad)

    tensors = []
    for position in positions:
        source = arguments[position[0]][position[1]] if isinstance(position, tuple) else arguments[position]
        tensors.append(source.detach().clone().requires_grad_())
    return function, tensors


def tensor_positions(arguments):
    """Positions of every floating-point tensor, those in lists too."""
    positions = []
    for i, a in enumerate(arguments):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            positions.append(i)
        elif isinstance(a, list):
            positions += [(i, j) for j, t in enumerate(a) if isinstance(t, torch.Tensor)]
    return positions


def shrunk_conv(config, bias=True):
    """A small, well separated problem: no two positions of a window within the step of gradcheck."""
    config = CONV_CONFIGS[config]
    x = torch.randperm(2 * 5 * 5).view(1, 2, 5, 5).double() / 7 - 3
    weight = (torch.randperm(2 * 2 // config[3] * 9).view(2, 2 // config[3], 3, 3).double() - 15.3) / 11
    bias = torch.tensor([0.1234, -0.4321], dtype=torch.float64) if bias else None
    return (x, weight, bias, *config)


small_rnn = functools.partial(rnn_arguments, dtype=torch.float64, hidden=2)
small_cell = functools.partial(cell_arguments, dtype=torch.float64, hidden=2)
SMALL_RNNS = {
    **{cell: {"cell": cell, "steps": 3} for cell in CELLS},
    **{f"{cell}, bidirectional": {"cell": cell, "directions": 2, "steps": 2} for cell in CELLS},
    "lstm, no bias": {"cell": "lstm", "steps": 2, "bias": False},
    **{
        f"{cell}, {given}": {"cell": cell, "steps": 3, "directions": 1 + (cell == "gru"), "given": given}
        for cell in ("lstm", "gru", "rnn_tanh")
        for given in ("packed", "lengths", "reset", "lengths and reset")
    },
    **{f"{cell}, no states": {"cell": cell, "steps": 2, "state": False} for cell in ("lstm", "gru")},
}
GRAD_CASES = {
    "conv_pool2d": ("conv_pool2d", lambda: shrunk_conv("default")),
    "conv_pool2d, everything": ("conv_pool2d", lambda: shrunk_conv("everything")),
    "conv_pool2d, no bias": ("conv_pool2d", lambda: shrunk_conv("default", bias=False)),
    **{
        f"conv_pool2d, {case}": ("conv_pool2d", functools.partial(shrunk_conv, case))
        for case in ("tanh", "gelu", "average", "average of silu", "average of elu")
    },
    **{
        f"rnn, {name}": ("rnn", functools.partial(small_rnn, **options))
        for name, options in SMALL_RNNS.items()
    },
    **{f"rnn_cell, {cell}": ("rnn_cell", functools.partial(small_cell, cell)) for cell in CELLS},
    "rnn_cell, lstm, no bias": ("rnn_cell", functools.partial(small_cell, "lstm", bias=False)),
    "rnn_cell, gru, no states": ("rnn_cell", functools.partial(small_cell, "gru", state=False)),
    "rnn_cell, lstm, no states": ("rnn_cell", functools.partial(small_cell, "lstm", state=False)),
}


@pytest.mark.pure
@pytest.mark.parametrize("case", GRAD_CASES)
def test_gradcheck(case):
    name, make = GRAD_CASES[case]
    arguments = make()
    function, tensors = run_flat(
        getattr(operators, name + "_train"), arguments, tensor_positions(arguments), GRADIENTS[name]
    )
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("case", GRAD_CASES)
def test_gradgradcheck(case):
    """The second derivative, through the backward operator's own gradient."""
    name, make = GRAD_CASES[case]
    arguments = make()
    function, tensors = run_flat(
        getattr(operators, name + "_train"), arguments, tensor_positions(arguments), GRADIENTS[name]
    )
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", GRAD_CASES)
def test_backward_operator_has_the_gradient_of_its_formula(case):
    """gradcheck of NAME_backward itself, the saved tensors recomputed with the inputs they depend on."""
    name, make = GRAD_CASES[case]
    forward = make()
    arguments = backward_arguments(name, forward)
    count = GRADIENTS[name]

    def backward(*filled):
        inputs = filled[count : count + len(forward)]
        kept = getattr(operators, name + "_train")(*detached(inputs))
        if name == "conv_pool2d":
            return operators.conv_pool2d_backward(filled[0], *with_conv_saved(inputs, kept), *(True,) * 3)
        saved = [kept[i] for i in SAVED[name]]
        return getattr(operators, name + "_backward")(*filled[: count + len(forward)], *saved, *(True,) * 4)

    if name == "conv_pool2d":
        arguments = (*arguments[:1], *forward)
    positions = tensor_positions(arguments[: count + len(forward)])
    function, tensors = run_flat(backward, arguments, positions, 99)
    assert torch.autograd.gradcheck(function, tensors)


# ---- gradients not asked for ----


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_conv_pool2d_backward_computes_what_is_asked(wanted):
    forward = conv_arguments()
    full = operators.conv_pool2d_backward(*backward_arguments("conv_pool2d", forward))
    need = [i == wanted for i in range(3)]
    torch.manual_seed(1)
    arguments = backward_arguments("conv_pool2d", forward)
    full = operators.conv_pool2d_backward(*arguments)
    partial = operators.conv_pool2d_backward(*arguments[:-3], *need)
    for i in range(3):
        if i == wanted:
            assert torch.equal(full[i], partial[i])
        else:
            assert list(partial[i].shape) == [0]


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["rnn", "rnn_cell"])
def test_rnn_backward_computes_what_is_asked(name, cell, wanted):
    arguments = backward_arguments(name, rnn_arguments(cell, 2) if name == "rnn" else cell_arguments(cell))
    operator = getattr(operators, name + "_backward")
    full = operator(*arguments)
    partial = operator(*arguments[:-4], *[i == wanted for i in range(4)])
    groups = {0: [0], 1: [1, 2], 2: [3, 4], 3: [5, 6]}
    assert len(full) == 7
    for i in range(7):
        if i in groups[wanted]:
            torch.testing.assert_close(full[i], partial[i], rtol=0, atol=0)
        elif isinstance(partial[i], list):
            assert partial[i] == []
        else:
            assert list(partial[i].shape) == [0]


@pytest.mark.parametrize(
    "missing", [m for n in (1, 2, 3) for m in itertools.combinations(range(4), n)], ids=str
)
def test_missing_incoming_gradient_is_zero(missing):
    arguments = backward_arguments("rnn", rnn_arguments("lstm", 2))
    zeros = [torch.zeros_like(g) if i in missing else g for i, g in enumerate(arguments[:4])]
    absent = [None if i in missing else g for i, g in enumerate(arguments[:4])]
    full = operators.rnn_backward(*zeros, *arguments[4:])
    partial = operators.rnn_backward(*absent, *arguments[4:])
    for a, b in zip(full, partial, strict=True):
        torch.testing.assert_close(a, b)
