"""The public functions in plain PyTorch: the correctness reference, and what runs where no kernel exists.

Same names and signatures as ``cnnrnn_ext.functional``. Imports nothing of this package.
"""

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
):
    """``pool(activation(conv2d(input, weight, bias)))``; see ``functional.conv_pool2d``."""
    y = ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    if pool == "max":
        return F.max_pool2d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
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
):
    """``pool(activation(conv1d(input, weight, bias)))``; see ``functional.conv_pool1d``."""
    y = ACTIVATIONS[activation](F.conv1d(input, weight, bias, stride, padding, dilation, groups))
    if pool == "max":
        return F.max_pool1d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    if pool == "avg":
        return F.avg_pool1d(y, pool_size, pool_stride, pool_padding, ceil_mode)
    return y


def lstm_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """One LSTM step; see ``functional.lstm_cell``."""
    h, c = hx
    return lstm_gates(F.linear(input, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh), c)


def lstm_gates(preactivation, c):
    """(h', c') from the summed gates [..., 4*H] in torch's order i, f, g, o, and c [..., H]:

    c' = σ(f) ⊙ c + σ(i) ⊙ tanh(g),  h' = σ(o) ⊙ tanh(c')
    """
    i, f, g, o = preactivation.chunk(4, -1)
    c_1 = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c_1), c_1


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
    """A stack of LSTM layers over a sequence; see ``functional.lstm``."""
    if batch_first and batch_sizes is None:
        input = input.transpose(0, 1)
    weights = group_weights(flat_weights, has_biases, proj_size > 0)
    output, h_n, c_n = run_layers(
        lstm_layer, input, hx, weights, num_layers, bidirectional, dropout, training, batch_sizes
    )
    return (output.transpose(0, 1) if batch_first and batch_sizes is None else output), (h_n, c_n)


def group_weights(flat_weights, has_biases, has_projection):
    """torch's flat list of weights, as one (w_ih, w_hh, b_ih, b_hh, w_hr) per layer and direction."""
    each = 2 + 2 * has_biases + has_projection
    groups = [tuple(flat_weights[i : i + each]) for i in range(0, len(flat_weights), each)]
    return [
        (g[0], g[1], *(g[2:4] if has_biases else (None, None)), g[-1] if has_projection else None)
        for g in groups
    ]


def run_layers(layer, x, hx, weights, num_layers, bidirectional, dropout, training, batch_sizes=None):
    """Feeds x [T, N, I] through the layers, with dropout between them.

    ``layer(x, h_0, c_0, weights, batch_sizes) -> output, h_n, c_n`` is what runs one layer in all its
    directions. Returns output [T, N, D*H], h_n and c_n [num_layers*D, N, H].
    """
    directions = 2 if bidirectional else 1
    h_n, c_n = [], []
    for index in range(num_layers):
        rows = slice(index * directions, (index + 1) * directions)
        x, h, c = layer(x, hx[0][rows], hx[1][rows], weights[rows], batch_sizes)
        h_n.append(h)
        c_n.append(c)
        if dropout and training and index < num_layers - 1:
            x = F.dropout(x, dropout, True)
    if num_layers == 1:
        return x, h_n[0], c_n[0]
    return x, torch.cat(h_n), torch.cat(c_n)


def lstm_layer(x, h_0, c_0, weights, batch_sizes=None):
    """One LSTM layer. x [T, N, I], or packed [sum(batch_sizes), I] with the batch size of each step."""
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    rows = x.flatten(0, 1) if batch_sizes is None else x
    results = [
        _lstm_scan(rows, h_0[d], c_0[d], *weights[d], sizes, reverse=d == 1) for d in range(len(weights))
    ]
    outputs, h_n, c_n = zip(*results, strict=True)
    output = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
    if batch_sizes is None:
        output = output.view(*x.shape[:2], output.shape[-1])
    return output, torch.stack(h_n), torch.stack(c_n)


def _lstm_scan(rows, h, c, w_ih, w_hh, b_ih, b_hh, w_hr, sizes, reverse):
    projected = F.linear(rows, w_ih, b_ih).split(sizes)
    outputs = [None] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        # Rows beyond sizes[t] belong to sequences that have ended (forward) or not begun (reverse).
        n = sizes[t]
        h_1, c_1 = lstm_gates(projected[t] + F.linear(h[:n], w_hh, b_hh), c[:n])
        if w_hr is not None:
            h_1 = F.linear(h_1, w_hr)
        outputs[t] = h_1
        h, c = torch.cat((h_1, h[n:])), torch.cat((c_1, c[n:]))
    if not outputs:
        return rows.new_empty(0, h.shape[-1]), h, c
    return torch.cat(outputs), h, c
