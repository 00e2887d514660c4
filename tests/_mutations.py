"""What tests of mutations share: the suite's own checks, to be run on a wrong kernel; ways to be wrong."""

import functools

import test_cells
import test_conv_pool
import test_conv_pool_activations
import test_operators_gradients
import test_return_indices
import test_rnn
import test_rnn_lengths
import torch
from _oracle import CELLS
from torch.autograd.gradcheck import GradcheckError

from cnnrnn_ext.reference import _rnn

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
        f"{cell} gradcheck": lambda mode, cell=cell: test_operators_gradients.test_gradcheck(f"rnn, {cell}")
        for cell in CELLS
    },
    "lstm cell gradcheck": lambda mode: test_operators_gradients.test_gradcheck("rnn_cell, lstm"),
    "lengths": lambda mode: test_rnn_lengths.test_lengths_and_reset(mode, "gru", {}, "lengths", True),
    "reset": lambda mode: test_rnn_lengths.test_lengths_and_reset(mode, "gru", {}, "reset", True),
    "lengths both ways": lambda mode: test_rnn_lengths.test_lengths_and_reset(
        mode, "rnn", {"bidirectional": True}, "lengths", True
    ),
    "reset both ways": lambda mode: test_rnn_lengths.test_lengths_and_reset(
        mode, "lstm", {"bidirectional": True}, "reset", True
    ),
    "padding": lambda mode: test_rnn_lengths.test_padding_is_not_read(mode, "gru", True),
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
