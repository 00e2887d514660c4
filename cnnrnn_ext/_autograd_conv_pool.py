"""Autograd of the conv_pool operators."""

import torch

from cnnrnn_ext import reference
from cnnrnn_ext._double_backward import double_backward

BACKWARD_CONFIG = 10  # options before the forward's precision, which the backward takes last


def _save(ctx, inputs, output):
    x, weight, bias, *config = inputs
    ctx.options = len(config)
    ctx.precision = config[BACKWARD_CONFIG:]
    config = config[:BACKWARD_CONFIG]
    y, code, kept = output
    activation, pool = config[4:6]
    if kept.dim() == 1:  # nothing but what the code says, or what y says
        kept = None if activation == "none" or (activation == "relu" and pool == "max") else y
    ctx.save_for_backward(x, weight, bias, code, kept)
    ctx.config = config
    ctx.set_materialize_grads(False)


def setup(ctx, inputs, output):
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def backward_formula(ctx, grad_y, *grad_saved):
    nothing = (None,) * ctx.options
    if grad_y is None:
        return (None, None, None, *nothing)
    need = ctx.needs_input_grad[:3]
    grads = torch.ops.cnnrnn_ext.conv_pool2d_backward.default(
        grad_y, *ctx.saved_tensors, *ctx.config, *need, *ctx.precision
    )
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *nothing)


class ConvPoolTrain(torch.autograd.Function):
    """conv_pool2d_train with its gradient, for eager calls on plain tensors: what ``register_autograd`` makes
    of the same formulas takes longer than a small call's kernels.

    ``ConvPoolTrain.apply(x, weight, bias, *config)`` returns y.
    """

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.cnnrnn_ext.conv_pool2d_train.default(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled():  # somebody wants to derive the gradient
            return backward_formula(ctx, grad_y)
        with torch._C._AutoDispatchBelowAutograd():
            return backward_formula(ctx, grad_y)


def backward_setup(ctx, inputs, output):
    grad_y, x, weight, bias, _code, _kept, *config = inputs
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
        *need_and_precision,
    ) = ctx.config

    def function(x, weight, bias):
        y = reference.conv_pool2d(
            x, weight, bias, stride, padding, dilation, groups, activation=activation, pool=pool,
            pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
        return (y,)

    outer = [o if n else None for o, n in zip(outer, need_and_precision[:3], strict=True)]
    grads = double_backward(function, inputs, [grad_y], outer)
    return (*grads, None, None, *([None] * len(ctx.config)))


FORMULAS = {
    "conv_pool2d_train": (setup, backward_formula),
    "conv_pool2d_backward": (backward_setup, double_backward_formula),
}
