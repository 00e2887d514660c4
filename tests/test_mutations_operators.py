"""The suite's own checks must fail on wrong operators.

The mutants are Python, put into the dispatcher in place of the compiled CPU kernels, and the checks then run
with ``backend("compiled")`` as they always do: what is tested here is that a wrong kernel of this kind,
behind that operator, cannot pass. That the checks do reach the C++ kernels and nothing else is asserted
elsewhere: test_backend.py (the dispatcher holds a CPU kernel for each operator, and no convolution or product
of torch runs beside it) and test_isa.py (the results change with CNNRNN_CPU_ISA). Mutating the C++ sources
themselves would take a build for each mutation, twenty seconds or more of two cores; by hand it is worth
doing after a change of the kernels: `>` to `>=` in ``compete`` of csrc/cpu/conv_pool_forward.h, two gates
exchanged in ``lstm_update`` of csrc/lstm_gates.h, ``z`` and ``1 - z`` in ``gru_update`` of csrc/gru_gates.h,
``t + 1`` turned ``t`` in ``resets`` of csrc/rnn_run.h.
"""

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from _mutations import CHECKS, cuts_with, fails, lengths_with, mutate, never

from cnnrnn_ext import _library, _operator_conv_pool, _operator_rnn, reference
from cnnrnn_ext.functional import _conv_pool as _functional
from cnnrnn_ext.reference import _cells


def module_of(operator):
    return _operator_conv_pool if operator.startswith("conv_pool") else _operator_rnn


@contextlib.contextmanager
def operators_in_python():
    """The dispatcher's CPU kernels replaced by the operators in plain PyTorch, looked up at each call."""
    library = torch.library.Library("cnnrnn_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden is the purpose
        for schema in _library.schemas():
            name = schema.split("(")[0]
            library.impl(
                name,
                lambda *args, _name=name: getattr(module_of(_name), _name)(*args),
                "CPU",
                allow_override=True,
            )
    try:
        yield
    finally:
        library._destroy()


def gates_backward(cell, change):
    """``change(gradients of from_x, from_h, of the states beside, arguments)`` of the right ones."""
    right = _operator_rnn.GATES_BACKWARD[cell]

    def backward(*args):
        return change(*right(*args), args)

    return _operator_rnn.GATES_BACKWARD, cell, backward


def swapped_gradients(cell, first, second):
    gates = _cells.CELLS[cell].gates

    def exchanged(grad):
        parts = list(grad.chunk(gates, -1))
        parts[first], parts[second] = parts[second], parts[first]
        return torch.cat(parts, -1)

    return gates_backward(cell, lambda x, h, dh, dc, args: (exchanged(x), exchanged(h), dh, dc))


def dropped_incoming_c():
    right = _operator_rnn.GATES_BACKWARD["lstm"]

    def backward(grad_h, grad_c, *rest):
        return right(grad_h, torch.zeros_like(grad_c), *rest)

    return _operator_rnn.GATES_BACKWARD, "lstm", backward


def dropped_forget(x, h, dh, dc, args):
    grad_h, grad_c, _, after, kept = args
    return x, h, dh, grad_c + grad_h * kept[..., 3, :] * (1 - torch.tanh(after[1]) ** 2)


def linear_tanh(x, h, dh, dc, args):
    grad_h, _, _, after, _ = args
    grad = grad_h * (1 - after[0].abs())
    return grad, grad, dh, dc


def leaky_relu(x, h, dh, dc, args):
    return args[0], args[0], dh, dc


def changed_code(change):
    right = _operator_conv_pool.conv_pool2d_train

    def conv_pool2d_train(*args):
        y, code, kept = right(*args)
        return y, change(y, code), kept

    return _operator_conv_pool, "conv_pool2d_train", conv_pool2d_train


def changed_backward(name, change):
    right = getattr(module_of(name), name)

    def backward(*args):
        return change(right(*args))

    return module_of(name), name, backward


def direction_bias_dropped(gradients):
    return *gradients[:6], [b * (d == 0) for d, b in enumerate(gradients[6])]


def an_error_of_a_thousandth(gradients):
    spoiled = [w * (1 + 1e-3 * (torch.arange(w.shape[0]) == 5))[:, None].to(w) for w in gradients[4]]
    return *gradients[:4], spoiled, *gradients[5:]


def last_tie_code(*args):
    y, code, kept = RIGHT_TRAIN(*args)
    x, weight, bias, stride, padding, dilation, groups, activation, _, size, step = args[:11]
    conv = reference.ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, padding, dilation, groups))
    windows = F.unfold(conv.flatten(0, 1)[:, None], size, stride=step)
    best = windows.max(1, keepdim=True).values
    last = size[0] * size[1] - 1 - (windows == best).flip(1).int().argmax(1)
    last = last.view(y.shape).to(torch.uint8)
    return y, torch.where(code == 255, code, last), kept


RIGHT_TRAIN = _operator_conv_pool.conv_pool2d_train


def swallows_nan(*args):
    y, *saved = RIGHT_TRAIN(*args)
    return torch.nan_to_num(y, nan=0.0), *saved


def whole_windows_divide(*args):
    """The divisor of a window that hangs over the pool's padding is that of any other."""
    y, *saved = RIGHT_TRAIN(*args)
    if args[8] != "avg":
        return y, *saved
    window = args[9][0] * args[9][1]
    return F.avg_pool2d(saved[1], *args[9:13], divisor_override=window), *saved


def first_alive(*args):
    """The pool before an activation that falls: the largest argument wins."""
    y, code, kept = RIGHT_TRAIN(*args[:7], "none", *args[8:])
    return reference.ACTIVATIONS[args[7]](y), code, y if args[7] in _operator_conv_pool.KEPT else kept


def gradients_with(activation, gradient):
    return _operator_conv_pool.ACTIVATION_GRADIENTS, activation, gradient


OPERATOR_MUTATIONS = {
    "leaky ReLU's gradient of another slope": (
        gradients_with("leaky_relu", lambda grad, y: torch.ops.aten.leaky_relu_backward(grad, y, 0.02, True)),
        ("conv leaky", "conv average"),
    ),
    "averages of whole windows": (
        (_operator_conv_pool, "conv_pool2d_train", whole_windows_divide),
        ("conv average",),
    ),
    "gelu after the pool": ((_operator_conv_pool, "conv_pool2d_train", first_alive), ("conv gelu",)),
    "a dead window's index in the padding": (
        (_functional, "winner_index", lambda code, *rest: _operator_conv_pool.window_index(code, *rest)),
        ("conv indices",),
    ),
    "last of a tie wins": ((_operator_conv_pool, "conv_pool2d_train", last_tie_code), ("conv ties",)),
    "NaN swallowed": ((_operator_conv_pool, "conv_pool2d_train", swallows_nan), ("conv nan",)),
    "dead windows pass a gradient": (
        changed_code(lambda y, code: torch.where(code == 255, 0, code)),
        ("conv negative", "conv zero", "conv"),
    ),
    "code transposed": (
        changed_code(
            lambda y, code: torch.where(code == 1, 2, torch.where(code == 2, 1, code)).to(torch.uint8)
        ),
        ("conv ties", "conv", "conv padded pool"),
    ),
    "grad_bias dropped": (
        changed_backward("conv_pool2d_backward", lambda g: (g[0], g[1], g[2] * 0)),
        ("conv", "conv bias"),
    ),
    "grad_x of one column too few": (
        changed_backward("conv_pool2d_backward", lambda g: (F.pad(g[0][..., :-1], (0, 1)), *g[1:])),
        ("conv",),
    ),
    "gradients of i and f swapped": (
        swapped_gradients("lstm", 0, 1),
        ("lstm", "lstm cell", "lstm gradcheck"),
    ),
    "gradients of g and o swapped": (
        swapped_gradients("lstm", 2, 3),
        ("lstm", "lstm cell", "lstm cell gradcheck"),
    ),
    "gradients of r and z swapped": (
        swapped_gradients("gru", 0, 1),
        ("gru", "gru cell", "gru gradcheck", "lengths", "reset"),
    ),
    "grad_c dropped": (dropped_incoming_c(), ("lstm", "lstm cell", "lstm both ways")),
    "forget gate dropped from grad_c": (
        gates_backward("lstm", dropped_forget),
        ("lstm", "lstm states", "lstm cell"),
    ),
    "z * h_prev dropped": (
        gates_backward("gru", lambda x, h, dh, dc, args: (x, h, dh * 0, dc)),
        ("gru", "gru state", "gru cell", "gru gradcheck"),
    ),
    "reset gate dropped from the gradient of n_h": (
        gates_backward("gru", lambda x, h, dh, dc, args: (x, x, dh, dc)),
        ("gru", "gru cell", "gru both ways", "gru gradcheck"),
    ),
    "1 - |h| for 1 - h²": (
        gates_backward("rnn_tanh", linear_tanh),
        ("rnn_tanh", "rnn_tanh cell", "rnn_tanh gradcheck"),
    ),
    "ReLU passes every gradient": (
        gates_backward("rnn_relu", leaky_relu),
        ("rnn_relu", "rnn_relu cell", "rnn_relu gradcheck"),
    ),
    "grad_h_0 dropped": (
        changed_backward("rnn_backward", lambda g: (g[0], g[1] * 0, *g[2:])),
        ("lstm", "lstm states", "gru state", "rnn_tanh", "lstm gradcheck", "gru gradcheck"),
    ),
    "grad_bias of one direction": (
        changed_backward("rnn_backward", direction_bias_dropped),
        ("lstm both ways", "gru both ways"),
    ),
    "an error of a thousandth in one unit": (
        changed_backward("rnn_backward", an_error_of_a_thousandth),
        ("lstm", "lstm float64", "lstm both ways", "gru", "rnn_tanh"),
    ),
    "gradients a step too many": (
        lengths_with(_operator_rnn, lambda n: n + 1),
        ("lengths", "lengths both ways"),
    ),
    "gradients a step too few": (
        lengths_with(_operator_rnn, lambda n: n - 1),
        ("lengths", "lengths both ways"),
    ),
    "gradients through a reset in reverse": (cuts_with(_operator_rnn, never), ("reset both ways",)),
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
    mutation, checks = OPERATOR_MUTATIONS[name]
    with operators_in_python():
        mutate(monkeypatch, *mutation)
        for check in checks:
            assert fails(CHECKS[check], compiled), f"{check!r} passes with: {name}"
