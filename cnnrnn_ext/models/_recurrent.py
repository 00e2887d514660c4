"""The recurrent layer of a model: chosen by name, the last states of its directions joined."""

import torch

from cnnrnn_ext._checks import check_choice, integers
from cnnrnn_ext._checks_rnn import check_rate
from cnnrnn_ext.modules import GRU, LSTM, RNN

RECURRENT = {
    "lstm": (LSTM, {}),
    "gru": (GRU, {}),
    "rnn": (RNN, {}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
}


def make_recurrent(kind, input_size, hidden_size, num_layers, bidirectional, dropout):
    """One of cnnrnn_ext's recurrent layers, time first; ``dropout`` between its layers, if it has several."""
    check_choice("rnn", kind, tuple(RECURRENT))
    check_rate("dropout", dropout)
    integers("hidden_size", hidden_size, 1, 1)
    integers("num_layers", num_layers, 1, 1)
    layer, options = RECURRENT[kind]
    between = dropout if num_layers > 1 else 0.0
    return layer(input_size, hidden_size, num_layers, bidirectional=bidirectional, dropout=between, **options)


def width_of(rnn):
    """The features of a step of its output, and of :func:`last_state`."""
    return rnn.hidden_size * (2 if rnn.bidirectional else 1)


def join_directions(state, rnn):
    """[num_layers*D, N, H] -> [num_layers, N, D*H]: the directions of each layer side by side."""
    if not rnn.bidirectional:
        return state
    return torch.cat((state[0::2], state[1::2]), dim=-1)


def last_state(states, rnn):
    """[N, D*H]: h of the last layer, after the last step of each direction."""
    h_n = states[0] if isinstance(states, tuple) else states
    return join_directions(h_n, rnn)[-1]
