"""Fast kernels for networks that join a CNN with an RNN, as drop-in PyTorch modules."""

from cnnrnn_ext import functional, models, reference
from cnnrnn_ext._backend import backend, trace
from cnnrnn_ext._version import __version__
from cnnrnn_ext.modules import LSTM, ConvPool1d, ConvPool2d, LSTMCell

__all__ = [
    "LSTM",
    "ConvPool1d",
    "ConvPool2d",
    "LSTMCell",
    "__version__",
    "backend",
    "functional",
    "models",
    "reference",
    "trace",
]
