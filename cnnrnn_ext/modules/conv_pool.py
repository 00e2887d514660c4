"""ConvPool1d and ConvPool2d: a convolution module of torch that also activates and pools."""

import torch.nn.functional as F
from torch import nn

from cnnrnn_ext import functional, reference
from cnnrnn_ext._checks import check_choice, check_conv_pool_indices, pool_arguments


class _ConvPool:
    """What both dimensions share: the options of activation and pool beside torch's convolution module."""

    def _set_options(
        self, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, precision, return_indices
    ):
        check_choice("activation", activation, tuple(reference.ACTIVATIONS))
        check_choice("precision", precision, functional.PRECISIONS)
        dims = len(self.kernel_size)
        self.pool_size, self.pool_stride, self.pool_padding = pool_arguments(
            dims, pool, pool_size, pool_stride, pool_padding
        )
        self.activation, self.pool = activation, pool
        self.ceil_mode, self.precision = ceil_mode, precision
        check_conv_pool_indices(return_indices, pool)
        self.return_indices = return_indices

    def _conv_pool(self, input, weight, bias, activation, pool):
        function = functional.conv_pool2d if len(self.kernel_size) == 2 else functional.conv_pool1d
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return function(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=activation,
            pool=pool,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=self.ceil_mode,
            precision=self.precision,
            return_indices=self.return_indices,
        )

    def forward(self, input):
        return self._conv_pool(input, self.weight, self.bias, self.activation, self.pool)

    def extra_repr(self):
        pool = f", pool={self.pool}{self.pool_size}" if self.pool != "none" else ""
        return f"{super().extra_repr()}, activation={self.activation}{pool}"


class ConvPool2d(_ConvPool, nn.Conv2d):
    """Convolution, bias, activation and pooling of images as one operator.

    Equivalent to ``nn.Sequential(nn.Conv2d(...), nn.ReLU(), nn.MaxPool2d(2))`` with the defaults.
    Parameters, their names, shapes and initial values are ``nn.Conv2d``'s, so state dicts load both ways.

    Args:
        in_channels ... padding_mode, device, dtype: as in ``nn.Conv2d``.
        activation: "none", "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "gelu", "silu" or "elu".
        pool: "max", "avg" or "none".
        pool_size, pool_stride, pool_padding, ceil_mode: as in ``nn.MaxPool2d``.
        precision: "highest", or "high" to allow a faster algorithm of larger error where there is one:
            ``functional.conv_pool2d`` says where and how large.
        return_indices: as in ``nn.MaxPool2d``: the output is a pair, with the indices of the maxima. Only for
            pool="max".

    Shape:
        input [N, C, H, W] or [C, H, W]; output [N, K, PH, PW] or [K, PH, PW], in input's memory format.

    Raises:
        As ``nn.Conv2d`` for its arguments; ValueError for an unknown activation, pool or precision, or for
        return_indices with another pool than "max"; at the call, as ``functional.conv_pool2d``.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        *,
        activation="relu",
        pool="max",
        pool_size=2,
        pool_stride=None,
        pool_padding=0,
        ceil_mode=False,
        precision="highest",
        return_indices=False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_options(
            activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, precision, return_indices
        )


class ConvPool1d(_ConvPool, nn.Conv1d):
    """Convolution, bias, activation and pooling of sequences as one operator.

    Equivalent to ``nn.Sequential(nn.Conv1d(...), nn.ReLU(), nn.MaxPool1d(2))`` with the defaults.
    Parameters are ``nn.Conv1d``'s; arguments and errors as in :class:`ConvPool2d`.

    Shape:
        input [N, C, L] or [C, L]; output [N, K, PL] or [K, PL].
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        *,
        activation="relu",
        pool="max",
        pool_size=2,
        pool_stride=None,
        pool_padding=0,
        ceil_mode=False,
        precision="highest",
        return_indices=False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self._set_options(
            activation, pool, pool_size, pool_stride, pool_padding, ceil_mode, precision, return_indices
        )
