"""The suite's own checks must fail on a wrong reference."""

import pytest
import torch
import torch.nn.functional as F
from _mutations import CHECKS, a_step_late, cuts_with, fails, lengths_with, mutate, never

from cnnrnn_ext import reference
from cnnrnn_ext.reference import _cells, _rnn


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
