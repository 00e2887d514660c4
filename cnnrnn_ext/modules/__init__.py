"""Drop-in modules: parameters as torch.nn's, and one functional call each."""

from cnnrnn_ext.modules.cells import LSTMCell
from cnnrnn_ext.modules.conv_pool import ConvPool1d, ConvPool2d
from cnnrnn_ext.modules.rnn import LSTM

__all__ = ["LSTM", "ConvPool1d", "ConvPool2d", "LSTMCell"]
