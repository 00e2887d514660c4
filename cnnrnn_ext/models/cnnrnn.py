"""CNN → RNN: a convolutional network per frame, a recurrent network over the frames."""

import itertools

from torch import nn

from cnnrnn_ext.modules import LSTM, ConvPool2d


class CNNRNN(nn.Module):
    """Clips [N, T, C, H, W] → per-frame CNN → LSTM over time → one linear head per name.

    Equivalent to the Keras stack Conv2D(32, 3) + MaxPooling2D + Conv2D(64, 3) + MaxPooling2D + Flatten on
    each frame, LSTM(128), Dense: with the defaults and 28×28 frames the LSTM reads 1600 features.

    Args:
        heads: {"name": number of classes}; the forward returns a dict of the same names.
        in_channels, frame_size: C and (H, W) of a frame.
        channels: output channels of each convolution block (3×3, ReLU, max-pool 2).
        hidden_size: of the LSTM.
        conv_pool, rnn: the module classes to build from; the stock equivalents of cnnrnn_ext's are
            ``stock_conv_pool`` of this module and ``nn.LSTM``.

    Shape:
        input [N, T, C, H, W]; returns {"name": logits [N, classes]} from the last time step.

    Raises:
        RuntimeError: an input of another rank, or of other channels or frame size than given.
    """

    def __init__(
        self,
        heads,
        in_channels=1,
        frame_size=(28, 28),
        channels=(32, 64),
        hidden_size=128,
        *,
        conv_pool=ConvPool2d,
        rnn=LSTM,
    ):
        super().__init__()
        self.frame_shape = (in_channels, *frame_size)
        widths = (in_channels, *channels)
        self.cnn = nn.Sequential(
            *(conv_pool(c_in, c_out, 3) for c_in, c_out in itertools.pairwise(widths)),
            nn.Flatten(),
        )
        height, width = frame_size
        for _ in channels:
            height, width = (height - 2) // 2, (width - 2) // 2
        if min(height, width) < 1:
            raise ValueError(f"frame_size: {frame_size} is too small for {len(channels)} convolution blocks")
        self.rnn = rnn(channels[-1] * height * width, hidden_size)
        self.heads = nn.ModuleDict({name: nn.Linear(hidden_size, count) for name, count in heads.items()})

    def forward(self, clips):
        if clips.dim() != 5 or clips.shape[2:] != self.frame_shape:
            c, h, w = self.frame_shape
            raise RuntimeError(f"clips: expected [N, T, {c}, {h}, {w}], got shape {list(clips.shape)}")
        # Time first: that is the order the LSTM reads, so no transpose stands between the two networks.
        frames = clips.transpose(0, 1)
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        _, (h_n, _) = self.rnn(features)
        return {name: head(h_n[-1]) for name, head in self.heads.items()}


class stock_conv_pool(nn.Conv2d):
    """ConvPool2d's defaults from stock modules, with the same parameter names: state dicts load both ways."""

    def forward(self, input):
        return nn.functional.max_pool2d(nn.functional.relu(super().forward(input)), 2)
