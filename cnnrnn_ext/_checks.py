"""Checks of user input: each raises torch's exception type with a message that names the argument."""

import numbers

import torch

from cnnrnn_ext import reference
from cnnrnn_ext._fake_kernels import conv_pool2d_sizes


def check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def check_same(name, tensor, of, other):
    if tensor.dtype != other.dtype:
        raise RuntimeError(f"{name}: expected dtype {other.dtype} as {of} has, got {tensor.dtype}")
    if tensor.device != other.device:
        raise RuntimeError(f"{name}: expected device {other.device} as {of} has, got {tensor.device}")


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def shape_of(tensor):
    return list(tensor.shape)


def integers(name, value, count, least):
    """value as a tuple of ``count`` integers, each at least ``least``."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) == 1:
        values = values * count
    whole = (numbers.Integral, torch.SymInt)
    if any(type(v) is not int and (isinstance(v, bool) or not isinstance(v, whole)) for v in values):
        raise TypeError(f"{name}: expected an integer or {count} integers, got {value!r}")
    if len(values) != count:
        raise RuntimeError(f"{name}: expected an integer or {count} integers, got {value!r}")
    if any(v < least for v in values):
        raise RuntimeError(f"{name}: expected values >= {least}, got {value!r}")
    return values


def conv_arguments(dims, input, weight, bias, stride, padding, dilation, groups):
    check_same("weight", weight, "input", input)
    if bias is not None:
        check_tensor("bias", bias)
        check_same("bias", bias, "input", input)
        if shape_of(bias) != [weight.shape[0]]:
            raise RuntimeError(f"bias: expected shape [{weight.shape[0]}], got {shape_of(bias)}")
    (groups,) = integers("groups", groups, 1, 1)
    channels = input.shape[-dims - 1]
    if channels != weight.shape[1] * groups:
        raise RuntimeError(
            f"input: expected {weight.shape[1] * groups} channels for weight {shape_of(weight)} with groups="
            f"{groups}, got shape {shape_of(input)}"
        )
    if weight.shape[0] % groups:
        raise RuntimeError(f"weight: {weight.shape[0]} output channels are not divisible by groups={groups}")
    if 0 in weight.shape:
        raise RuntimeError(f"weight: expected non-zero sizes, got shape {shape_of(weight)}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"padding: expected numbers, 'same' or 'valid', got {padding!r}")
    else:
        padding = integers("padding", padding, dims, 0)
    stride = integers("stride", stride, dims, 1)
    if padding == "same" and any(s != 1 for s in stride):
        raise RuntimeError(f"padding: 'same' needs stride 1, got stride={stride}")
    return stride, padding, integers("dilation", dilation, dims, 1)


def pool_arguments(dims, pool, pool_size, pool_stride, pool_padding):
    check_choice("pool", pool, reference.POOLS)
    size = integers("pool_size", pool_size, dims, 1)
    stride = size if pool_stride is None else integers("pool_stride", pool_stride, dims, 1)
    padding = integers("pool_padding", pool_padding, dims, 0)
    if any(2 * p > s for p, s in zip(padding, size, strict=True)):
        raise RuntimeError(f"pool_padding: expected at most half of pool_size {size}, got {padding}")
    return size, stride, padding


def explicit_padding(padding, weight, stride, dilation):
    """(padding as numbers, None), or (both sides' mean, why not) where "same" pads the sides unequally."""
    if padding == "valid":
        return (0, 0), None
    if padding != "same":
        return padding, None
    total = [dilation[d] * (weight.shape[d + 2] - 1) for d in (0, 1)]
    uneven = "padding='same' of an even kernel pads unequally" if any(t % 2 for t in total) else None
    return tuple((t + 1) // 2 for t in total), uneven


def check_conv_pool_indices(return_indices, pool):
    if return_indices and pool != "max":
        raise ValueError(f"return_indices: expected pool='max' with it, got pool={pool!r}")


def check_conv_pool_sizes(x, weight, stride, padding, dilation, pool, *pool_arguments):
    if 0 in x.shape[2:]:
        raise RuntimeError(f"input: expected a non-zero height and width, got shape {shape_of(x)}")
    conv, pooled = conv_pool2d_sizes(x, weight, stride, padding, dilation, *pool_arguments)
    if any(size < 1 for size in conv):
        raise RuntimeError(
            f"input: the kernel {shape_of(weight)[2:]} (dilation {dilation}) is larger than the padded input "
            f"of shape {shape_of(x)} with padding {padding}"
        )
    if pool != "none" and any(size < 1 for size in pooled):
        raise RuntimeError(
            f"pool_size: the window {pool_arguments[0]} is larger than the convolution's output of "
            f"{list(conv)} pixels (input {shape_of(x)})"
        )
