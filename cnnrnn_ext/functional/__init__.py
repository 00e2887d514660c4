"""The public functions: user-level checks and layout, then one operator call.

Each has a twin of the same name and signature in ``cnnrnn_ext.reference``, which runs where no compiled
kernel serves the device, dtype or configuration; ``cnnrnn_ext.trace`` tells which ran, and why.
"""

from cnnrnn_ext.functional._cells import gru_cell, lstm_cell, rnn_cell
from cnnrnn_ext.functional._conv_pool import PRECISIONS, conv_pool1d, conv_pool2d
from cnnrnn_ext.functional._rnn import gru, lstm, rnn

__all__ = [
    "PRECISIONS",
    "conv_pool1d",
    "conv_pool2d",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
]
