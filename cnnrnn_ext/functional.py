"""The public functions: user-level checks and layout, then one operator call.

Each has a twin of the same name and signature in ``cnnrnn_ext.reference``, which runs where no compiled
kernel serves the device, dtype or configuration; ``cnnrnn_ext.trace`` tells which ran, and why.
"""

import torch

from cnnrnn_ext import reference
from cnnrnn_ext._backend import use_compiled
from cnnrnn_ext._checks import (
    check_choice,
    check_conv_pool_sizes,
    check_gate_weights,
    check_lstm,
    check_same,
    check_tensor,
    conv_arguments,
    explicit_padding,
    pool_arguments,
    shape_of,
)
from cnnrnn_ext.ops import CODE_POSITIONS

PRECISIONS = ("highest", "high")
LARGE_PADDING = 256


def _needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(*tensors):
    """The tensors in the dtype of an active autocast region, as torch's own convolution and RNN do."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _autocast_cell(*tensors):
    """As ``_autocast``, but on the CPU torch's own cells leave the state in float32: so does this."""
    if tensors[0].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return _autocast(*tensors)
    half = (torch.bfloat16, torch.float16)
    return tuple(t.float() if isinstance(t, torch.Tensor) and t.dtype in half else t for t in tensors)


# ---- conv_pool ----


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
        precision: "highest", or "high" to allow faster algorithms of larger error where there are any.

    Returns:
        [N, K, PH, PW] (or [K, PH, PW]) in input's dtype and memory format.

    Raises:
        TypeError: a non-tensor, or a size that is no integer.
        ValueError: an unknown activation, pool or precision.
        RuntimeError: ranks, shapes, dtypes or devices that do not fit, an unknown padding, or an output of
            no pixels.
    """
    check_tensor("input", input)
    check_tensor("weight", weight)
    if weight.dim() != 4:
        raise RuntimeError(f"weight: expected 4 dimensions [K, C/groups, KH, KW], got {shape_of(weight)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input: expected [N, C, H, W] or [C, H, W], got shape {shape_of(input)}")
    input, weight, bias = _autocast(input, weight, bias)
    stride, padding, dilation = conv_arguments(2, input, weight, bias, stride, padding, dilation, groups)
    pool_size, pool_stride, pool_padding = pool_arguments(2, pool, pool_size, pool_stride, pool_padding)
    check_choice("activation", activation, tuple(reference.ACTIVATIONS))
    check_choice("precision", precision, PRECISIONS)

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
    uncovered = uneven or _conv_pool2d_uncovered(x, weight, pads, activation, pool, pool_size)
    if not use_compiled("conv_pool2d", x, uncovered):
        return reference.conv_pool2d(input, weight, bias, stride, padding, dilation, groups, **options)

    train = _needs_grad(x, weight, bias)
    operator = torch.ops.cnnrnn_ext.conv_pool2d_train if train else torch.ops.cnnrnn_ext.conv_pool2d
    y = operator(x, weight, bias, stride, pads, dilation, groups, *options.values())
    y = y[0] if train else y
    return y if input.dim() == 4 else y.squeeze(0)


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
    input, weight, bias = _autocast(input, weight, bias)
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
    )
    return y.squeeze(-2)


def _conv_pool2d_uncovered(x, weight, padding, activation, pool, pool_size):
    """Why the kernels do not serve this configuration, or None."""
    if pool != "max":
        return f"no kernel for pool={pool!r}"
    if activation not in ("relu", "none"):
        return f"no kernel for activation={activation!r}"
    if pool_size[0] * pool_size[1] > CODE_POSITIONS:
        return f"no kernel for pooling windows of more than {CODE_POSITIONS} positions"
    # The kernels copy x with its padding, so their memory grows with it.
    if any(padding[d] > LARGE_PADDING + x.shape[d + 2] for d in (0, 1)):
        return f"no kernel for a padding of {LARGE_PADDING} more than the input"
    return None


# ---- rnn ----


def lstm(
    input,
    hx,
    flat_weights,
    *,
    has_biases=True,
    num_layers=1,
    dropout=0.0,
    training=False,
    bidirectional=False,
    batch_first=False,
    proj_size=0,
    batch_sizes=None,
):
    """A stack of LSTM layers over a sequence, as ``nn.LSTM`` computes it.

    For each step, with σ the logistic function::

        i, f, g, o = σ, σ, tanh, σ of (weight_ih x_t + bias_ih + weight_hh h_{t-1} + bias_hh)
        c_t = f ⊙ c_{t-1} + i ⊙ g;   h_t = o ⊙ tanh(c_t)

    (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), D = 2 if bidirectional.

    Args:
        input: [T, N, I]; [N, T, I] if batch_first; packed [sum(batch_sizes), I] if batch_sizes is given.
        hx: (h_0 [num_layers*D, N, P], c_0 [num_layers*D, N, H]), P = proj_size or H.
        flat_weights: torch's order; for each layer and direction weight_ih [4*H, I or D*P],
            weight_hh [4*H, P], then bias_ih, bias_hh [4*H] if has_biases, then weight_hr [P, H] if proj_size.
        dropout: probability of zeroing an output between layers, where ``training``.
        batch_sizes: [T] int64 on the CPU, decreasing, as in ``PackedSequence``.

    Returns:
        output [T, N, D*P] (laid out as input), (h_n, c_n) shaped as hx.

    Raises:
        TypeError, RuntimeError: arguments whose type, shape, dtype or device does not fit, by name.
    """
    h_0, c_0 = hx
    check_tensor("input", input)
    input, h_0, c_0, *flat_weights = _autocast(input, h_0, c_0, *flat_weights)
    check_lstm(
        input,
        h_0,
        c_0,
        flat_weights,
        has_biases,
        num_layers,
        bidirectional,
        batch_first,
        proj_size,
        batch_sizes,
    )
    uncovered = None
    if batch_sizes is not None:
        uncovered = "no kernel for packed sequences"
    elif proj_size:
        uncovered = "no kernel for proj_size"
    layer = _lstm_layer if use_compiled("lstm", input, uncovered) else reference.lstm_layer
    if batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    weights = reference.group_weights(flat_weights, has_biases, proj_size > 0)
    output, h_n, c_n = reference.run_layers(
        layer, input, (h_0, c_0), weights, num_layers, bidirectional, dropout, training, batch_sizes
    )
    return (output.transpose(0, 1) if batch_first and batch_sizes is None else output), (h_n, c_n)


def _lstm_layer(x, h_0, c_0, weights, batch_sizes):
    weight_ih, weight_hh, bias_ih, bias_hh, _ = (list(group) for group in zip(*weights, strict=True))
    if bias_ih[0] is None:
        bias_ih = bias_hh = []
    arguments = (x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if _needs_grad(x, h_0, c_0, *weight_ih, *weight_hh, *bias_ih, *bias_hh):
        return torch.ops.cnnrnn_ext.lstm_train(*arguments)[:3]
    return torch.ops.cnnrnn_ext.lstm(*arguments)


def lstm_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """One LSTM step, as ``nn.LSTMCell`` computes it; the formula stands at ``lstm``.

    Args:
        input: [N, I].
        hx: (h [N, H], c [N, H]).
        weight_ih: [4*H, I], gates in torch's order i, f, g, o. weight_hh: [4*H, H].
        bias_ih, bias_hh: [4*H], or both None.

    Returns:
        (h_1, c_1), both [N, H].

    Raises:
        TypeError, RuntimeError: arguments whose type, shape, dtype or device does not fit, by name.
    """
    h, c = hx
    named = (("input", input), ("h", h), ("c", c), ("weight_ih", weight_ih), ("weight_hh", weight_hh))
    for name, tensor in named:
        check_tensor(name, tensor)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected [N, I], got shape {shape_of(input)}")
    if weight_hh.dim() != 2:
        raise RuntimeError(f"weight_hh: expected [4*H, H], got shape {shape_of(weight_hh)}")
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError("bias_ih and bias_hh: expected both or neither")
    hidden = weight_hh.shape[1]
    arguments = _autocast_cell(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    input, h, c, weight_ih, weight_hh, bias_ih, bias_hh = arguments
    for name, tensor in (("h", h), ("c", c)):
        check_same(name, tensor, "input", input)
        if shape_of(tensor) != [input.shape[0], hidden]:
            raise RuntimeError(f"{name}: expected shape [{input.shape[0]}, {hidden}], got {shape_of(tensor)}")
    check_gate_weights(input, (weight_ih, weight_hh, bias_ih, bias_hh), hidden, input.shape[1], hidden)
    if not use_compiled("lstm_cell", input):
        return reference.lstm_cell(input, (h, c), *arguments[3:])
    if _needs_grad(*arguments):
        return torch.ops.cnnrnn_ext.lstm_cell_train(*arguments)[:2]
    return torch.ops.cnnrnn_ext.lstm_cell(*arguments)
