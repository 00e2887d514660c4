"""ConvPool1d and ConvPool2d: a convolution module of torch that also activates and pools."""

import torch
import torch.nn.functional as F
from torch import nn

from cnnrnn_ext import functional, reference
from cnnrnn_ext._autograd_conv_pool import ConvPoolTrain
from cnnrnn_ext._backend import plain, plain_operands
from cnnrnn_ext._checks import check_choice, check_conv_pool_indices, pool_arguments
from cnnrnn_ext._operator_conv_pool import NO_POOL
from cnnrnn_ext.functional._common import needs_grad
from cnnrnn_ext.functional._conv_pool import conv_pool2d_uncovered
from cnnrnn_ext.modules._streaming import ShortCall

operator = torch.ops.cnnrnn_ext.conv_pool2d.default._op  # without OpOverload.__call__


class _ConvPool(ShortCall):
    """What both dimensions share: the options of activation and pool beside torch's convolution module."""

    # What the operator takes beside input, weight and bias, and whether it serves gradients too; False where
    # a call may need more than the operator; None where nobody has asked since the last change.
    _plan = None

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        self.__dict__["_plan"] = None

    def __setstate__(self, state):
        super().__setstate__(state)
        self.__dict__["_plan"] = None

    def _apply(self, *args, **kwargs):  # parameters may change their dtype or device
        self.__dict__["_plan"] = None
        return super()._apply(*args, **kwargs)

    def _plan_of(self):
        weight, padding = self._parameters.get("weight"), self.padding
        if padding == "valid":
            padding = (0,) * len(self.kernel_size)
        conv, pool = (
            (self.stride, padding, self.dilation),
            (self.pool_size, self.pool_stride, self.pool_padding),
        )
        if (
            weight is None
            or self.return_indices
            or self.padding_mode != "zeros"
            or not all(type(sizes) is tuple and len(sizes) == weight.dim() - 2 for sizes in (*conv, *pool))
        ):
            return False
        if weight.dim() == 3:
            weight = weight.unsqueeze(-2)
            conv = [(extra, *sizes) for extra, sizes in zip((1, 0, 1), conv, strict=True)]
            pool = [(extra, *sizes) for extra, sizes in zip((1, 1, 0), pool, strict=True)]

        def serves(grad):
            arguments = (weight, weight, (*conv, self.groups), self.activation, self.pool, pool, grad)
            return not conv_pool2d_uncovered(*arguments)

        if not serves(grad=False):
            return False
        pools = self.pool, *pool, self.ceil_mode
        if self.pool == "none":
            pools = tuple(NO_POOL.values())
        return (*conv, self.groups, self.activation, *pools, self.precision), serves(grad=True)

    def _short(self, input):
        """The operator at once, for an input that is ``plain``; None where it refuses its operands. The way
        through ``functional`` then does the same, or tells what does not fit."""
        own = self._parameters
        plan, serves_gradients = self._plan
        try:
            weight, bias = own["weight"], own["bias"]
            if needs_grad(input, weight, bias):
                if not (serves_gradients and plain_operands(weight, bias)):
                    return None
                run = ConvPoolTrain.apply
            else:
                run = operator
            if input.dim() == 4:
                return run(input, weight, bias, *plan)
            return run(input.unsqueeze(-2), weight.unsqueeze(-2), bias, *plan).squeeze(-2)
        except (KeyError, RuntimeError):
            return None

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
        if plain(input, len(self.kernel_size) + 2):
            if self._plan is None:
                self.__dict__["_plan"] = self._plan_of()
            y = self._short(input) if self._plan else None
            if y is not None:
                return y
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
