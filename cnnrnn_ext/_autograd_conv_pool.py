"""Autograd of the conv_pool operators."""

import torch

from cnnrnn_ext import reference
from cnnrnn_ext._double_backward import double_backward
from cnnrnn_ext._operator_conv_pool import DEAD, NO_POOL, layout_of, winograd_serves


def setup(ctx, inputs, output):
    x, weight, bias, *config = inputs
    _, code = output
    ctx.save_for_backward(x, weight, bias, code)
    ctx.config = config
    ctx.mark_non_differentiable(code)
    ctx.set_materialize_grads(False)


def _no_pool(stride, padding, dilation, groups, activation, pool, pool_size, pool_stride, *rest):
    return [*pool_size, *pool_stride] == [1, 1, 1, 1]


def _grad_input(grad, weight, stride, padding, dilation, groups):
    """By Winograd's algorithm: the convolution of the gradient with mirrored kernels, in and out exchanged.

    None where that algorithm does not serve.
    """
    mirrored = weight.flip(2, 3).transpose(0, 1)
    if max(padding) > 2 or not winograd_serves(grad, mirrored, stride, dilation, groups):
        return None
    padding = [2 - p for p in padding]
    config = stride, padding, dilation, groups, "none", *NO_POOL.values()
    if torch.is_grad_enabled():  # a graph is asked for: the form that has a gradient
        return torch.ops.cnnrnn_ext.conv_pool2d_train(grad, mirrored, None, *config)[0]
    return torch.ops.cnnrnn_ext.conv_pool2d(grad, mirrored, None, *config)


def _dense_backward(grad_y, x, weight, bias, code, config, need):
    """Without a pool every output of the convolution has a gradient: the sparse kernels would be slower."""
    stride, padding, dilation, groups, *_ = config
    grad = torch.where(code == DEAD, 0, grad_y).contiguous(memory_format=layout_of(x))
    grad_x = _grad_input(grad, weight, stride, padding, dilation, groups) if need[0] else None
    rest = [need[0] and grad_x is None, *need[1:]]
    if not any(rest):
        return grad_x, None, None
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups, rest
    )
    return grads[0] if rest[0] else grad_x, *grads[1:]


def backward_formula(ctx, grad_y, grad_code):
    x, weight, bias, code = ctx.saved_tensors
    nothing = (None,) * len(ctx.config)
    if grad_y is None:
        return (None, None, None, *nothing)
    need = list(ctx.needs_input_grad[:3])
    if _no_pool(*ctx.config):
        return (*_dense_backward(grad_y, x, weight, bias, code, ctx.config, need), *nothing)
    grads = torch.ops.cnnrnn_ext.conv_pool2d_backward(grad_y, x, weight, bias, code, *ctx.config, *need)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *nothing)


def backward_setup(ctx, inputs, output):
    grad_y, x, weight, bias, _code, *config = inputs
    ctx.save_for_backward(grad_y, x, weight, bias)
    ctx.config = config
    ctx.set_materialize_grads(False)


def double_backward_formula(ctx, *outer):
    grad_y, *inputs = ctx.saved_tensors
    (
        stride,
        padding,
        dilation,
        groups,
        activation,
        pool,
        pool_size,
        pool_stride,
        pool_padding,
        ceil_mode,
        *need,
    ) = ctx.config

    def function(x, weight, bias):
        y = reference.conv_pool2d(
            x, weight, bias, stride, padding, dilation, groups, activation=activation, pool=pool,
            pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
        return (y,)

    outer = [o if n else None for o, n in zip(outer, need, strict=True)]
    grads = double_backward(function, inputs, [grad_y], outer)
    return (*grads, None, *([None] * len(ctx.config)))


FORMULAS = {
    "conv_pool2d_train": (setup, backward_formula),
    "conv_pool2d_backward": (backward_setup, double_backward_formula),
}
