"""The public functions: user-level checks and layout, then one operator call.

Each has a twin of the same name and signature in ``cnnrnn_ext.reference``, which runs where no compiled
kernel serves the device, dtype or configuration; ``cnnrnn_ext.trace`` tells which ran, and why.
"""

import numbers

import torch

from cnnrnn_ext import reference
from cnnrnn_ext._backend import use_compiled
from cnnrnn_ext.ops import CODE_POSITIONS, conv_pool2d_sizes

PRECISIONS = ("highest", "high")


# ---- shared checks ----


def _check_tensor(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")


def _check_same(name, tensor, of, other):
    if tensor.dtype != other.dtype:
        raise RuntimeError(f"{name}: expected dtype {other.dtype} as {of} has, got {tensor.dtype}")
    if tensor.device != other.device:
        raise RuntimeError(f"{name}: expected device {other.device} as {of} has, got {tensor.device}")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _shape(tensor):
    return list(tensor.shape)


def _integers(name, value, count, least):
    """value as a tuple of ``count`` integers, each at least ``least``."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(values) == 1:
        values = values * count
    if len(values) != count or not all(isinstance(v, numbers.Integral | torch.SymInt) for v in values):
        raise TypeError(f"{name}: expected an integer or {count} integers, got {value!r}")
    if any(isinstance(v, bool) for v in values):
        raise TypeError(f"{name}: expected integers, got {value!r}")
    if any(v < least for v in values):
        raise RuntimeError(f"{name}: expected values >= {least}, got {value!r}")
    return values


def _needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(*tensors):
    """The tensors in the dtype of an active autocast region, as torch's own convolution and RNN do."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


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
        ValueError: an unknown activation, pool, padding or precision.
        RuntimeError: ranks, shapes, dtypes or devices that do not fit, or an output of no pixels.
    """
    _check_tensor("input", input)
    _check_tensor("weight", weight)
    if weight.dim() != 4:
        raise RuntimeError(f"weight: expected 4 dimensions [K, C/groups, KH, KW], got {_shape(weight)}")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input: expected [N, C, H, W] or [C, H, W], got shape {_shape(input)}")
    input, weight, bias = _autocast(input, weight, bias)
    stride, padding, dilation = _conv_arguments(2, input, weight, bias, stride, padding, dilation, groups)
    pool_size, pool_stride, pool_padding = _pool_arguments(2, pool, pool_size, pool_stride, pool_padding)
    _check_choice("activation", activation, tuple(reference.ACTIVATIONS))
    _check_choice("precision", precision, PRECISIONS)

    x = input if input.dim() == 4 else input.unsqueeze(0)
    pads, uneven = _explicit_padding(padding, weight, stride, dilation)
    _check_sizes(x, weight, stride, pads, dilation, pool, pool_size, pool_stride, pool_padding, ceil_mode)
    options = {
        "activation": activation,
        "pool": pool,
        "pool_size": pool_size,
        "pool_stride": pool_stride,
        "pool_padding": pool_padding,
        "ceil_mode": ceil_mode,
    }
    uncovered = uneven or _conv_pool2d_uncovered(activation, pool, pool_size)
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
    _check_tensor("input", input)
    _check_tensor("weight", weight)
    if weight.dim() != 3:
        raise RuntimeError(f"weight: expected 3 dimensions [K, C/groups, KL], got {_shape(weight)}")
    if input.dim() not in (2, 3):
        raise RuntimeError(f"input: expected [N, C, L] or [C, L], got shape {_shape(input)}")
    stride, padding, dilation = _conv_arguments(1, input, weight, bias, stride, padding, dilation, groups)
    pool_size, pool_stride, pool_padding = _pool_arguments(1, pool, pool_size, pool_stride, pool_padding)
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


def _conv_arguments(dims, input, weight, bias, stride, padding, dilation, groups):
    _check_same("weight", weight, "input", input)
    if bias is not None:
        _check_tensor("bias", bias)
        _check_same("bias", bias, "input", input)
        if _shape(bias) != [weight.shape[0]]:
            raise RuntimeError(f"bias: expected shape [{weight.shape[0]}], got {_shape(bias)}")
    (groups,) = _integers("groups", groups, 1, 1)
    channels = input.shape[-dims - 1]
    if channels != weight.shape[1] * groups:
        raise RuntimeError(
            f"input: expected {weight.shape[1] * groups} channels for weight {_shape(weight)} with groups="
            f"{groups}, got shape {_shape(input)}"
        )
    if weight.shape[0] % groups:
        raise RuntimeError(f"weight: {weight.shape[0]} output channels are not divisible by groups={groups}")
    if 0 in weight.shape:
        raise RuntimeError(f"weight: expected non-zero sizes, got shape {_shape(weight)}")
    if isinstance(padding, str):
        _check_choice("padding", padding, ("same", "valid"))
    else:
        padding = _integers("padding", padding, dims, 0)
    stride = _integers("stride", stride, dims, 1)
    if padding == "same" and any(s != 1 for s in stride):
        raise RuntimeError(f"padding: 'same' needs stride 1, got stride={stride}")
    return stride, padding, _integers("dilation", dilation, dims, 1)


def _pool_arguments(dims, pool, pool_size, pool_stride, pool_padding):
    _check_choice("pool", pool, reference.POOLS)
    size = _integers("pool_size", pool_size, dims, 1)
    stride = size if pool_stride is None else _integers("pool_stride", pool_stride, dims, 1)
    padding = _integers("pool_padding", pool_padding, dims, 0)
    if any(2 * p > s for p, s in zip(padding, size, strict=True)):
        raise RuntimeError(f"pool_padding: expected at most half of pool_size {size}, got {padding}")
    return size, stride, padding


def _explicit_padding(padding, weight, stride, dilation):
    """(padding as numbers, None), or (both sides' mean, why not) where "same" pads the sides unequally."""
    if padding == "valid":
        return (0, 0), None
    if padding != "same":
        return padding, None
    total = [dilation[d] * (weight.shape[d + 2] - 1) for d in (0, 1)]
    uneven = "padding='same' of an even kernel pads unequally" if any(t % 2 for t in total) else None
    return tuple((t + 1) // 2 for t in total), uneven


def _check_sizes(x, weight, stride, padding, dilation, pool, *pool_arguments):
    conv, pooled = conv_pool2d_sizes(x, weight, stride, padding, dilation, *pool_arguments)
    if any(size < 1 for size in conv):
        raise RuntimeError(
            f"input: the kernel {_shape(weight)[2:]} (dilation {dilation}) is larger than the padded input "
            f"of shape {_shape(x)} with padding {padding}"
        )
    if pool != "none" and any(size < 1 for size in pooled):
        raise RuntimeError(
            f"pool_size: the window {pool_arguments[0]} is larger than the convolution's output of "
            f"{list(conv)} pixels (input {_shape(x)})"
        )


def _conv_pool2d_uncovered(activation, pool, pool_size):
    """Why the kernels do not serve this configuration, or None."""
    if pool != "max":
        return f"no kernel for pool={pool!r}"
    if activation not in ("relu", "none"):
        return f"no kernel for activation={activation!r}"
    if pool_size[0] * pool_size[1] > CODE_POSITIONS:
        return f"no kernel for pooling windows of more than {CODE_POSITIONS} positions"
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
    _check_lstm(
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
    if torch.is_autocast_enabled(input.device.type):
        input, h_0, c_0, *flat_weights = _autocast(input, h_0, c_0, *flat_weights)
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


def _check_lstm(
    input, h_0, c_0, flat_weights, has_biases, num_layers, bidirectional, batch_first, proj_size, batch_sizes
):
    for name, tensor in (("input", input), ("h_0", h_0), ("c_0", c_0)):
        _check_tensor(name, tensor)
    directions = 2 if bidirectional else 1
    count = num_layers * directions * (2 + 2 * has_biases + (proj_size > 0))
    if len(flat_weights) != count:
        raise RuntimeError(
            f"flat_weights: expected {count} tensors for num_layers={num_layers}, bidirectional="
            f"{bidirectional}, has_biases={has_biases}, proj_size={proj_size}, got {len(flat_weights)}"
        )
    if input.dim() != (3 if batch_sizes is None else 2):
        expected = "[T, N, I] (or [N, T, I])" if batch_sizes is None else "packed [sum(batch_sizes), I]"
        raise RuntimeError(f"input: expected {expected}, got shape {_shape(input)}")
    if batch_sizes is not None and (batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu"):
        raise RuntimeError("batch_sizes: expected int64 on the CPU")
    hidden = flat_weights[0].shape[0] // 4
    state = proj_size or hidden
    batch = int(batch_sizes[0]) if batch_sizes is not None else input.shape[0 if batch_first else 1]
    for name, tensor, width in (("h_0", h_0, state), ("c_0", c_0, hidden)):
        _check_same(name, tensor, "input", input)
        expected = [num_layers * directions, batch, width]
        if _shape(tensor) != expected:
            raise RuntimeError(f"{name}: expected shape {expected}, got {_shape(tensor)}")
    for index, group in enumerate(reference.group_weights(flat_weights, has_biases, proj_size > 0)):
        layer = index // directions
        width = input.shape[-1] if layer == 0 else state * directions
        suffix = f"_l{layer}" + ("_reverse" if index % directions else "")
        _check_gate_weights(input, group[:4], hidden, width, state, suffix)
        if proj_size:
            _check_weight("weight_hr" + suffix, group[4], [state, hidden], input)


def _check_gate_weights(input, weights, hidden, width, state, suffix=""):
    shapes = ([4 * hidden, width], [4 * hidden, state], [4 * hidden], [4 * hidden])
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    for name, weight, expected in zip(names, weights, shapes, strict=True):
        if weight is not None:
            _check_weight(name + suffix, weight, expected, input)


def _check_weight(name, weight, expected, input):
    _check_tensor(name, weight)
    if not torch.is_autocast_enabled(input.device.type):
        _check_same(name, weight, "input", input)
    if _shape(weight) != expected:
        raise RuntimeError(f"{name}: expected shape {expected}, got {_shape(weight)} (input {_shape(input)})")


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
    for name, tensor in (("input", input), ("h", h), ("c", c), ("weight_hh", weight_hh)):
        _check_tensor(name, tensor)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected [N, I], got shape {_shape(input)}")
    if weight_hh.dim() != 2:
        raise RuntimeError(f"weight_hh: expected [4*H, H], got shape {_shape(weight_hh)}")
    if (bias_ih is None) != (bias_hh is None):
        raise RuntimeError("bias_ih and bias_hh: expected both or neither")
    hidden = weight_hh.shape[1]
    for name, tensor in (("h", h), ("c", c)):
        _check_same(name, tensor, "input", input)
        if _shape(tensor) != [input.shape[0], hidden]:
            raise RuntimeError(f"{name}: expected shape [{input.shape[0]}, {hidden}], got {_shape(tensor)}")
    _check_gate_weights(input, (weight_ih, weight_hh, bias_ih, bias_hh), hidden, input.shape[1], hidden)
    arguments = _autocast(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    if not use_compiled("lstm_cell", arguments[0]):
        input, h, c, *weights = arguments
        return reference.lstm_cell(input, (h, c), *weights)
    if _needs_grad(*arguments):
        return torch.ops.cnnrnn_ext.lstm_cell_train(*arguments)[:2]
    return torch.ops.cnnrnn_ext.lstm_cell(*arguments)
