"""The conv_pool operators (operators.schema) in plain PyTorch, forward and backward by formula.

They run where a raw operator is called on a device without compiled kernels. The backward formulas are
written out, because autograd is switched off below the dispatcher.
"""

import torch
import torch.nn.functional as F

from cnnrnn_ext import _library, reference

DEAD = 255  # the code of an output that passes no gradient
KEPT = ("gelu", "silu")  # their derivative does not follow from their value
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


# The gradient of an activation's argument, from that of its value and what is kept: the argument for those of
# KEPT, else the value.
aten = torch.ops.aten
ACTIVATION_GRADIENTS = {
    "none": lambda grad, kept: grad,
    "relu": lambda grad, y: aten.threshold_backward(grad, y, 0),
    "relu6": lambda grad, y: aten.hardtanh_backward(grad, y, 0, 6),
    "leaky_relu": lambda grad, y: aten.leaky_relu_backward(grad, y, 0.01, True),
    "tanh": aten.tanh_backward,
    "sigmoid": aten.sigmoid_backward,
    "gelu": aten.gelu_backward,
    "silu": aten.silu_backward,
    "elu": lambda grad, y: aten.elu_backward(grad, 1, 1, 1, True, y),
}


def _check_covered(activation, pool):
    if pool not in ("max", "avg") or activation not in ACTIVATION_GRADIENTS:
        raise RuntimeError(
            f"conv_pool2d operators cover pool 'max' and 'avg', got pool {pool!r} with activation "
            f"{activation!r}; cnnrnn_ext.functional.conv_pool2d covers the rest"
        )


def winograd_serves(x, weight, stride, dilation, groups):
    """Whether the CPU computes this convolution by Winograd's algorithm, at most maps of a few pixels apart.

    csrc/conv_pool_winograd.h has the rule, which looks at the size of the map too.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and tuple(weight.shape[2:]) == (3, 3)
        and tuple(stride) == tuple(dilation) == (1, 1)
        and groups == 1
        and weight.shape[1] >= 8
        and weight.shape[0] >= 4
    )


def tiles_serve(x, weight, groups):
    """Whether the CPU has tile registers, and kernels on them that are made for this convolution.

    csrc/conv_pool_tiles.h has the rule for float32, which looks at all sizes.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and has_tiles()
        and groups == 1
        and weight.shape[1] >= 32
        and weight.shape[2] * weight.shape[3] <= 64
    )


def _isa():
    module = _library.build_module()
    return module.active_isa() if module else None


def has_tiles():
    return _isa() == "amx"


def has_wide_vectors():
    return _isa() in ("avx512", "amx")


def _corners(y, pool_stride, pool_padding):
    """Where each output's window begins in the map: rows [PH, 1] and columns [PW]."""
    return (
        torch.arange(y.shape[2], device=y.device)[:, None] * pool_stride[0] - pool_padding[0],
        torch.arange(y.shape[3], device=y.device) * pool_stride[1] - pool_padding[1],
    )


def window_index(code, map_width, pool_size, pool_stride, pool_padding):
    """The codes' places in the map before the pool, as F.max_pool2d's indices; of dead ones any."""
    code = code.long()
    rows, columns = _corners(code, pool_stride, pool_padding)
    return (rows + code // pool_size[1]) * map_width + columns + code % pool_size[1]


def winner_index(code, map_width, pool_size, pool_stride, pool_padding):
    """F.max_pool2d's indices from the codes; a dead window is all zeros, of which the first wins."""
    rows, columns = _corners(code, pool_stride, pool_padding)
    first = rows.clamp(min=0) * map_width + columns.clamp(min=0)
    index = window_index(code, map_width, pool_size, pool_stride, pool_padding)
    return torch.where(code == DEAD, first, index)


def conv_pool2d_train(
    x, weight, bias, stride, padding, dilation, groups, activation, pool,
    pool_size, pool_stride, pool_padding, ceil_mode, precision="highest",
):  # fmt: skip
    _check_covered(activation, pool)
    layout = layout_of(x)
    conv = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    activated = reference.ACTIVATIONS[activation](conv)
    none = x.new_empty(0)
    if pool == "avg":
        y = F.avg_pool2d(activated, pool_size, pool_stride, pool_padding, ceil_mode)
        kept = none if activation == "none" else conv if activation in KEPT else activated
    else:
        y, index = F.max_pool2d(
            activated, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode, return_indices=True
        )
        kept = conv.flatten(2).gather(2, index.flatten(2)).view_as(y) if activation in KEPT else none
    if kept is not none:
        kept = kept.contiguous(memory_format=layout)
    y = y.contiguous(memory_format=layout)
    if pool == "avg":
        return y, none.to(torch.uint8), kept
    rows, columns = index // conv.shape[3], index % conv.shape[3]
    first_row, first_column = _corners(y, pool_stride, pool_padding)
    code = (rows - first_row) * pool_size[1] + (columns - first_column)
    if activation == "relu":
        code = torch.where(y <= 0, DEAD, code)  # NaN stays alive, as in torch
    return y, code.to(torch.uint8).contiguous(memory_format=layout), kept


def conv_pool2d(*args):
    return conv_pool2d_train(*args)[0]


def conv_pool2d_backward(
    grad_y, x, weight, bias, code, kept, stride, padding, dilation, groups, activation, pool,
    pool_size, pool_stride, pool_padding, ceil_mode, need_x, need_weight, need_bias, precision="highest",
):  # fmt: skip
    _check_covered(activation, pool)
    height, width = (
        (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    )
    if pool == "avg":
        grad_conv = torch.ops.aten.avg_pool2d_backward(
            grad_y, grad_y.new_empty(*grad_y.shape[:2], height, width), pool_size, pool_stride, pool_padding,
            ceil_mode, True, None,
        )  # fmt: skip
        grad_conv = ACTIVATION_GRADIENTS[activation](grad_conv, kept)
    else:
        if activation != "relu":  # whose derivative is in the code
            grad_y = ACTIVATION_GRADIENTS[activation](grad_y, kept)
        alive = code != DEAD
        index = window_index(code, width, pool_size, pool_stride, pool_padding)
        grad_conv = grad_y.new_zeros(*code.shape[:2], height * width)
        grad_conv.scatter_add_(
            2, torch.where(alive, index, 0).flatten(2), torch.where(alive, grad_y, 0).flatten(2)
        )
        grad_conv = grad_conv.view(*code.shape[:2], height, width)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_conv, x, weight, [weight.shape[0]],
        stride, padding, dilation, False, [0, 0], groups, [need_x, need_weight, need_bias],
    )  # fmt: skip
    none = x.new_empty(0)
    return (
        grad_x.contiguous(memory_format=layout_of(x)) if need_x else none,
        grad_weight.contiguous() if need_weight else none,
        grad_bias if need_bias and bias is not None else none,
    )
