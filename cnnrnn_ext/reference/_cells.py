"""The recurrent cells: what each is to every layer of this package, and one step of it in plain PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Cell(NamedTuple):
    """One kind of recurrent cell.

    ``step(from_x, from_h, states, norm_c) -> (new states, kept)`` is one time step: from_x and from_h
    [N, G*H] are the products with the input and with h, biases included; states are (h, c) or (h,), each
    [N, H]; kept are the K values [N, H] that the backward needs (operators.schema).
    """

    gates: int  # G: a weight has G*H rows
    kept: int  # K
    states: int  # 2 with a cell state c, else 1
    blends: bool  # a new state is a mixture with the old one: under CPU autocast torch then keeps its dtype
    step: Callable


def _lstm(from_x, from_h, states, norm_c=None):
    """c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g),  h' = σ(o) ⊙ tanh(norm(c'))"""
    i, f, g, o = (from_x + from_h).chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c = f * states[1] + i * g
    shown = c if norm_c is None else F.layer_norm(c, c.shape[-1:], *norm_c)
    return (o * torch.tanh(shown), c), (i, f, g, o)


def _gru(from_x, from_h, states, norm_c=None):
    """h' = n + z ⊙ (h - n): the reset gate r multiplies W_hn h + b_hn, as in torch (and not h itself)."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, -1), from_h.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (states[0] - n),), (r, z, n, h_n)


def _rnn_tanh(from_x, from_h, states, norm_c=None):
    return (torch.tanh(from_x + from_h),), ()


def _rnn_relu(from_x, from_h, states, norm_c=None):
    return (torch.relu(from_x + from_h),), ()


CELLS = {
    "lstm": Cell(gates=4, kept=4, states=2, blends=True, step=_lstm),
    "gru": Cell(gates=3, kept=4, states=1, blends=True, step=_gru),
    "rnn_tanh": Cell(gates=1, kept=0, states=1, blends=False, step=_rnn_tanh),
    "rnn_relu": Cell(gates=1, kept=0, states=1, blends=False, step=_rnn_relu),
}
NONLINEARITIES = {"tanh": "rnn_tanh", "relu": "rnn_relu"}


def one_step(cell, input, states, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """(new states, kept) of a named cell; states None, or None among them, for zeros."""
    cell = CELLS[cell]
    zeros = input.new_zeros(input.shape[0], weight_hh.shape[1])
    states = tuple(zeros if s is None else s for s in states or (None,) * cell.states)
    from_x, from_h = F.linear(input, weight_ih, bias_ih), F.linear(states[0], weight_hh, bias_hh)
    return cell.step(from_x, from_h, states)


def lstm_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """One LSTM step; see ``functional.lstm_cell``."""
    return one_step("lstm", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)[0]


def gru_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """One GRU step; see ``functional.gru_cell``."""
    states = None if hx is None else (hx,)
    return one_step("gru", input, states, weight_ih, weight_hh, bias_ih, bias_hh)[0][0]


def rnn_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, nonlinearity="tanh"):
    """One step of an Elman network; see ``functional.rnn_cell``."""
    cell, states = NONLINEARITIES[nonlinearity], None if hx is None else (hx,)
    return one_step(cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh)[0][0]
