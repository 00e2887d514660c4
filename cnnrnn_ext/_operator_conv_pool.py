"""The conv_pool operators (operators.schema) in plain PyTorch, forward and backward by formula.

They run where a raw operator is called on a device without compiled kernels. The backward formulas are
written out, because autograd is switched off below the dispatcher.
"""

import torch
import torch.nn.functional as F

from cnnrnn_ext import reference

DEAD = 255  # the code of an output that passes no gradient
# No pool, as the operators take it: windows of one position.
NO_POOL = {
    "pool": "max",
    "pool_size": (1, 1),
    "pool_stride": (1, 1),
    "pool_padding": (0, 0),
    "ceil_mode": False,
}


def layout_of(x):
    """The memory format of x's outputs: channels_last if x is laid out so, and not also contiguous."""
    nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def _check_covered(activation, pool):
    if pool != "max" or activation not in ("relu", "none"):
        raise RuntimeError(
            f"conv_pool2d operators cover pool 'max' with activation 'relu' or 'none', got pool {pool!r} "
            f"with activation {activation!r}; cnnrnn_ext.functional.conv_pool2d covers the rest"
        )


def winograd_serves(x, weight, stride, dilation, groups):
    """Whether the CPU computes this convolution by Winograd's algorithm, at most maps of a few pixels apart.

    csrc/conv_pool_winograd.h has the rule, which looks at the size of the map too.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(stride) == tuple(dilation) == (1, 1)
        and groups == 1
        and weight.shape[1] >= 8
        and weight.shape[0] >= 4
    )


def conv_pool2d_train(
    x, weight, bias, stride, padding, dilation, groups, activation, pool,
    pool_size, pool_stride, pool_padding, ceil_mode,
):  # fmt: skip
    _check_covered(activation, pool)
    conv = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y, index = F.max_pool2d(
        reference.ACTIVATIONS[activation](conv), pool_size, pool_stride, pool_padding,
        ceil_mode=ceil_mode, return_indices=True,
    )  # fmt: skip
    rows, columns = index // conv.shape[3], index % conv.shape[3]
    first_row = torch.arange(y.shape[2], device=y.device)[:, None] * pool_stride[0] - pool_padding[0]
    first_column = torch.arange(y.shape[3], device=y.device) * pool_stride[1] - pool_padding[1]
    code = (rows - first_row) * pool_size[1] + (columns - first_column)
    if activation == "relu":
        code = torch.where(y <= 0, DEAD, code)  # NaN stays alive, as in torch
    layout = layout_of(x)
    return y.contiguous(memory_format=layout), code.to(torch.uint8).contiguous(memory_format=layout)


def conv_pool2d(*args):
    return conv_pool2d_train(*args)[0]


def conv_pool2d_backward(
    grad_y, x, weight, bias, code, stride, padding, dilation, groups, activation, pool,
    pool_size, pool_stride, pool_padding, ceil_mode, need_x, need_weight, need_bias,
):  # fmt: skip
    _check_covered(activation, pool)
    height, width = (
        (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    )
    code = code.long()
    alive = code != DEAD
    rows = torch.arange(code.shape[2], device=x.device)[:, None] * pool_stride[0] - pool_padding[0]
    columns = torch.arange(code.shape[3], device=x.device) * pool_stride[1] - pool_padding[1]
    index = (rows + code // pool_size[1]) * width + columns + code % pool_size[1]
    grad_conv = grad_y.new_zeros(*code.shape[:2], height * width)
    grad_conv.scatter_add_(
        2, torch.where(alive, index, 0).flatten(2), torch.where(alive, grad_y, 0).flatten(2)
    )
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_conv.view(*code.shape[:2], height, width), x, weight, [weight.shape[0]],
        stride, padding, dilation, False, [0, 0], groups, [need_x, need_weight, need_bias],
    )  # fmt: skip
    none = x.new_empty(0)
    return (
        grad_x.contiguous(memory_format=layout_of(x)) if need_x else none,
        grad_weight.contiguous() if need_weight else none,
        grad_bias if need_bias and bias is not None else none,
    )
