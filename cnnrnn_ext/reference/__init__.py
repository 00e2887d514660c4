"""The public functions in plain PyTorch: the correctness reference, and what runs where no kernel exists.

Same names and signatures as ``cnnrnn_ext.functional``. Imports nothing else of this package.
"""

from cnnrnn_ext.reference._cells import gru_cell, lstm_cell, rnn_cell
from cnnrnn_ext.reference._conv_pool import ACTIVATIONS, POOLS, conv_pool1d, conv_pool2d
from cnnrnn_ext.reference._rnn import gru, lstm, rnn

__all__ = [
    "ACTIVATIONS",
    "POOLS",
    "conv_pool1d",
    "conv_pool2d",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
]
