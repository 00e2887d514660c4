"""The recurrent layer of a model: chosen by name, run over padded rows, its last states joined."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cnnrnn_ext._checks import check_choice, integers
from cnnrnn_ext._checks_rnn import check_rate
from cnnrnn_ext.modules import GRU, LSTM, RNN

RECURRENT = {
    "lstm": (LSTM, {}),
    "gru": (GRU, {}),
    "rnn": (RNN, {}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
}
STOCK = (nn.LSTM, nn.GRU, nn.RNN)


def make_recurrent(kind, input_size, hidden_size, num_layers, bidirectional, dropout):
    """One of cnnrnn_ext's recurrent layers, time first; ``dropout`` between its layers if there are several."""
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


def run_recurrent(rnn, x, lengths=None):
    """(output [T, N, D*H], states as ``rnn`` gives them) of x [T, N, I], rows ending after their lengths.

    The output behind a row's end is 0. A stock layer in place of ours (``unfuse_``) has no ``lengths=`` and
    gets a packed sequence.
    """
    if lengths is None:
        return rnn(x)
    if not isinstance(rnn, STOCK):
        return rnn(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), enforce_sorted=False)
    output, states = rnn(packed)
    output, _ = pad_packed_sequence(output, total_length=x.shape[0])
    # Packing has no rows of no steps: those got one, whose results are dropped here.
    empty = (lengths < 1).to(x.device)[:, None]
    output = output.masked_fill(empty, 0.0)
    if isinstance(states, tuple):
        return output, tuple(state.masked_fill(empty, 0.0) for state in states)
    return output, states.masked_fill(empty, 0.0)


def join_directions(state, rnn):
    """[num_layers*D, N, H] -> [num_layers, N, D*H]: the directions of each layer side by side."""
    if not rnn.bidirectional:
        return state
    return torch.cat((state[0::2], state[1::2]), dim=-1)


def last_state(states, rnn):
    """[N, D*H]: h of the last layer, after the last step of each direction."""
    h_n = states[0] if isinstance(states, tuple) else states
    return join_directions(h_n, rnn)[-1]
