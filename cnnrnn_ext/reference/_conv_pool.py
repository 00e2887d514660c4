"""Convolution, activation and pooling in plain PyTorch."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
}
POOLS = ("max", "avg", "none")


def conv_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation="relu",
    pool="max",
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
    precision="highest",
    return_indices=False,
):
    """``pool(activation(conv2d(input, weight, bias)))``; see ``functional.conv_pool2d``."""
    y = ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    if pool == "max":
        return F.max_pool2d(
            y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode, return_indices=return_indices
        )
    if pool == "avg":
        return F.avg_pool2d(y, pool_size, pool_stride, pool_padding, ceil_mode)
    return y


def conv_pool1d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation="relu",
    pool="max",
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
    precision="highest",
    return_indices=False,
):
    """``pool(activation(conv1d(input, weight, bias)))``; see ``functional.conv_pool1d``."""
    y = ACTIVATIONS[activation](F.conv1d(input, weight, bias, stride, padding, dilation, groups))
    if pool == "max":
        return F.max_pool1d(
            y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode, return_indices=return_indices
        )
    if pool == "avg":
        return F.avg_pool1d(y, pool_size, pool_stride, pool_padding, ceil_mode)
    return y
