"""CNN → RNN: a convolutional network per frame, a recurrent network over the frames."""

import torch
from torch import nn

from cnnrnn_ext._checks import check_tensor, shape_of
from cnnrnn_ext._checks_rnn import check_lengths
from cnnrnn_ext.models._backbone import make_backbone
from cnnrnn_ext.models._masks import steps_within
from cnnrnn_ext.models._readout import Readout, make_heads
from cnnrnn_ext.models._recurrent import last_state, make_recurrent, width_of


class CNNRNN(nn.Module):
    """Clips [N, T, C, H, W] → a CNN on each frame → an RNN over time → classes.

    With the defaults equivalent to the Keras stack TimeDistributed of Conv2D(32, 3) + MaxPooling2D +
    Conv2D(64, 3) + MaxPooling2D + Flatten, LSTM(128), Dense: of a 28×28 frame the LSTM reads 1600 features.

    Each convolution is a valid cross-correlation (of the frame with zeros around it where the preset pads)::

        y[k, i, j] = b[k] + sum over c, u, v of W[k, c, u, v] x[c, i + u, j + v]

    and the RNN goes on by h_t = f(W_h h_{t-1} + W_x x_t + b), with f = tanh for "rnn" and f = ReLU for
    "rnn_relu", h_0 = 0 (Elman 1990; b is the sum of the layer's two biases); the formulas of "lstm" and "gru"
    stand at ``functional.lstm`` and ``functional.gru``.

    Args:
        heads: the number of classes, or {"name": number} for several answers about one clip.
        in_channels, frame_size: C and (H, W) of a frame.
        channels: output channels of each stage of a preset.
        hidden_size: of the RNN.
        cnn: the network of a frame:
            "seed": for each of ``channels`` a 3×3 convolution, ReLU and max-pool 2; then flattened.
            "vgg": stages of one, one, two, two, … 3×3 convolutions of padding 1, each with ReLU, each stage
            with a max-pool 2; then flattened. ``channels=(64, 128, 256, 512, 512)`` is VGG-11.
            "resnet": a convolution with max-pool 2, two residual blocks of 3×3 convolutions with batch
            normalisation for each of ``channels`` (all but the first of these stages halve the frame); then
            the mean over pixels.
            Or any module [B, C, H, W] → [B, ...], such as a torchvision ResNet whose ``fc`` is nn.Identity():
            with the weights that it has; ``channels`` is not used then.
        freeze_cnn: whether the CNN keeps its weights: its parameters get no gradient, and it stays in eval
            mode (BatchNorm, Dropout) through ``model.train()``. Gradients still reach the frames.
        rnn: "lstm", "gru", "rnn" (tanh) or "rnn_relu".
        num_layers, bidirectional: of the RNN.
        dropout: probability, between the layers of the RNN and before the heads.
        readout: what the heads read. "last": h of the last layer after each row's last step (of the reverse
            direction: after its first). "mean": of the steps' outputs. "attention": their sum, weighed by a
            softmax over t of v · tanh(W y_t + b). "steps": each step's output, for an answer a step.
        feature_size: of a frame, for a module as ``cnn``. None: found by trying it on a frame of zeros.
            If given, frame_size may be None, and frames of any size are taken that make so many features.

    Shape:
        clips [N, T, C, H, W]; lengths None or [N] integers, 0 to T: what stands behind a row's end is not
        read, and results are the same as of the row alone. Returns logits [N, classes], with readout="steps"
        [N, T, classes] (behind a row's end they are those of a zero output, and mean nothing); a dict of
        these for a dict of heads.

    With lengths, only the frames before the rows' ends pass through the CNN. A graph (torch.compile,
    torch.export) has no such numbers: there all frames do, which changes no result but BatchNorm's statistics
    in training, so that is refused (torch.compile without ``fullgraph`` runs that part without a graph).

    Attributes: ``feature_size``, of ``features``.

    Raises:
        ValueError: an unknown cnn, rnn or readout; a frame too small for the preset; no heads.
        TypeError: clips that are no tensor; a cnn that makes no [B, ...] of a batch of frames.
        RuntimeError: clips or lengths of other sizes than expected, by name.
    """

    def __init__(
        self,
        heads,
        in_channels=1,
        frame_size=(28, 28),
        channels=(32, 64),
        hidden_size=128,
        *,
        cnn="seed",
        freeze_cnn=False,
        rnn="lstm",
        num_layers=1,
        bidirectional=False,
        dropout=0.0,
        readout="last",
        feature_size=None,
    ):
        super().__init__()
        self.frame_shape = (in_channels, *(frame_size or (None, None)))
        self.cnn, inputs = make_backbone(cnn, in_channels, frame_size, channels, feature_size)
        self.freeze_cnn = freeze_cnn
        if freeze_cnn:
            self.cnn.requires_grad_(False).eval()
        self.rnn = make_recurrent(rnn, inputs, hidden_size, num_layers, bidirectional, dropout)
        self.feature_size = width_of(self.rnn)
        self.readout = Readout(readout, self.feature_size)
        self.dropout = nn.Dropout(dropout)
        self.heads = make_heads(self.feature_size, heads)

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_cnn:
            self.cnn.eval()
        return self

    def forward(self, clips, lengths=None):
        return self.heads(self.dropout(self.features(clips, lengths)))

    def features(self, clips, lengths=None):
        """[N, feature_size], what the heads read; [N, T, feature_size] with readout="steps"."""
        output, last = self._run(clips, lengths)
        return self.readout(output, last, lengths)

    def attention(self, clips, lengths=None):
        """[N, T]: the weight of each step, which sum to 1. RuntimeError without readout="attention"."""
        return self.readout.weights(self._run(clips, lengths)[0], lengths)

    def _run(self, clips, lengths):
        self._check(clips, lengths)
        x = self._frame_features(clips, lengths)
        output, states = self.rnn(x, lengths=lengths)
        return output, last_state(states, self.rnn)

    def _frame_features(self, clips, lengths):
        """[T, N, features]: time first, the order that the RNN reads; 0 behind the rows' ends."""
        rows, steps = clips.shape[:2]
        mask = None if lengths is None else steps_within(lengths.to(clips.device), steps)
        if mask is None or torch.compiler.is_compiling():
            if mask is not None and self._keeps_statistics():
                raise RuntimeError(
                    "lengths: in a graph, padding would enter BatchNorm's statistics in training"
                )
            x = self.cnn(clips.transpose(0, 1).flatten(0, 1)).flatten(1).unflatten(0, (steps, rows))
            return x if mask is None else x.masked_fill(~mask[..., None], 0.0)
        step, row = mask.nonzero(as_tuple=True)
        x = self.cnn(clips.flatten(0, 1).index_select(0, row * steps + step)).flatten(1)
        padded = x.new_zeros(steps * rows, x.shape[1]).index_copy(0, step * rows + row, x)
        return padded.unflatten(0, (steps, rows))

    def _keeps_statistics(self):
        norms = (m for m in self.cnn.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        return any(norm.training for norm in norms)

    def _check(self, clips, lengths):
        check_tensor("clips", clips)
        sizes = ["N", "T", *self.frame_shape]
        if clips.dim() != 5 or any(
            want is not None and size != want for size, want in zip(clips.shape[2:], sizes[2:], strict=True)
        ):
            c, h, w = (size or name for size, name in zip(self.frame_shape, "CHW", strict=True))
            raise RuntimeError(f"clips: expected [N, T, {c}, {h}, {w}], got shape {shape_of(clips)}")
        if lengths is not None:
            check_lengths(lengths, clips.shape[1], clips.shape[0])
