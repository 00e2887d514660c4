"""Layers and their stock twins, for what no stock module has."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import cnnrnn_ext as cx

T, N, I, H = 7, 4, 5, 6  # noqa: E741
KINDS = {
    "lstm": ("lstm", nn.LSTM, cx.LSTM, {}),
    "gru": ("gru", nn.GRU, cx.GRU, {}),
    "rnn": ("rnn", nn.RNN, cx.RNN, {}),
    "rnn relu": ("rnn", nn.RNN, cx.RNN, {"nonlinearity": "relu"}),
}
LENGTHS = torch.tensor([3, 7, 0, 5])
OPTIONS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
]


def twins(kind, dtype=torch.float64, **options):
    _, stock_class, our_class, more = KINDS[kind]
    stock = stock_class(I, H, **options, **more).to(dtype)
    ours = our_class(I, H, **options, **more).to(dtype)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


def random_states(kind, rows, batch=N, hidden=H):
    states = [torch.randn(rows, batch, hidden, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    return tuple(states) if kind == "lstm" else states[0]


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in tensors(part)]


def part(states, direction, row):
    """One direction and row of the states [D, N, H], as [1, 1, H]."""
    if isinstance(states, torch.Tensor):
        return states[direction : direction + 1, row : row + 1]
    return tuple(part(s, direction, row) for s in states)


def check_alike(ours, theirs, leaves):
    """Two lists of tensors, and the gradients of one random loss of each."""
    weights = [torch.randn_like(y) for y in theirs]
    gradients = []
    for outputs in (ours, theirs):
        loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*gradients, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert not a.isnan().any()
        torch.testing.assert_close(*torch.broadcast_tensors(a.double(), b.double()))
