"""The suite's own checks must fail on wrong kernels: mutations of the reference and of the operators.

The mutated operators are Python, put into the dispatcher in place of the compiled CPU kernels, and the
checks then run with ``backend("compiled")`` as they always do: what is tested here is that a wrong kernel
of this kind, behind that operator, cannot pass. That the checks do reach the C++ kernels and nothing else
is asserted elsewhere: test_backend.py (the dispatcher holds a CPU kernel for each operator, and no
convolution or product of torch runs beside it) and test_isa.py (the results change with CNNRNN_CPU_ISA).
Mutating the C++ sources themselves would take a build for each mutation, twenty seconds or more of two
cores; by hand it is worth doing after a change of the kernels: `>` to `>=` in ``compete`` of
csrc/cpu/conv_pool_forward.h, two gates exchanged in ``lstm_update`` of csrc/lstm_gates.h, ``z`` and ``1 - z``
in ``gru_update`` of csrc/gru_gates.h, ``t + 1`` turned ``t`` in ``resets`` of csrc/rnn_run.h.
"""

import contextlib
import functools
import warnings

import pytest
import test_cells
import test_conv_pool
import test_conv_pool_activations
import test_operators
import test_return_indices
import test_rnn
import test_rnn_features
import torch
import torch.nn.functional as F
from _oracle import CELLS
from torch.autograd.gradcheck import GradcheckError

from cnnrnn_ext import _library, _operator_conv_pool, _operator_rnn, reference
from cnnrnn_ext.functional import _conv_pool as _functional
from cnnrnn_ext.reference import _cells, _rnn

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
    "conv leaky": lambda mode: test_conv_pool_activations.test_against_torch(
        mode, "in registers", "leaky_relu", False
    ),
    "conv gelu": lambda mode: test_conv_pool_activations.test_every_window_of_special_values(
        mode, "gelu", test_conv_pool_activations.NUMBERS
    ),
    "conv average": lambda mode: test_conv_pool_activations.test_against_torch(
        mode, "one channel, 3/2 padded", "leaky_relu", False
    ),
    "conv indices": lambda mode: test_return_indices.test_indices_are_torchs(
        mode, "relu", "3/2 padded", (2, 3, 11, 12, 8, 3), False
    ),
    **{
        cell: functools.partial(test_rnn.test_against_torch, cell=cell, name="small", dtype=torch.float32)
        for cell in CELLS
    },
    "lstm float64": lambda mode: test_rnn.test_against_torch(mode, "lstm", "small", torch.float64),
    "lstm both ways": lambda mode: test_rnn.test_against_torch(mode, "lstm", "bidirectional", torch.float32),
    "gru both ways": lambda mode: test_rnn.test_against_torch(mode, "gru", "bidirectional", torch.float32),
    "lstm layers": lambda mode: test_rnn.test_against_torch(mode, "lstm", "two layers", torch.float32),
    "lstm states": lambda mode: test_rnn.test_any_subset_of_gradients(mode, "lstm", ("h_0", "c_0")),
    "gru state": lambda mode: test_rnn.test_any_subset_of_gradients(mode, "gru", ("h_0",)),
    **{
        f"{cell} cell": functools.partial(
            test_cells.test_against_torch, cell=cell, shape="small", bias=True, dtype=torch.float32
        )
        for cell in CELLS
    },
    **{
        f"{cell} gradcheck": lambda mode, cell=cell: test_operators.test_gradcheck(f"rnn, {cell}")
        for cell in CELLS
    },
    "lstm cell gradcheck": lambda mode: test_operators.test_gradcheck("rnn_cell, lstm"),
    "lengths": lambda mode: test_rnn_features.test_lengths_and_reset(mode, "gru", {}, "lengths", True),
    "reset": lambda mode: test_rnn_features.test_lengths_and_reset(mode, "gru", {}, "reset", True),
    "lengths both ways": lambda mode: test_rnn_features.test_lengths_and_reset(
        mode, "rnn", {"bidirectional": True}, "lengths", True
    ),
    "reset both ways": lambda mode: test_rnn_features.test_lengths_and_reset(
        mode, "lstm", {"bidirectional": True}, "reset", True
    ),
    "padding": lambda mode: test_rnn_features.test_padding_is_not_read(mode, "gru", True),
}


def fails(check, mode):
    """Whether the check refuses: by an assertion, or gradcheck's own error."""
    torch.manual_seed(0)
    try:
        check(mode)
    except (AssertionError, GradcheckError):
        return True
    return False


# A mutation is (dictionary or module, key or attribute, what stands there instead).


def mutate(monkeypatch, place, name, mutant):
    if isinstance(place, dict):
        monkeypatch.setitem(place, name, mutant)
    else:
        monkeypatch.setattr(place, name, mutant)


# ---- mutations of the reference ----


def with_step(cell, step):
    return _cells.CELLS, cell, _cells.CELLS[cell]._replace(step=step)


def swapped_gates(cell, first, second):
    """Two gates exchanged, in the products with the input and with the state."""
    kind = _cells.CELLS[cell]

    def exchanged(product):
        gates = list(product.chunk(kind.gates, -1))
        gates[first], gates[second] = gates[second], gates[first]
        return torch.cat(gates, -1)

    def step(from_x, from_h, states, norm_c=None):
        return kind.step(exchanged(from_x), exchanged(from_h), states, norm_c)

    return with_step(cell, step)


def no_tanh_of_c(from_x, from_h, states, norm_c=None):
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * c, c), ()


def mixed_the_other_way(from_x, from_h, states, norm_c=None):
    """z and 1 - z exchanged."""
    _, (_, z, n, _) = _cells._gru(from_x, from_h, states)
    return (states[0] + z * (n - states[0]),), ()


def without_reset_gate(from_x, from_h, states, norm_c=None):
    """n = tanh(x_n + h_n)"""
    (_, x_z, x_n), (_, h_z, h_n) = from_x.chunk(3, -1), from_h.chunk(3, -1)
    z, n = torch.sigmoid(x_z + h_z), torch.tanh(x_n + h_n)
    return (n + z * (states[0] - n),), ()


def scan_layer_with(change=lambda cell, w: w, arrange=lambda sequences, directions: sequences):
    """``scan_layer`` with its weights of each direction, or its outputs, changed."""
    right = _rnn.scan_layer

    def scan_layer(cell, x, states, weights, *rest, **more):
        changed = [change(cell, list(w)) for w in weights]
        sequences, *others = right(cell, x, states, changed, *rest, **more)
        return arrange(sequences, len(weights)), *others

    return _rnn, "scan_layer", scan_layer


def without_bias_hh(cell, weights):
    weights[3] = None if weights[3] is None else weights[3] * 0
    return weights


def bias_outside_the_reset(cell, weights):
    """bias_hn beside the input's part of n, where r does not reach it."""
    if weights[3] is not None:
        moved = weights[3] * (torch.arange(len(weights[3])) >= 2 * len(weights[3]) // 3)
        weights[2], weights[3] = weights[2] + moved, weights[3] - moved
    return weights


def outputs_exchanged(sequences, directions):
    """Both directions right, but concatenated in the other order."""
    if directions == 1:
        return sequences
    return tuple(torch.cat(s.chunk(2, -1)[::-1], -1) for s in sequences)


def directions_exchanged():
    right = _rnn._scan

    def scan(kind, rows, states, weights, sizes, valid, reset, reverse, *rest):
        return right(kind, rows, states, weights, sizes, valid, reset, not reverse, *rest)

    return _rnn, "_scan", scan


def lengths_with(module, change):
    right = _rnn.step_masks

    def step_masks(x, lengths, reset):
        return right(x, None if lengths is None else change(lengths), reset)

    return module, "step_masks", step_masks


def cuts_with(module, change):
    """``change(the right cuts, those of the other direction)`` in the reverse direction."""
    right = _rnn.cuts

    def cuts(reset, sizes, reverse):
        mine = right(reset, sizes, reverse)
        return change(mine, right(reset, sizes, False)) if reverse else mine

    return module, "cuts", cuts


def never(mine, others):
    return [cut & False for cut in mine]


def a_step_late(mine, others):
    return others


def conv_pool_with(change):
    def conv_pool2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **options):
        return change(input, weight, bias, stride, padding, dilation, groups, options)

    return reference, "conv_pool2d", conv_pool2d


RIGHT = reference.conv_pool2d


def last_tie_wins(input, weight, bias, stride, padding, dilation, groups, options):
    """`>` turned `>=`: of equal values the last wins. Windows must tile the map: true of "conv ties"."""
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = reference.ACTIVATIONS[options["activation"]](y)
    return F.max_pool2d(y.flip(2, 3), options["pool_size"], options["pool_stride"]).flip(2, 3)


def averages_without_padding(input, weight, bias, stride, padding, dilation, groups, options):
    """The divisor counts the map's positions alone."""
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = reference.ACTIVATIONS[options["activation"]](y)
    return F.avg_pool2d(y, *list(options.values())[2:6], count_include_pad=False)


REFERENCE_MUTATIONS = {
    "gates i and f swapped": (swapped_gates("lstm", 0, 1), ("lstm", "lstm float64", "lstm cell")),
    "gates f and g swapped": (swapped_gates("lstm", 1, 2), ("lstm", "lstm cell")),
    "gates g and o swapped (ONNX's order)": (swapped_gates("lstm", 2, 3), ("lstm", "lstm cell")),
    "tanh of c dropped": (with_step("lstm", no_tanh_of_c), ("lstm", "lstm cell")),
    "gates r and z swapped (ONNX's order)": (
        swapped_gates("gru", 0, 1),
        ("gru", "gru cell", "gru both ways", "lengths", "reset"),
    ),
    "gates z and n swapped": (swapped_gates("gru", 1, 2), ("gru", "gru cell")),
    "z and 1 - z exchanged": (with_step("gru", mixed_the_other_way), ("gru", "gru cell")),
    "reset gate dropped": (with_step("gru", without_reset_gate), ("gru", "gru cell")),
    "bias_hn outside the reset gate": (scan_layer_with(bias_outside_the_reset), ("gru", "gru both ways")),
    "tanh turned ReLU": (with_step("rnn_tanh", _cells._rnn_relu), ("rnn_tanh", "rnn_tanh cell")),
    "ReLU turned tanh": (with_step("rnn_relu", _cells._rnn_tanh), ("rnn_relu", "rnn_relu cell")),
    "bias_hh dropped": (scan_layer_with(without_bias_hh), ("lstm", "lstm layers", "gru", "rnn_tanh")),
    "directions exchanged": (directions_exchanged(), ("lstm", "lstm both ways", "gru both ways")),
    "outputs exchanged": (
        scan_layer_with(arrange=outputs_exchanged),
        ("lstm both ways", "gru both ways", "lengths both ways"),
    ),
    "a step too many": (lengths_with(_rnn, lambda n: n + 1), ("lengths", "lengths both ways", "padding")),
    "a step too few": (lengths_with(_rnn, lambda n: n - 1), ("lengths", "lengths both ways")),
    "reset ignored in reverse": (cuts_with(_rnn, never), ("reset both ways",)),
    "reset a step late in reverse": (cuts_with(_rnn, a_step_late), ("reset both ways",)),
    "conv bias dropped": (
        conv_pool_with(
            lambda x, w, b, *rest: RIGHT(x, w, None if b is None else b * 0, *rest[:4], **rest[4])
        ),
        ("conv", "conv bias"),
    ),
    "kernel flipped (a true convolution)": (
        conv_pool_with(lambda x, w, b, *rest: RIGHT(x, w.flip(2, 3), b, *rest[:4], **rest[4])),
        ("conv",),
    ),
    "last of a tie wins": (conv_pool_with(last_tie_wins), ("conv ties",)),
    "no activation": (
        conv_pool_with(lambda x, w, b, *rest: RIGHT(x, w, b, *rest[:4], **{**rest[4], "activation": "none"})),
        ("conv", "conv negative"),
    ),
    "leaky ReLU of another slope": (
        (reference.ACTIVATIONS, "leaky_relu", lambda y: F.leaky_relu(y, 0.011)),
        ("conv leaky", "conv average"),
    ),
    "averages divide by what they cover": (conv_pool_with(averages_without_padding), ("conv average",)),
}


@pytest.mark.parametrize("name", REFERENCE_MUTATIONS)
def test_mutated_reference_is_caught(name, monkeypatch):
    mutation, checks = REFERENCE_MUTATIONS[name]
    mutate(monkeypatch, *mutation)
    for check in checks:
        assert fails(CHECKS[check], "reference"), f"{check!r} passes with: {name}"


# ---- mutations of the operators, in place of the compiled kernels ----


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
