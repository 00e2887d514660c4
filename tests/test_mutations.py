"""The suite's own checks must fail on wrong kernels: mutations of the reference and of the operators.

The mutated operators are Python, put into the dispatcher in place of the compiled CPU kernels, and the
checks then run with ``backend("compiled")`` as they always do: what is tested here is that a wrong kernel
of this kind, behind that operator, cannot pass. That the checks do reach the C++ kernels and nothing else
is asserted elsewhere: test_backend.py (the dispatcher holds a CPU kernel for each operator, and no
convolution or product of torch runs beside it) and test_isa.py (the results change with CNNRNN_CPU_ISA).
Mutating the C++ sources themselves would take a build for each mutation, twenty seconds or more of two
cores; by hand it is worth doing after a change of the kernels: `>` to `>=` in ``compete`` of
csrc/cpu/conv_pool_forward.h, two gates exchanged in ``lstm_update`` of csrc/lstm_gates.h.
"""

import contextlib
import warnings

import pytest
import test_cells
import test_conv_pool
import test_lstm
import test_operators
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import GradcheckError

from cnnrnn_ext import _library, _operator_reference, reference

CHECKS = {
    "conv": lambda mode: test_conv_pool.test_against_torch(mode, "default", torch.float32),
    "conv bias": lambda mode: test_conv_pool.test_against_torch(mode, "kernel 1", torch.float64),
    "conv ties": test_conv_pool.test_every_winning_position,
    "conv overlap": test_conv_pool.test_overlapping_windows_add_their_gradients,
    "conv padded pool": lambda mode: test_conv_pool.test_ties_are_torchs(mode, "pool 3/2 padded"),
    "conv negative": test_conv_pool.test_all_negative_windows_have_no_gradient,
    "conv zero": test_conv_pool.test_zero_has_no_gradient,
    "conv nan": lambda mode: test_conv_pool.test_special_value_at_each_position(
        mode, "relu", float("nan"), {}
    ),
    "lstm": lambda mode: test_lstm.test_against_torch(mode, "small", torch.float32),
    "lstm float64": lambda mode: test_lstm.test_against_torch(mode, "small", torch.float64),
    "lstm both ways": lambda mode: test_lstm.test_against_torch(mode, "bidirectional", torch.float32),
    "lstm layers": lambda mode: test_lstm.test_against_torch(mode, "two layers", torch.float32),
    "lstm states": lambda mode: test_lstm.test_any_subset_of_gradients(mode, ("h_0", "c_0")),
    "cell": lambda mode: test_cells.test_against_torch(mode, "small", True, torch.float32),
    "cell gradcheck": lambda mode: test_operators.test_gradcheck("lstm_cell"),
    "lstm gradcheck": lambda mode: test_operators.test_gradcheck("lstm"),
}


def fails(check, mode):
    """Whether the check refuses: by an assertion, or gradcheck's own error."""
    torch.manual_seed(0)
    try:
        check(mode)
    except (AssertionError, GradcheckError):
        return True
    return False


# ---- mutations of reference.py ----


def swapped_gates(first, second):
    def lstm_gates(preactivation, c):
        gates = list(preactivation.chunk(4, -1))
        gates[first], gates[second] = gates[second], gates[first]
        i, f, g, o = gates
        c_1 = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c_1), c_1

    return lstm_gates


def no_tanh_of_c(preactivation, c):
    i, f, g, o = preactivation.chunk(4, -1)
    c_1 = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * c_1, c_1


def without_bias_hh(layer):
    def lstm_layer(x, h_0, c_0, weights, batch_sizes=None):
        weights = [(w[0], w[1], w[2], None if w[3] is None else w[3] * 0, w[4]) for w in weights]
        return layer(x, h_0, c_0, weights, batch_sizes)

    return lstm_layer


def directions_exchanged(scan):
    def lstm_scan(*args, reverse):
        return scan(*args, reverse=not reverse)

    return lstm_scan


def outputs_exchanged(layer):
    """Both directions right, but concatenated in the other order."""

    def lstm_layer(*args):
        output, h_n, c_n = layer(*args)
        return torch.cat(output.chunk(2, -1)[::-1], -1) if len(args[3]) > 1 else output, h_n, c_n

    return lstm_layer


def conv_pool_with(change):
    def conv_pool2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **options):
        return change(input, weight, bias, stride, padding, dilation, groups, options)

    return conv_pool2d


RIGHT = reference.conv_pool2d


def last_tie_wins(input, weight, bias, stride, padding, dilation, groups, options):
    """`>` turned `>=`: of equal values the last wins. Windows must tile the map: true of "conv ties"."""
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = reference.ACTIVATIONS[options["activation"]](y)
    return F.max_pool2d(y.flip(2, 3), options["pool_size"], options["pool_stride"]).flip(2, 3)


REFERENCE_MUTATIONS = {
    "gates i and f swapped": ("lstm_gates", swapped_gates(0, 1), ("lstm", "lstm float64", "cell")),
    "gates f and g swapped": ("lstm_gates", swapped_gates(1, 2), ("lstm", "cell")),
    "gates g and o swapped (ONNX's order)": ("lstm_gates", swapped_gates(2, 3), ("lstm", "cell")),
    "tanh of c dropped": ("lstm_gates", no_tanh_of_c, ("lstm", "cell")),
    "bias_hh dropped": ("lstm_layer", without_bias_hh(reference.lstm_layer), ("lstm", "lstm layers")),
    "directions exchanged": (
        "_lstm_scan",
        directions_exchanged(reference._lstm_scan),
        ("lstm", "lstm both ways"),
    ),
    "outputs exchanged": ("lstm_layer", outputs_exchanged(reference.lstm_layer), ("lstm both ways",)),
    "conv bias dropped": (
        "conv_pool2d",
        conv_pool_with(
            lambda x, w, b, *rest: RIGHT(x, w, None if b is None else b * 0, *rest[:4], **rest[4])
        ),
        ("conv", "conv bias"),
    ),
    "kernel flipped (a true convolution)": (
        "conv_pool2d",
        conv_pool_with(lambda x, w, b, *rest: RIGHT(x, w.flip(2, 3), b, *rest[:4], **rest[4])),
        ("conv",),
    ),
    "last of a tie wins": ("conv_pool2d", conv_pool_with(last_tie_wins), ("conv ties",)),
    "no activation": (
        "conv_pool2d",
        conv_pool_with(lambda x, w, b, *rest: RIGHT(x, w, b, *rest[:4], **{**rest[4], "activation": "none"})),
        ("conv", "conv negative"),
    ),
}


@pytest.mark.parametrize("name", REFERENCE_MUTATIONS)
def test_mutated_reference_is_caught(name, monkeypatch):
    attribute, mutant, checks = REFERENCE_MUTATIONS[name]
    monkeypatch.setattr(reference, attribute, mutant)
    for check in checks:
        assert fails(CHECKS[check], "reference"), f"{check!r} passes with: {name}"


# ---- mutations of the operators, in place of the compiled kernels ----


@contextlib.contextmanager
def operators_in_python():
    """The dispatcher's CPU kernels replaced by _operator_reference's functions, looked up at each call."""
    library = torch.library.Library("cnnrnn_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is the purpose
        for schema in _library.schemas():
            name = schema.split("(")[0]
            library.impl(
                name,
                lambda *args, _name=name: getattr(_operator_reference, _name)(*args),
                "CPU",
                allow_override=True,
            )
    try:
        yield
    finally:
        library._destroy()


def swapped_gradients(first, second):
    right = _operator_reference._gates_backward

    def gates_backward(*args):
        gates, grad_c = right(*args)
        gates = list(gates.chunk(4, -1))
        gates[first], gates[second] = gates[second], gates[first]
        return torch.cat(gates, -1), grad_c

    return gates_backward


def with_grad_c(change):
    right = _operator_reference._gates_backward

    def gates_backward(grad_h, grad_c, c, reserve):
        return change(right, grad_h, grad_c, c, reserve)

    return gates_backward


def dropped_incoming_c(right, grad_h, grad_c, c, reserve):
    return right(grad_h, torch.zeros_like(grad_c), c, reserve)


def dropped_forget(right, grad_h, grad_c, c, reserve):
    gates, _ = right(grad_h, grad_c, c, reserve)
    o, c_1 = reserve.unbind(-2)[3:]
    return gates, grad_c + grad_h * o * (1 - torch.tanh(c_1) ** 2)


def changed_code(change):
    right = _operator_reference.conv_pool2d_train

    def conv_pool2d_train(*args):
        y, code = right(*args)
        return y, change(y, code)

    return conv_pool2d_train


def changed_backward(name, change):
    right = getattr(_operator_reference, name)

    def backward(*args):
        return change(right(*args))

    return backward


def last_tie_code(*args):
    y, code = RIGHT_TRAIN(*args)
    x, weight, bias, stride, padding, dilation, groups, activation, _, size, step = args[:11]
    conv = reference.ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation, groups))
    windows = F.unfold(conv.flatten(0, 1)[:, None], size, stride=step)
    best = windows.max(1, keepdim=True).values
    last = size[0] * size[1] - 1 - (windows == best).flip(1).int().argmax(1)
    last = last.view(y.shape).to(torch.uint8)
    return y, torch.where(code == 255, code, last)


RIGHT_TRAIN = _operator_reference.conv_pool2d_train


def swallows_nan(*args):
    y, code = RIGHT_TRAIN(*args)
    return torch.nan_to_num(y, nan=0.0), code


OPERATOR_MUTATIONS = {
    "last of a tie wins": ("conv_pool2d_train", last_tie_code, ("conv ties",)),
    "NaN swallowed": ("conv_pool2d_train", swallows_nan, ("conv nan",)),
    "dead windows pass a gradient": (
        "conv_pool2d_train",
        changed_code(lambda y, code: torch.where(code == 255, 0, code)),
        ("conv negative", "conv zero", "conv"),
    ),
    "code transposed": (
        "conv_pool2d_train",
        changed_code(
            lambda y, code: torch.where(code == 1, 2, torch.where(code == 2, 1, code)).to(torch.uint8)
        ),
        ("conv ties", "conv", "conv padded pool"),
    ),
    "grad_bias dropped": (
        "conv_pool2d_backward",
        changed_backward("conv_pool2d_backward", lambda g: (g[0], g[1], g[2] * 0)),
        ("conv", "conv bias"),
    ),
    "grad_x of one column too few": (
        "conv_pool2d_backward",
        changed_backward("conv_pool2d_backward", lambda g: (F.pad(g[0][..., :-1], (0, 1)), *g[1:])),
        ("conv",),
    ),
    "gradients of i and f swapped": (
        "_gates_backward",
        swapped_gradients(0, 1),
        ("lstm", "cell", "lstm gradcheck"),
    ),
    "gradients of g and o swapped": (
        "_gates_backward",
        swapped_gradients(2, 3),
        ("lstm", "cell", "cell gradcheck"),
    ),
    "grad_c dropped": (
        "_gates_backward",
        with_grad_c(dropped_incoming_c),
        ("lstm", "cell", "lstm both ways"),
    ),
    "forget gate dropped from grad_c": (
        "_gates_backward",
        with_grad_c(dropped_forget),
        ("lstm", "lstm states", "cell"),
    ),
    "grad_h_0 dropped": (
        "lstm_backward",
        changed_backward("lstm_backward", lambda g: (g[0], g[1] * 0, *g[2:])),
        ("lstm", "lstm states", "lstm gradcheck"),
    ),
    "grad_bias of one direction": (
        "lstm_backward",
        changed_backward("lstm_backward", lambda g: (*g[:5], [b * (d == 0) for d, b in enumerate(g[5])])),
        ("lstm both ways",),
    ),
    "an error of a thousandth in one unit": (
        "lstm_backward",
        changed_backward(
            "lstm_backward",
            lambda g: (
                *g[:4],
                [w * (1 + 1e-3 * (torch.arange(w.shape[0]) == 5))[:, None].to(w) for w in g[4]],
                g[5],
            ),
        ),
        ("lstm", "lstm float64", "lstm both ways"),
    ),
}


def test_unmutated_operators_pass(compiled):
    """The control: with the replacement alone, every check passes. A failure below is the mutation's."""
    with operators_in_python():
        for name, check in CHECKS.items():
            assert not fails(check, compiled), name
    for check in CHECKS.values():
        assert not fails(check, compiled)


@pytest.mark.parametrize("name", OPERATOR_MUTATIONS)
def test_mutated_operator_is_caught(compiled, name, monkeypatch):
    attribute, mutant, checks = OPERATOR_MUTATIONS[name]
    with operators_in_python():
        monkeypatch.setattr(_operator_reference, attribute, mutant)
        for check in checks:
            assert fails(CHECKS[check], compiled), f"{check!r} passes with: {name}"
