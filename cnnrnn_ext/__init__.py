"""Fast kernels for networks that join a CNN with an RNN, as drop-in PyTorch modules."""

from cnnrnn_ext import functional, models, reference
from cnnrnn_ext._backend import backend, trace
from cnnrnn_ext._version import __version__
from cnnrnn_ext.fuse import fuse_, unfuse_
from cnnrnn_ext.modules import GRU, LSTM, RNN, ConvPool1d, ConvPool2d, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ConvPool1d",
    "ConvPool2d",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "backend",
    "functional",
    "fuse_",
    "models",
    "reference",
    "trace",
    "unfuse_",
]
