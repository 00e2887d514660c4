"""What fuse_ puts into a model: a fused convolution, and what stands where its neighbours stood.

Every parameter and buffer stays at its place and keeps its name: the state dict of a fused model is that of
the model it was, and its parameters are the same objects.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cnnrnn_ext._stamps import stamps_of, trackable, unchanged
from cnnrnn_ext.functional._common import needs_grad
from cnnrnn_ext.modules import ConvPool1d, ConvPool2d


def share(source, target):
    """Gives ``target`` ``source``'s parameters, buffers and mode: the same objects under their names."""
    for name, value in (*source._parameters.items(), *source._buffers.items()):
        setattr(target, name, value)
    target.training = source.training
    return target


class Absorbed(nn.Module):
    """Passes on what the convolution before it has already activated or pooled.

    Args:
        original: the module that stood here; it works again while ``norm`` normalises by its batch.
        norm: the FoldedNorm between the convolution and this module, or None.
    """

    def __init__(self, original, norm=None):
        super().__init__()
        # Not as submodules: they would add names to the model.
        self.__dict__.update(original=original, norm=norm)
        self.training = original.training

    def forward(self, input):
        if self.norm is not None and self.norm.uses_batch_statistics():
            return self.original(input)
        return input

    def extra_repr(self):
        return repr(self.original)


class FoldedNorm(_NormBase):
    """A BatchNorm that the convolution before it does too, while it normalises by its running statistics.

    While it normalises by its batch it is the BatchNorm it was.
    """

    def __init__(self, original):
        super().__init__(
            original.num_features, original.eps, original.momentum, original.affine,
            original.track_running_stats, device="meta",
        )  # fmt: skip
        self.stock = type(original)
        share(original, self)

    def _check_input_dim(self, input):
        self.stock._check_input_dim(self, input)

    def uses_batch_statistics(self):
        return self.training or self.running_mean is None

    def forward(self, input):
        return self.stock.forward(self, input) if self.uses_batch_statistics() else input

    def restored(self):
        stock = self.stock(
            self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        return share(self, stock)

    def folded(self, weight, bias):
        """(weight, bias) of the convolution that also does this normalisation.

        ``norm(conv(x)) = gamma (conv(x) - mean) / sqrt(var + eps) + beta``, and a convolution is linear: its
        weight times ``gamma / sqrt(var + eps)`` of its output channel, which may be negative.
        """
        scale = torch.rsqrt(self.running_var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean if bias is None else bias - self.running_mean
        shift = shift * scale if self.bias is None else torch.addcmul(self.bias, shift, scale)
        scale = scale.view(-1, *[1] * (weight.dim() - 1))
        return (weight * scale).to(weight.dtype), shift.to(weight.dtype)


class _ConvNormPool:
    """A ConvPool with a FoldedNorm before its activation. ``norm`` stands elsewhere in the model."""

    def follow(self, norm):
        self.__dict__.update(norm=norm, _folded=None)
        return self

    def forward(self, input):
        if self.norm.uses_batch_statistics():  # then norm, activation and pool come after, each by itself
            return self._conv_pool(input, self.weight, self.bias, "none", "none")
        return self._conv_pool(input, *self._operands(), self.activation, self.pool)

    def _operands(self):
        norm = self.norm
        # The count stands for the running statistics, which torch updates without counting a version.
        statistics = norm.running_mean, norm.running_var, norm.num_batches_tracked
        sources = [self.weight, self.bias, norm.weight, norm.bias, *statistics]
        sources = [tensor for tensor in sources if tensor is not None]
        keep = not (torch.compiler.is_compiling() or needs_grad(*sources)) and trackable(sources)
        kept = self._folded if keep else None  # one read: another thread may exchange it meanwhile
        if kept is not None and len(kept[0]) == len(sources) and unchanged(kept[0], sources):
            return kept[2]
        operands = norm.folded(self.weight, self.bias)
        if keep and type(operands[0]) is torch.Tensor:  # anything else belongs to a tracer
            held = [tensor.detach() for tensor in sources]
            self.__dict__["_folded"] = stamps_of(sources), held, operands
        return operands

    def __getstate__(self):
        return self.__dict__ | {"_folded": None}


class ConvNormPool2d(_ConvNormPool, ConvPool2d):
    """``nn.Sequential(conv, norm, activation, pool)`` of images."""


class ConvNormPool1d(_ConvNormPool, ConvPool1d):
    """``nn.Sequential(conv, norm, activation, pool)`` of sequences."""
