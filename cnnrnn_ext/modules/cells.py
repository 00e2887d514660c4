"""Single-step recurrent modules."""

import torch
from torch import nn

from cnnrnn_ext import functional


class LSTMCell(nn.RNNCellBase):
    """One LSTM step. Equivalent to ``nn.LSTMCell`` with the same arguments; state dicts load both ways.

    Args:
        input_size, hidden_size, bias, device, dtype: as in ``nn.LSTMCell``.

    Shape:
        input [N, I] or [I]; hx None for zeros, or (h, c), each [N, H] or [H].
        Returns (h_1, c_1), each [N, H] or [H].

    Raises:
        ValueError: input or state that is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices that do not fit.
    """

    def __init__(self, input_size, hidden_size, bias=True, device=None, dtype=None):
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input, hx=None):
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        batched = input.dim() == 2
        if hx is not None:
            for name, state in zip(("h", "c"), hx, strict=True):
                if state.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
                if state.dim() != input.dim():
                    raise RuntimeError(
                        f"LSTMCell: Expected {name} to be {input.dim()}D as input, got {state.dim()}D instead"
                    )
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else tuple(state.unsqueeze(0) for state in hx)
        if hx is None:
            zeros = torch.zeros(input.shape[0], self.hidden_size, dtype=input.dtype, device=input.device)
            hx = (zeros, zeros)
        states = functional.lstm_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return states if batched else tuple(state.squeeze(0) for state in states)
