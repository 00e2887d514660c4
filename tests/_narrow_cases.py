"""What the tests of weight_dtype= share: the modules, their operands."""

import torch
from torch import nn

import cnnrnn_ext as cx

T, N, I, H = 5, 3, 11, 13  # noqa: E741
DTYPES = (torch.bfloat16, torch.int8)
SEQUENCES = {"lstm": (cx.LSTM, nn.LSTM), "gru": (cx.GRU, nn.GRU), "rnn": (cx.RNN, nn.RNN)}
CELLS = {
    "lstm_cell": (cx.LSTMCell, nn.LSTMCell),
    "gru_cell": (cx.GRUCell, nn.GRUCell),
    "rnn_cell": (cx.RNNCell, nn.RNNCell),
}
KINDS = SEQUENCES | CELLS


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def make(kind, dtype, **options):
    return KINDS[kind][0](I, H, weight_dtype=dtype, **options)


def operands(kind, steps=T, batch=N):
    lead = (batch,) if kind in CELLS else (steps, batch)
    return torch.randn(*lead, I)


def edit_in_place(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(-1.5)
