"""Recurrent sequence modules: parameters and state handling of torch.nn, one functional call."""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from cnnrnn_ext import functional


class LSTM(nn.RNNBase):
    """A stack of LSTM layers. Equivalent to ``nn.LSTM`` with the same arguments.

    Parameters, their names, shapes, order and initial values are ``nn.LSTM``'s, so state dicts load both
    ways. The formula stands at ``functional.lstm``.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
        dtype: as in ``nn.LSTM``.

    Shape (D = 2 if bidirectional, P = proj_size or H):
        input: [T, N, I]; [N, T, I] if batch_first; [T, I] unbatched; or a PackedSequence.
        hx: None for zeros, or (h_0 [num_layers*D, N, P], c_0 [num_layers*D, N, H]).
        Returns output [T, N, D*P] (in input's form) and (h_n, c_n) shaped as hx.

    Raises:
        As ``nn.LSTM``: TypeError or ValueError for its arguments, ValueError for an input that is neither
        2-D nor 3-D, RuntimeError for sizes, dtypes or devices that do not fit.
    """

    # nn.LSTM itself cannot be subclassed: torch.compile breaks its graph at nn.LSTM and its subclasses.
    def __init__(self, *args, **kwargs):
        super().__init__("LSTM", *args, **kwargs)

    def flatten_parameters(self):
        """Does nothing: these kernels read the parameters where they are."""

    # The state is a pair, so these three of nn.RNNBase apply to each half.

    def get_expected_cell_size(self, input, batch_sizes):
        _, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size

    def check_forward_args(self, input, hidden, batch_sizes):
        self.check_input(input, batch_sizes)
        expected = (
            self.get_expected_hidden_size(input, batch_sizes),
            self.get_expected_cell_size(input, batch_sizes),
        )
        for name, state, size in zip(("h_0", "c_0"), hidden, expected, strict=True):
            self.check_hidden_size(state, size, name + ": expected size {}, got {}")

    def permute_hidden(self, hx, permutation):
        if permutation is None:
            return hx
        return tuple(state.index_select(1, permutation) for state in hx)

    def forward(self, input, hx=None):
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            output, states = self._run(data, self._states(hx, data, batch_sizes, sorted_indices), batch_sizes)
            packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed, self.permute_hidden(states, unsorted_indices)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            self._check_rank(hx, 3 if batched else 2)
        if batched:
            return self._run(input, self._states(hx, input, None, None))
        input = input.unsqueeze(batch_dim)
        hx = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
        output, states = self._run(input, self._states(hx, input, None, None))
        return output.squeeze(batch_dim), tuple(state.squeeze(1) for state in states)

    def _check_rank(self, hx, rank):
        if len(hx) != 2:
            raise RuntimeError(f"hx: expected two states (h_0, c_0), got {len(hx)}")
        if hx[0].dim() != rank or hx[1].dim() != rank:
            kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, h_0 and c_0 should also be {rank}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )

    def _states(self, hx, input, batch_sizes, permutation):
        """(h_0, c_0), checked, in the order of the rows of input."""
        if hx is None:
            sizes = (
                self.get_expected_hidden_size(input, batch_sizes),
                self.get_expected_cell_size(input, batch_sizes),
            )
            hx = tuple(torch.zeros(size, dtype=input.dtype, device=input.device) for size in sizes)
        self.check_forward_args(input, hx, batch_sizes)
        return self.permute_hidden(hx, permutation)

    def _run(self, input, hx, batch_sizes=None):
        # Read by name at each call: a parametrization or a replaced parameter is never stale.
        weights = [getattr(self, name) for names in self._all_weights for name in names]
        return functional.lstm(
            input,
            hx,
            weights,
            has_biases=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            proj_size=self.proj_size,
            batch_sizes=batch_sizes,
        )
