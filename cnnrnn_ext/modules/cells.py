"""Single-step recurrent modules."""

from torch import nn

from cnnrnn_ext._backend import plain
from cnnrnn_ext.functional._cells import run_cell
from cnnrnn_ext.modules._streaming import ShortCall, stream_cell
from cnnrnn_ext.modules._weight_dtype import WeightDtype, check_weight_dtype
from cnnrnn_ext.reference._cells import CELLS, NONLINEARITIES


class _RecurrentCell(ShortCall, WeightDtype, nn.RNNCellBase):
    """What the three cells share; states are a tuple of one or two here, and as torch has them outside."""

    _state_names = ("hidden",)

    def __init__(self, cell, input_size, hidden_size, bias, device, dtype, weight_dtype):
        check_weight_dtype(weight_dtype)
        gates = CELLS[cell].gates
        super().__init__(input_size, hidden_size, bias, num_chunks=gates, device=device, dtype=dtype)
        self._init_weight_dtype(weight_dtype)

    def forward(self, input, hx=None):
        if plain(input, 2):
            new = stream_cell(self._cell, self, input, hx)
            if new is not None:
                return new
        name, rank = type(self).__name__, input.dim()
        if rank not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {rank}D instead")
        pair = len(self._state_names) == 2
        if hx is not None:
            for which, state in zip(self._state_names, hx if pair else (hx,), strict=True):
                if state.dim() not in (1, 2):
                    raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")
                if state.dim() != rank:
                    raise RuntimeError(
                        f"{name}: Expected {which} to be {rank}D as input, got {state.dim()}D instead"
                    )
        if rank == 2:
            return self._step(input, hx)
        if hx is not None:
            hx = tuple(state.unsqueeze(0) for state in hx) if pair else hx.unsqueeze(0)
        new = self._step(input.unsqueeze(0), hx)
        return tuple(state.squeeze(0) for state in new) if pair else new.squeeze(0)

    def _run(self, op, input, states):
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return run_cell(op, self._cell, input, states, weights, self._narrow)

    def _matrix_names(self):
        return ["weight_ih", "weight_hh"]


class LSTMCell(_RecurrentCell):
    """One LSTM step. Equivalent to ``nn.LSTMCell`` with the same arguments; state dicts load both ways.

    Args:
        input_size, hidden_size, bias, device, dtype: as in ``nn.LSTMCell``.
        weight_dtype: as in :class:`LSTM`.

    Shape:
        input [N, I] or [I]; hx None for zeros, or (h, c), each [N, H] or [H].
        Returns (h_1, c_1), each [N, H] or [H].

    Raises:
        ValueError: input or state that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.
    """

    _cell = "lstm"
    _state_names = ("h", "c")

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None, *, weight_dtype=None):
        super().__init__("lstm", input_size, hidden_size, bias, device, dtype, weight_dtype)

    def _step(self, input, hx):
        return self._run("lstm_cell", input, hx)


class GRUCell(_RecurrentCell):
    """One GRU step. Equivalent to ``nn.GRUCell`` with the same arguments; state dicts load both ways.

    Args:
        input_size, hidden_size, bias, device, dtype: as in ``nn.GRUCell``.
        weight_dtype: as in :class:`LSTM`.

    Shape:
        input [N, I] or [I]; hx None for zeros, or h [N, H] or [H]. Returns h_1 [N, H] or [H].

    Raises:
        As :class:`LSTMCell`.
    """

    _cell = "gru"

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None, *, weight_dtype=None):
        super().__init__("gru", input_size, hidden_size, bias, device, dtype, weight_dtype)

    def _step(self, input, hx):
        return self._run("gru_cell", input, None if hx is None else (hx,))[0]


class RNNCell(_RecurrentCell):
    """One step of an Elman network. Equivalent to ``nn.RNNCell`` with the same arguments; state dicts load
    both ways.

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as in ``nn.RNNCell``.
        weight_dtype: as in :class:`LSTM`.

    Shape:
        As :class:`GRUCell`.

    Raises:
        As :class:`LSTMCell`; RuntimeError at the call for a nonlinearity other than "tanh" and "relu".
    """

    def __init__(
        self,
        input_size,
        hidden_size,
        bias=True,
        nonlinearity="tanh",
        device=None,
        dtype=None,
        *,
        weight_dtype=None,
    ):
        super().__init__("rnn_tanh", input_size, hidden_size, bias, device, dtype, weight_dtype)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self):
        return NONLINEARITIES.get(self.nonlinearity)

    def _step(self, input, hx):
        if self._cell is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._run("rnn_cell", input, None if hx is None else (hx,))[0]
