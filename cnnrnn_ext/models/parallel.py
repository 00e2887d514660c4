"""CNN ∥ RNN: both read the same spectrogram side by side, and their features are fused step by step."""

import itertools

from torch import nn

from cnnrnn_ext._checks import check_choice, check_tensor, integers, shape_of
from cnnrnn_ext._checks_rnn import check_lengths
from cnnrnn_ext.models._fusion import Fusion
from cnnrnn_ext.models._masks import steps_within
from cnnrnn_ext.models._readout import Readout, make_heads
from cnnrnn_ext.models._recurrent import make_recurrent, width_of
from cnnrnn_ext.modules import ConvPool2d

OUTPUTS = ("classes", "steps")


class ParallelCNNRNN(nn.Module):
    """Spectrograms [N, T, F] → (CNN over time and frequency) ∥ (RNN over time) → fused → classes.

    The CNN sees local patterns of time and frequency, the RNN the course of time. Both end at the same
    steps, R frames each: the CNN by its pools, the RNN by reading R frames at a time. Their features of each
    step are fused.

    Args:
        heads: the number of classes (for CTC with the blank, class 0), or {"name": number}.
        frequencies: F.
        channels: of each block of the CNN: a 3×3 convolution of padding 1, ReLU, max-pool 2 over frequency,
            and in the first ``time_pools`` blocks over time too.
        rnn: "lstm", "gru", "rnn" (tanh) or "rnn_relu".
        hidden_size, num_layers, bidirectional: of the RNN; hidden_size is also the size of the fused features
            for "gated" and "attention".
        fusion: "concatenate": side by side. "gated": each feature a mixture of both branches' projections,
            with gates that read both (Arevalo et al. 2017). "attention": one weight for each branch and step.
        output: "classes": one answer for a row. "steps": one for each step, for CTC.
        dropout: probability, between the layers of the RNN and before the heads.
        readout: for output="classes", what of the steps the heads read: "attention" (their sum, weighed by a
            softmax over time) or "mean".
        time_pools: how many blocks halve the time: R = 2**time_pools.

    Shape:
        spectrogram [N, T, F]; lengths None or [N] integers, 0 to T: what stands behind a row's end is not
        read. With T' = T // R and lengths' = lengths // R (frames too few for a whole step are left out):
        output="classes": returns logits [N, classes]; of a row of no steps they are those of features 0.
        output="steps": returns (logits [N, T', classes], lengths' [N]), as F.ctc_loss takes them, once the
        logits are log_softmax(-1) and transposed; lengths' are T' each if lengths is None. Behind a row's end
        the logits mean nothing.

    Attributes: ``feature_size``, of ``features``; ``time_reduction``, R.

    Raises:
        ValueError: an unknown rnn, fusion, output or readout; frequencies too few for the pools; no heads.
        TypeError, RuntimeError: a spectrogram or lengths of another type or shape, by name.
    """

    def __init__(
        self,
        heads,
        frequencies,
        *,
        channels=(32, 64),
        rnn="gru",
        hidden_size=128,
        num_layers=1,
        bidirectional=True,
        fusion="concatenate",
        output="classes",
        dropout=0.0,
        readout="attention",
        time_pools=1,
    ):
        super().__init__()
        check_choice("output", output, OUTPUTS)
        channels = tuple(channels)
        integers("channels", channels, len(channels), 1)
        integers("frequencies", frequencies, 1, 1)
        integers("time_pools", time_pools, 1, 0)
        if time_pools > len(channels):
            raise ValueError(f"time_pools: expected at most one a block, {len(channels)}, got {time_pools}")
        if frequencies >> len(channels) < 1:
            raise ValueError(f"frequencies: {frequencies} are too few for {len(channels)} pools of 2")
        self.frequencies, self.output, self.time_pools = frequencies, output, time_pools
        self.time_reduction = 2**time_pools
        self.cnn = nn.ModuleList(
            ConvPool2d(c_in, c_out, 3, padding=1, pool_size=(2 if block < time_pools else 1, 2))
            for block, (c_in, c_out) in enumerate(itertools.pairwise((1, *channels)))
        )
        inputs = frequencies * self.time_reduction
        self.rnn = make_recurrent(rnn, inputs, hidden_size, num_layers, bidirectional, dropout)
        sizes = channels[-1] * (frequencies >> len(channels)), width_of(self.rnn)
        self.fusion = Fusion(fusion, sizes, hidden_size)
        self.feature_size = self.fusion.features
        kind = readout if output == "classes" else "steps"
        self.readout = Readout(kind, self.feature_size, ("attention", "mean", "steps"))
        self.dropout = nn.Dropout(dropout)
        self.heads = make_heads(self.feature_size, heads)

    def forward(self, spectrogram, lengths=None):
        logits = self.heads(self.dropout(self.features(spectrogram, lengths)))
        if self.output == "classes":
            return logits
        if lengths is None:
            lengths = spectrogram.new_full((spectrogram.shape[0],), spectrogram.shape[1]).long()
        return logits, lengths // self.time_reduction

    def features(self, spectrogram, lengths=None):
        """[N, feature_size], what the heads read; [N, T', feature_size] with output="steps"."""
        fused, lengths = self._run(spectrogram, lengths)
        return self.readout(fused, lengths=lengths)

    def attention(self, spectrogram, lengths=None):
        """[N, T']: the weight of each step, which sum to 1. RuntimeError without readout="attention"."""
        return self.readout.weights(*self._run(spectrogram, lengths))

    def _run(self, spectrogram, lengths):
        """(fused features [T', N, feature_size], lengths')."""
        self._check(spectrogram, lengths)
        x, lengths = self._without_padding(spectrogram, lengths)
        reduced = None if lengths is None else lengths // self.time_reduction
        output, _ = self.rnn(self._stacked(x), lengths=reduced)
        return self.fusion([self._convolved(x, lengths), output]), reduced

    def _without_padding(self, x, lengths):
        if lengths is None:
            return x, None
        lengths = lengths.to(x.device)
        return x.masked_fill(~steps_within(lengths, x.shape[1]).t()[..., None], 0.0), lengths

    def _stacked(self, x):
        """[N, T, F] -> [T', N, R*F]: R frames a step."""
        whole = x.shape[1] // self.time_reduction * self.time_reduction
        return x[:, :whole].unflatten(1, (-1, self.time_reduction)).flatten(2).transpose(0, 1)

    def _convolved(self, x, lengths):
        """[N, T, F] -> [T', N, K*F']. Behind a row's end each block reads zeros, as for the row alone."""
        x = x.unsqueeze(1)
        for index, block in enumerate(self.cnn):
            x = block(x)
            if lengths is not None:
                lengths = lengths // 2 if index < self.time_pools else lengths
                x = x.masked_fill(~steps_within(lengths, x.shape[2]).t()[:, None, :, None], 0.0)
        return x.permute(2, 0, 1, 3).flatten(2)

    def _check(self, spectrogram, lengths):
        check_tensor("spectrogram", spectrogram)
        if (
            spectrogram.dim() != 3
            or spectrogram.shape[2] != self.frequencies
            or spectrogram.shape[1] < self.time_reduction
        ):
            raise RuntimeError(
                f"spectrogram: expected [N, T, {self.frequencies}], T >= {self.time_reduction}, got shape "
                f"{shape_of(spectrogram)}"
            )
        if lengths is not None:
            check_lengths(lengths, spectrogram.shape[1], spectrogram.shape[0])
