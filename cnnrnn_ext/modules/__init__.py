"""Drop-in modules: parameters as torch.nn's, and one functional call each."""

from cnnrnn_ext.modules.cells import GRUCell, LSTMCell, RNNCell
from cnnrnn_ext.modules.conv_pool import ConvPool1d, ConvPool2d
from cnnrnn_ext.modules.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "ConvPool1d", "ConvPool2d", "GRUCell", "LSTMCell", "RNNCell"]
