"""Convolution, activation and pooling: checks, layout, one operator call."""

import torch

from cnnrnn_ext import reference
from cnnrnn_ext._autograd_conv_pool import ConvPoolTrain
from cnnrnn_ext._backend import plain_operands, use_compiled
from cnnrnn_ext._checks import (
    check_choice,
    check_conv_pool_indices,
    check_conv_pool_sizes,
    check_tensor,
    conv_arguments,
    explicit_padding,
    pool_arguments,
    shape_of,
)
from cnnrnn_ext._fake_kernels import conv_pool2d_sizes
from cnnrnn_ext._operator_conv_pool import (
    ACTIVATION_GRADIENTS,
    NO_POOL,
    has_tiles,
    has_wide_vectors,
    tiles_serve,
    winner_index,
    winograd_serves,
)
from cnnrnn_ext.functional._common import autocast, autocast_dtype, beyond_autocast, needs_grad
from cnnrnn_ext.ops import CODE_POSITIONS

PRECISIONS = ("highest", "high")
LARGE_PADDING = 256
FEW_CHANNELS = 4  # of a group, that kernels take which multiply no matrices of channels


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
    """Convolution, bias, activation and pooling as one operator.

    Equivalent to ``F.max_pool2d(F.relu(F.conv2d(input, weight, bias)), 2)`` with the defaults: the map
    before the pool is never stored. The convolution is torch's, a valid cross-correlation:
    ``y[n, k, i, j] = bias[k] + sum over c, u, v of weight[k, c, u, v] * input[n, c, i + u, j + v]``.

    Args:
        input: [N, C, H, W] or [C, H, W]; contiguous, channels_last or any strides.
        weight: [K, C / groups, KH, KW], input's dtype and device.
        bias: [K] or None.
        stride, padding, dilation: int or pair; padding also "same" or "valid".
        groups: divides C and K.
        activation: "none", "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "gelu", "silu" or "elu".
        pool: "max", "avg" or "none".
        pool_size, pool_stride, pool_padding, ceil_mode: as in ``F.max_pool2d``; pool_stride defaults to
            pool_size.
        precision: "highest", or "high" to allow a faster algorithm of larger error where there is one: on the
            CPU F(4x4, 3x3) instead of F(2x2, 3x3) in the forward of float32 3x3 convolutions of stride 1 and
            at least 16 channels, unless the map is tiny. Measured on random images and weights of 16 to 512
            channels, in units of 2^-24: the largest error was at most 36 times the largest output, where
            "highest" has 6 and torch's own kernels 4 to 46 by instruction set and layout; the root mean
            square error at most 12.5 times that of the outputs (4.3; 3 to 22). Gradients are there as with
            "highest". On CUDA float32 multiplies as TF32, forward and backward: of its operands 10 bits of
            mantissa are left. On near-ties another position of a window may win.
        return_indices: also return where each maximum stood, as ``F.max_pool2d`` does. Only for pool="max".

    Returns:
        [N, K, PH, PW] (or [K, PH, PW]) in input's dtype and memory format; with return_indices a pair of that
        and the flat positions in the convolution's output, int64 of the same shape.

    Raises:
        TypeError: a non-tensor, or a size that is no integer.
        ValueError: an unknown activation, pool or precision; return_indices with another pool than "max".
        RuntimeError: ranks, shapes, dtypes or devices that do not fit, an unknown padding, or an output of
            no pixels.
    """
    check_tensor("input", input)
    check_tensor("weight", weight)
    if weight.dim() != 4:
        raise RuntimeError(f"weight: expected 4 dimensions [K, C/groups, KH, KW], got {shape_of(weight)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input: expected [N, C, H, W] or [C, H, W], got shape {shape_of(input)}")
    input, weight, bias = autocast(input, weight, bias)
    stride, padding, dilation = conv_arguments(2, input, weight, bias, stride, padding, dilation, groups)
    pool_size, pool_stride, pool_padding = pool_arguments(2, pool, pool_size, pool_stride, pool_padding)
    check_choice("activation", activation, tuple(reference.ACTIVATIONS))
    check_choice("precision", precision, PRECISIONS)
    check_conv_pool_indices(return_indices, pool)

    x = input if input.dim() == 4 else input.unsqueeze(0)
    pads, uneven = explicit_padding(padding, weight, stride, dilation)
    check_conv_pool_sizes(
        x, weight, stride, pads, dilation, pool, pool_size, pool_stride, pool_padding, ceil_mode
    )
    options = {
        "activation": activation,
        "pool": pool,
        "pool_size": pool_size,
        "pool_stride": pool_stride,
        "pool_padding": pool_padding,
        "ceil_mode": ceil_mode,
    }
    conv = stride, pads, dilation, groups
    uncovered = (
        uneven
        or conv_pool2d_uncovered(
            x,
            weight,
            conv,
            activation,
            pool,
            (pool_size, pool_stride, pool_padding),
            needs_grad(x, weight, bias),
        )
        or (return_indices and _indices_uncovered(x, activation))
    )
    note = _cuda_note(x, weight, conv, pool, (pool_size, pool_stride, pool_padding), precision)
    if not use_compiled("conv_pool2d", x, uncovered, note):
        return reference.conv_pool2d(
            input, weight, bias, stride, padding, dilation, groups, **options, return_indices=return_indices
        )

    if pool == "none":  # to the operators a pool of windows of one position
        options |= NO_POOL
    arguments = (x, weight, bias, stride, pads, dilation, groups, *options.values(), precision)
    if not return_indices:
        y = _run(*arguments)
        return y if input.dim() == 4 else y.squeeze(0)
    with beyond_autocast(x):
        y, code, _ = torch.ops.cnnrnn_ext.conv_pool2d_train(*arguments)
    y = y if input.dim() == 4 else y.squeeze(0)
    (_, width), _ = conv_pool2d_sizes(
        x, weight, stride, pads, dilation, pool_size, pool_stride, pool_padding, ceil_mode
    )
    indices = winner_index(code, width, pool_size, pool_stride, pool_padding)
    return y, indices if input.dim() == 4 else indices.squeeze(0)


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
    """``conv_pool2d`` for sequences: input [N, C, L] or [C, L], weight [K, C / groups, KL].

    Equivalent to ``F.max_pool1d(F.relu(F.conv1d(input, weight, bias)), 2)`` with the defaults. Runs on
    the two-dimensional kernels with a height of one. Arguments and errors as in ``conv_pool2d``.
    """
    check_tensor("input", input)
    check_tensor("weight", weight)
    if weight.dim() != 3:
        raise RuntimeError(f"weight: expected 3 dimensions [K, C/groups, KL], got {shape_of(weight)}")
    if input.dim() not in (2, 3):
        raise RuntimeError(f"input: expected [N, C, L] or [C, L], got shape {shape_of(input)}")
    input, weight, bias = autocast(input, weight, bias)
    stride, padding, dilation = conv_arguments(1, input, weight, bias, stride, padding, dilation, groups)
    pool_size, pool_stride, pool_padding = pool_arguments(1, pool, pool_size, pool_stride, pool_padding)
    y = conv_pool2d(
        input.unsqueeze(-2),
        weight.unsqueeze(-2),
        bias,
        (1, *stride),
        padding if isinstance(padding, str) else (0, *padding),
        (1, *dilation),
        groups,
        activation=activation,
        pool=pool,
        pool_size=(1, *pool_size),
        pool_stride=(1, *pool_stride),
        pool_padding=(0, *pool_padding),
        ceil_mode=ceil_mode,
        precision=precision,
        return_indices=return_indices,
    )
    return tuple(t.squeeze(-2) for t in y) if return_indices else y.squeeze(-2)


def _run(x, weight, bias, *config):
    with beyond_autocast(x):
        if not needs_grad(x, weight, bias):
            return torch.ops.cnnrnn_ext.conv_pool2d(x, weight, bias, *config)
        eager = not torch.compiler.is_compiling() and autocast_dtype(x.device) is None
        if eager and plain_operands(x, weight, bias):
            return ConvPoolTrain.apply(x, weight, bias, *config)
        return torch.ops.cnnrnn_ext.conv_pool2d_train(x, weight, bias, *config)[0]


def conv_pool2d_uncovered(x, weight, conv, activation, pool, pools, grad=False):
    """Why the kernels do not serve this configuration, or None.

    conv: stride, padding, dilation, groups; pools: size, stride, padding; grad: whether a gradient is wanted.
    """
    pool_size, padding = pools[0], conv[1]
    if activation not in ACTIVATION_GRADIENTS:
        return f"no kernel for activation={activation!r}"
    if x.device.type == "cpu":
        reason = _uncovered_on_cpu(x, weight, conv, pool, grad)
    else:
        reason = _uncovered_on_cuda(x, weight, conv, pool)
    if reason:
        return reason
    if pool_size[0] * pool_size[1] > CODE_POSITIONS:
        return f"no kernel for pooling windows of more than {CODE_POSITIONS} positions"
    # The kernels copy x with its padding, so their memory grows with it.
    if any(padding[d] > LARGE_PADDING + x.shape[d + 2] for d in (0, 1)):
        return f"no kernel for a padding of {LARGE_PADDING} more than the input"
    return None


def _uncovered_on_cpu(x, weight, conv, pool, grad):
    stride, _, dilation, groups = conv
    if grad and x.dtype == torch.bfloat16 and has_tiles():
        # They would go by way of float32, which is slower than torch's on tile registers.
        return "no kernel for gradients of bfloat16 on tile registers"
    if pool == "max":
        if groups > 1 and groups == weight.shape[0]:
            return "no kernel for one output channel of each group (depthwise): torch's is faster"
        return None
    # Where every position of the map has a gradient, direct kernels are slower than torch's; with one
    # channel, of which torch's are slow, an average pool is faster all the same.
    if winograd_serves(x, weight, stride, dilation, groups) or (pool == "avg" and x.shape[1] == 1):
        return None
    if tiles_serve(x, weight, groups):
        return None
    # Without gradients, and with few channels, they are as fast and spare a pass for the activation.
    few = groups == 1 and x.dtype == torch.float32 and x.shape[1] <= FEW_CHANNELS
    if pool == "none" and few and not grad and has_wide_vectors():
        return None
    others = {
        "avg": ", and for one channel",
        "none": f", and without gradients for up to {FEW_CHANNELS} on vectors of 512 bits",
    }[pool]
    return f"pool={pool!r} has a kernel only for float32, 3x3, stride 1 and 8 channels or more{others}"


def _plain_3x3(weight, conv):
    stride, _, dilation, groups = conv
    return tuple(weight.shape[2:]) == (3, 3) and tuple(stride) == tuple(dilation) == (1, 1) and groups == 1


def _in_blocks(pool, pools):
    """Whether the windows make up 2x2 blocks of the map: what all tensor-core kernels pool in registers."""
    size, stride, padding = map(tuple, pools)
    return pool != "max" or (max(size) <= 2 and stride == size and not any(padding))


def _uncovered_on_cuda(x, weight, conv, pool):
    """Without a max pool every position of the map has a gradient, and the map itself is wanted: what the
    kernels may save is little. They serve 3x3, and on tensor cores first layers, which memory bounds.
    """
    groups = conv[3]
    if x.dtype.itemsize == 2 and groups > 1 and groups == weight.shape[0]:
        return "no tensor-core kernel for one output channel of each group (depthwise)"
    if pool != "max" and not _plain_3x3(weight, conv):
        if x.dtype.itemsize != 2:
            return f"pool={pool!r} has a CUDA kernel of {x.dtype} only for 3x3 and stride 1"
        if weight.shape[1] > FEW_CHANNELS:
            which = f"3x3 and stride 1, or up to {FEW_CHANNELS} channels"
            return f"pool={pool!r} has a CUDA kernel only for {which}"
    return None


def _cuda_note(x, weight, conv, pool, pools, precision):
    """What a trace tells of a CUDA kernel: whether its products are those of tensor cores, and by which."""
    if x.device.type == "cpu" or not (
        x.dtype.itemsize == 2 or (x.dtype == torch.float32 and precision == "high")
    ):
        return None
    which = "tensor cores" if x.dtype.itemsize == 2 else "tensor cores, TF32"
    return which if _plain_3x3(weight, conv) and _in_blocks(pool, pools) else f"{which}, gathered"


def _indices_uncovered(x, activation):
    """On the CPU the pool comes before an activation that never falls: where it is flat, torch's winner is
    another; in bfloat16 it comes before the rounding. On CUDA positions compete by their activated values, as
    torch's."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return "no kernel for return_indices in bfloat16, whose rounding makes ties"
    if x.device.type == "cpu" and activation in ("relu6", "tanh", "sigmoid", "elu"):
        return f"no kernel for return_indices with activation={activation!r}, which is flat for large values"
    return None
