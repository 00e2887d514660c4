"""What Keras layers do and no torch module does: each reads and writes Keras' layout, channels last."""

import torch
import torch.nn.functional as F
from torch import nn


class ChannelsLast(nn.Module):
    """A module that wants channels first, [N, C, ...], for inputs and outputs [N, ..., C]: views of them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.movedim(-1, 1)).movedim(1, -1)


class OverLast(nn.Module):
    """A BatchNorm of rows [M, C] for inputs [..., C]."""

    def __init__(self, module):
        super().__init__()
        self.module, self.frozen = module, False

    def keep_statistics(self):
        """From now on in eval mode always, as a Keras layer with trainable=False is."""
        self.frozen = True
        self.module.eval()

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def forward(self, x):
        return self.module(x.flatten(0, -2)).view(x.shape)


class Pad(nn.Module):
    """Pads the places of [N, ..., C] as Keras' padding="same" does for these windows, or "causal".

    Keras makes ceil(size / stride) windows; of an odd number of places the larger half comes behind.

    Args:
        window, stride, dilation: of the layer that follows, an integer for each dimension of place.
        value: what is put there.
        causal: all of it before, for one dimension and stride 1.
    """

    def __init__(self, window, stride, dilation, value=0.0, causal=False):
        super().__init__()
        self.window, self.stride, self.dilation = tuple(window), tuple(stride), tuple(dilation)
        self.value, self.causal = value, causal

    def forward(self, x):
        pads = [0, 0]  # of the channels; F.pad begins with the last dimension
        places = zip(x.shape[1:-1], self.window, self.stride, self.dilation, strict=True)
        for size, window, stride, dilation in reversed(list(places)):
            span = (window - 1) * dilation + 1
            total = span - 1 if self.causal else max((-(-size // stride) - 1) * stride + span - size, 0)
            before = total if self.causal else total // 2
            pads += [before, total - before]
        return F.pad(x, pads, value=self.value)

    def extra_repr(self):
        return f"window={self.window}, stride={self.stride}, dilation={self.dilation}, value={self.value}"


class TimeDistributed(nn.Module):
    """A module of rows, for each step of [N, T, ...]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


MERGES = {
    "concat": lambda a, b: torch.cat((a, b), -1),
    "sum": torch.add,
    "ave": lambda a, b: (a + b) / 2,
    "mul": torch.mul,
}


class Recurrent(nn.Module):
    """A recurrent layer of ours, batch first, as Keras returns it: the last step's output, or all of them.

    Args:
        rnn: of one layer; batch_first.
        return_sequences: whether all steps' outputs are wanted.
        merge: for a bidirectional one, how both directions are joined: a key of MERGES.
    """

    def __init__(self, rnn, return_sequences, merge=None):
        super().__init__()
        self.rnn, self.return_sequences, self.merge = rnn, return_sequences, merge

    def forward(self, x):
        y, _ = self.rnn(x)
        if self.merge is None:
            return y if self.return_sequences else y[:, -1]
        size = self.rnn.hidden_size
        forward, backward = y[..., :size], y[..., size:]
        if not self.return_sequences:
            forward, backward = forward[:, -1], backward[:, 0]  # where each direction ends
        return MERGES[self.merge](forward, backward)

    def extra_repr(self):
        return f"return_sequences={self.return_sequences}, merge={self.merge}"


class Reshape(nn.Module):
    """[N, ...] -> [N, *shape]; one of the sizes may be -1."""

    def __init__(self, shape):
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x):
        return x.reshape(x.shape[0], *self.shape)


class Permute(nn.Module):
    """The dimensions behind the first in another order, counted from 1."""

    def __init__(self, dims):
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x):
        return x.permute(0, *self.dims)


class GlobalPool(nn.Module):
    """The mean ("avg") or the largest ("max") over the places of [N, ..., C]."""

    def __init__(self, kind, keepdims):
        super().__init__()
        self.kind, self.keepdims = kind, keepdims

    def forward(self, x):
        dims = tuple(range(1, x.dim() - 1))
        reduce = torch.mean if self.kind == "avg" else torch.amax
        return reduce(x, dims, keepdim=self.keepdims)
