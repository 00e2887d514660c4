"""Checks of what the recurrent functions are given, in the manner of ``_checks``."""

import numbers

import torch

from cnnrnn_ext._backend import in_function_transform
from cnnrnn_ext._checks import check_same, check_tensor, shape_of
from cnnrnn_ext.reference._cells import CELLS
from cnnrnn_ext.reference._rnn import group_norms, group_weights

KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
NORMS = ("ln_ih", "ln_hh", "ln_c")


def check_rate(name, value):
    """A probability, as torch checks ``dropout``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Number) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")


def check_rates(cell, zoneout, recurrent_dropout):
    rates = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout,)
    if len(rates) not in (1, CELLS[cell].states):
        raise ValueError(f"zoneout: expected one number for the one state of {cell}, got {zoneout!r}")
    for rate in rates:
        check_rate("zoneout", rate)
    check_rate("recurrent_dropout", recurrent_dropout)


def check_sequence(cell, input, states, flat_weights, options):
    """Everything ``functional.lstm`` and its neighbours are given."""
    check_rates(cell, options.zoneout, options.recurrent_dropout)
    names = ("h_0", "c_0") if CELLS[cell].states == 2 else ("hx",)
    if states is not None:
        check_states(names, states)
    directions, proj_size = options.directions, options.proj_size
    kinds = [k for k in KINDS if (options.has_biases or "bias" not in k) and (proj_size or k != "weight_hr")]
    suffixes = _suffixes(options)
    count = len(kinds) * len(suffixes)
    if len(flat_weights) != count:
        raise RuntimeError(
            f"flat_weights: expected {count} tensors for num_layers={options.num_layers}, bidirectional="
            f"{options.bidirectional}, has_biases={options.has_biases}, proj_size={proj_size}, got "
            f"{len(flat_weights)}"
        )
    for index, weight in enumerate(flat_weights):
        name = kinds[index % len(kinds)] + suffixes[index // len(kinds)]
        check_tensor(f"flat_weights[{index}], {name}", weight)
    hidden = flat_weights[0].shape[0] // CELLS[cell].gates
    width = proj_size or hidden
    batch = _check_steps(input, options)
    for name, tensor, size in zip(names, states or (), (width, hidden), strict=False):
        check_same(name, tensor, "input", input)
        expected = [options.num_layers * directions, batch, size]
        if shape_of(tensor) != expected:
            raise RuntimeError(f"{name}: expected shape {expected}, got {shape_of(tensor)}")
    rows = CELLS[cell].gates * hidden
    for index, group in enumerate(group_weights(flat_weights, options)):
        features = input.shape[-1] if index < directions else width * directions
        check_gate_weights(input, group[:4], rows, features, width, suffixes[index])
        if proj_size:
            check_weight("weight_hr" + suffixes[index], group[4], [width, hidden], input)
    if options.layer_norm is not None:
        _check_norms(options.layer_norm, suffixes, (rows, rows, hidden), options.has_biases, input)


def _suffixes(options):
    """The end of the parameter names of each layer and direction, such as "_l1_reverse"."""
    ends = ("", "_reverse") if options.bidirectional else ("",)
    return [f"_l{layer}{end}" for layer in range(options.num_layers) for end in ends]


def check_states(names, states):
    if len(states) != len(names):
        raise RuntimeError(f"hx: expected two states ({', '.join(names)}), got {len(states)}")
    for name, state in zip(names, states, strict=True):
        check_tensor(name, state)


def _check_steps(input, options):
    """Checks input, batch_sizes, lengths and reset; returns the batch size."""
    batch_sizes, lengths, reset = options.batch_sizes, options.lengths, options.reset
    if input.dim() != (3 if batch_sizes is None else 2):
        expected = "[T, N, I] (or [N, T, I])" if batch_sizes is None else "packed [sum(batch_sizes), I]"
        raise RuntimeError(f"input: expected {expected}, got shape {shape_of(input)}")
    if batch_sizes is not None:
        _check_batch_sizes(batch_sizes, input)
    steps, batch = input.shape[0], input.shape[1]
    if options.batch_first:
        steps, batch = batch, steps
    if batch_sizes is not None:
        batch = int(batch_sizes[0])
    if lengths is not None:
        if batch_sizes is not None:
            raise RuntimeError("lengths: a packed input has its own, expected None")
        check_lengths(lengths, steps, batch)
    if reset is not None:
        check_tensor("reset", reset)
        expected = shape_of(input)[:-1]
        if reset.dtype != torch.bool or shape_of(reset) != expected:
            raise RuntimeError(
                f"reset: expected bool of shape {expected}, got {reset.dtype} of shape {shape_of(reset)}"
            )
        if reset.device != input.device:
            raise RuntimeError(f"reset: expected device {input.device} as input has, got {reset.device}")
    return batch


def check_lengths(lengths, steps, batch):
    check_tensor("lengths", lengths)
    integer = not (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool)
    if not integer or shape_of(lengths) != [batch]:
        raise RuntimeError(
            f"lengths: expected integers of shape [{batch}], got {lengths.dtype} of shape {shape_of(lengths)}"
        )
    # A graph being traced, or a transformed function, has no values to look at. Those on a GPU would have to
    # be waited for: its kernels keep them within bounds instead.
    if torch.compiler.is_compiling() or in_function_transform() or lengths.device.type != "cpu":
        return
    if ((lengths < 0) | (lengths > steps)).any():
        raise RuntimeError(f"lengths: expected values from 0 to {steps}, got {lengths.tolist()}")


def _check_batch_sizes(batch_sizes, input):
    check_tensor("batch_sizes", batch_sizes)
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.dim() != 1:
        raise RuntimeError("batch_sizes: expected [T] int64 on the CPU")
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or sizes != sorted(sizes, reverse=True) or sum(sizes) != input.shape[0]:
        raise RuntimeError(
            f"batch_sizes: expected positive sizes, none larger than the one before, that add up to input's "
            f"{input.shape[0]} rows, got {sizes}"
        )


def _check_norms(layer_norm, suffixes, widths, has_biases, input):
    kinds = [f"{name}_{kind}" for name in NORMS for kind in ("weight", "bias")[: 1 + has_biases]]
    if len(layer_norm) != len(kinds) * len(suffixes):
        raise RuntimeError(
            f"layer_norm: expected {len(kinds) * len(suffixes)} tensors, {', '.join(kinds)} of each layer "
            f"and direction, got {len(layer_norm)}"
        )
    for suffix, norms in zip(suffixes, group_norms(layer_norm, len(suffixes)), strict=True):
        for name, width, pair in zip(NORMS, widths, norms, strict=True):
            for kind, tensor in zip(("weight", "bias"), pair, strict=True):
                if tensor is not None:
                    check_weight(f"{name}_{kind}{suffix}", tensor, [width], input)


def check_gate_weights(input, weights, rows, features, state, suffix=""):
    """(weight_ih, weight_hh, bias_ih, bias_hh) of one layer and direction, the biases tensors or None."""
    shapes = ([rows, features], [rows, state], [rows], [rows])
    for name, weight, expected in zip(KINDS, weights, shapes, strict=False):
        if weight is not None:
            check_weight(name + suffix, weight, expected, input)


def check_weight(name, weight, expected, input):
    check_tensor(name, weight)
    check_same(name, weight, "input", input)
    if shape_of(weight) != expected:
        raise RuntimeError(
            f"{name}: expected shape {expected}, got {shape_of(weight)} (input {shape_of(input)})"
        )
