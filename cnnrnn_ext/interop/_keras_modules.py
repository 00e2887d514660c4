"""What Keras layers do and no torch module does: each reads and writes Keras' layout, channels last."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from cnnrnn_ext._backend import use_compiled


class ChannelsLast(nn.Module):
    """A module that wants channels first, [N, C, ...], for inputs and outputs [N, ..., C]: views of them.

    Args:
        first: whether the channels of input and output are first all the same.
    """

    def __init__(self, module, first=False):
        super().__init__()
        self.module, self.first = module, first

    def forward(self, x):
        return self.module(x) if self.first else self.module(x.movedim(-1, 1)).movedim(1, -1)

    def extra_repr(self):
        return "channels_first" if self.first else ""


class OverAxis(nn.Module):
    """A BatchNorm of rows [M, C] for inputs with C features along ``axis``."""

    def __init__(self, module, axis=-1):
        super().__init__()
        self.module, self.axis, self.frozen = module, axis, False

    def keep_statistics(self):
        """From now on in eval mode always, as a Keras layer with trainable=False is."""
        self.frozen = True
        self.module.eval()

    def train(self, mode=True):
        return super().train(mode and not self.frozen)

    def forward(self, x):
        x = x.movedim(self.axis, -1)
        return self.module(x.flatten(0, -2)).view(x.shape).movedim(-1, self.axis)

    def extra_repr(self):
        return f"axis={self.axis}"


class Pad(nn.Module):
    """Pads the places of [N, ..., C], or [N, C, ...], as Keras' padding="same" does for these windows, or
    "causal".

    Keras makes ceil(size / stride) windows; of an odd number of places the larger half comes behind.

    Args:
        window, stride, dilation: of the layer that follows, an integer for each dimension of place.
        value: what is put there.
        causal: all of it before, for one dimension and stride 1.
        first: whether the channels stand before the places.
    """

    def __init__(self, window, stride, dilation, value=0.0, causal=False, first=False):
        super().__init__()
        self.first = first
        self.window, self.stride, self.dilation = tuple(window), tuple(stride), tuple(dilation)
        self.value, self.causal = value, causal

    def forward(self, x):
        pads = [] if self.first else [0, 0]  # of the channels; F.pad begins with the last dimension
        sizes = x.shape[2:] if self.first else x.shape[1:-1]
        places = zip(sizes, self.window, self.stride, self.dilation, strict=True)
        for size, window, stride, dilation in reversed(list(places)):
            span = (window - 1) * dilation + 1
            total = span - 1 if self.causal else max((-(-size // stride) - 1) * stride + span - size, 0)
            before = total if self.causal else total // 2
            pads += [before, total - before]
        return F.pad(x, pads, value=self.value)

    def extra_repr(self):
        options = ("window", "stride", "dilation", "value", "causal", "first")
        return ", ".join(f"{name}={getattr(self, name)}" for name in options)


class TimeDistributed(nn.Module):
    """A module of rows, for each step of [N, T, ...]."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Chain(nn.Sequential):
    """Modules one after the other, of which some make a mask and some behind them read it, as in Keras.

    A mask is [N, T] bool, which steps count; ``mask_of(input)`` of a module makes one, and those with
    ``reads_mask`` take it beside their input, until another one is made.
    """

    def forward(self, x):
        mask = None
        for module in self:
            if hasattr(module, "mask_of"):
                mask = module.mask_of(x)
            x = module(x, mask) if getattr(module, "reads_mask", False) else module(x)
        return x


class MaskingEmbedding(nn.Embedding):
    """Token 0 is padding: those steps do not count."""

    def mask_of(self, tokens):
        return tokens != 0


class Masking(nn.Module):
    """Steps of [N, T, D] whose features all have this value do not count, and become 0."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def mask_of(self, x):
        return (x != self.value).any(-1)

    def forward(self, x):
        return x.masked_fill(~self.mask_of(x)[..., None], 0.0)

    def extra_repr(self):
        return f"{self.value}"


MERGES = {
    "concat": lambda a, b: torch.cat((a, b), -1),
    "sum": torch.add,
    "ave": lambda a, b: (a + b) / 2,
    "mul": torch.mul,
}


class Recurrent(nn.Module):
    """A recurrent layer of ours, batch first, as Keras returns it: the last step's output, or all of them.

    Steps that a mask leaves out are passed over: the state stays, and the output is the one before (in the
    reverse direction the one behind), or 0.

    Args:
        rnn: of one layer; batch_first.
        return_sequences: whether all steps' outputs are wanted.
        merge: for a bidirectional one, how both directions are joined: a key of MERGES.
        zeros: whether the output of a step that is left out is 0.
        backwards: whether it reads from the last step to the first, and returns its outputs in that order.
        dropout: in training, probability that a feature of the input is left out, at all steps of a row.
    """

    def __init__(self, rnn, return_sequences, merge=None, zeros=False, backwards=False, dropout=0.0):
        super().__init__()
        self.rnn, self.return_sequences, self.merge, self.zeros = rnn, return_sequences, merge, zeros
        self.backwards, self.dropout = backwards, dropout

    def forward(self, x, mask=None):
        """x: [N, T, I]; mask: [N, T] bool, which steps count, or None."""
        if self.backwards:
            x, mask = x.flip(1), None if mask is None else mask.flip(1)
        if self.training and self.dropout:
            x = x * F.dropout(x.new_ones(len(x), 1, x.shape[2]), self.dropout)
        directions = self._directions(self.rnn(x)[0]) if mask is None else self._masked(x, mask)
        if not self.return_sequences:  # where each direction ends
            directions = [y[:, -1 if d == 0 else 0] for d, y in enumerate(directions)]
        return directions[0] if self.merge is None else MERGES[self.merge](*directions)

    def _directions(self, y):
        return [y] if self.merge is None else y.split(self.rnn.hidden_size, -1)

    def _masked(self, x, mask):
        """The steps that count are brought together at each row's beginning, and what comes out is put where
        they stood."""
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        y, _ = self.rnn(x.gather(1, _over(order, x)), lengths=mask.sum(1))
        y = F.pad(y, (0, 0, 1, 1))  # what there is before the first step that counts, and behind the last: 0
        until = mask.cumsum(1)  # how many steps count up to this one: the number of the last of them
        following = until + ~mask  # the number of the next one
        placed = [
            part.gather(1, _over(number, part))
            for part, number in zip(self._directions(y), (until, following), strict=False)
        ]
        return [part.masked_fill(~mask[..., None], 0.0) for part in placed] if self.zeros else placed

    def extra_repr(self):
        options = ("return_sequences", "merge", "zeros", "backwards", "dropout")
        return ", ".join(f"{name}={getattr(self, name)}" for name in options)


def _over(index, x):
    """An index [N, T] of steps, for all features of x [N, T, D]."""
    return index[..., None].expand(*index.shape, x.shape[-1])


class ResetBeforeGRU(nn.Module):
    """A GRU whose reset gate stands before the product, as in Cho et al. 2014 and Keras' reset_after=False.

    For each step::

        r, z = σ of (weight_ih x_t + bias_ih + weight_hh h_{t-1}), their rows of each
        n = tanh(weight_in x_t + bias_in + weight_hn (r ⊙ h_{t-1}))
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    cuDNN, torch and our kernels have the gate behind the product, where the weights of n are multiplied with
    those of r and z at once: this one is plain PyTorch, and ``cnnrnn_ext.trace`` says so. One layer, batch
    first; recurrent_dropout as in :class:`GRU`. Parameters are named as in :class:`GRU`, rows in the order
    r, z, n; there is no bias_hh.

    Shape: x [N, T, I], lengths None or [N] as in :class:`GRU`; returns output [N, T, D*H], 0 behind a row's
    end, and None.
    """

    def __init__(
        self, input_size, hidden_size, bias=True, bidirectional=False, recurrent_dropout=0.0, dtype=None
    ):
        super().__init__()
        self.input_size, self.hidden_size, self.bidirectional = input_size, hidden_size, bidirectional
        self.recurrent_dropout = recurrent_dropout
        bound = 1 / math.sqrt(hidden_size)
        shapes = {
            "weight_ih_l0": (3 * hidden_size, input_size),
            "weight_hh_l0": (3 * hidden_size, hidden_size),
        }
        if bias:
            shapes["bias_ih_l0"] = (3 * hidden_size,)
        self._suffixes = ("", "_reverse")[: 1 + bidirectional]
        for suffix in self._suffixes:
            for name, shape in shapes.items():
                value = torch.empty(shape, dtype=dtype).uniform_(-bound, bound)
                self.register_parameter(name + suffix, nn.Parameter(value))

    def forward(self, x, lengths=None):
        use_compiled("gru", x, uncovered="no kernel for a reset gate before the product (reset_after=False)")
        steps = torch.arange(x.shape[1], device=x.device)
        ends = torch.full((len(x), 1), x.shape[1], device=x.device) if lengths is None else lengths[:, None]
        outputs = []
        for suffix in self._suffixes:
            # From each row's end back to its beginning; what is behind the end stays there.
            turned = torch.where(steps < ends, ends - 1 - steps, steps) if suffix else None
            rows = x if turned is None else x.gather(1, _over(turned, x))
            names = (f"{name}_l0{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih"))
            y = self._scan(rows, *(getattr(self, name, None) for name in names))
            outputs.append(y if turned is None else y.gather(1, _over(turned, y)))
        y = torch.cat(outputs, -1)
        return y if lengths is None else y.masked_fill((steps >= ends)[..., None], 0.0), None

    def _scan(self, x, weight_ih, weight_hh, bias_ih):
        size = self.hidden_size
        h, outputs = x.new_zeros(len(x), size), []
        kept = F.dropout(torch.ones_like(h), self.recurrent_dropout, self.training)
        gates_hh, new_hh = weight_hh.split((2 * size, size))
        for from_x in F.linear(x, weight_ih, bias_ih).unbind(1):
            gates, new = from_x.split((2 * size, size), -1)
            read = h * kept
            r, z = torch.sigmoid(gates + F.linear(read, gates_hh)).chunk(2, -1)
            h = torch.lerp(torch.tanh(new + F.linear(r * read, new_hh)), h, z)
            outputs.append(h)
        return torch.stack(outputs, 1)

    def extra_repr(self):
        return f"{self.input_size}, {self.hidden_size}, bidirectional={self.bidirectional}"


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


class Flatten(nn.Module):
    """[N, ...] -> [N, M], channels last: with ``first`` they come from [N, C, ...]."""

    def __init__(self, first=False):
        super().__init__()
        self.first = first

    def forward(self, x):
        return (x.movedim(1, -1) if self.first and x.dim() > 2 else x).flatten(1)

    def extra_repr(self):
        return "channels_first" if self.first else ""


class GlobalPool(nn.Module):
    """The mean ("avg") or the largest ("max") over the places of [N, ..., C], or with ``first`` of
    [N, C, ...]; the mean takes a mask [N, T] of those that count, for channels last."""

    def __init__(self, kind, keepdims, first=False):
        super().__init__()
        self.kind, self.keepdims, self.first = kind, keepdims, first

    def forward(self, x, mask=None):
        if mask is not None:
            total = x.masked_fill(~mask[..., None], 0.0).sum(1, keepdim=self.keepdims)
            return total / mask.sum(1).view(-1, *(1,) * (total.dim() - 1))
        dims = tuple(range(2, x.dim()) if self.first else range(1, x.dim() - 1))
        reduce = torch.mean if self.kind == "avg" else torch.amax
        return reduce(x, dims, keepdim=self.keepdims)
