"""The operators themselves (operators.schema) in plain PyTorch, forward and backward by formula.

They run where a raw operator is called on a device without compiled kernels. The backward formulas are
written out, because autograd is switched off below the dispatcher.
"""

import torch
import torch.nn.functional as F

from cnnrnn_ext import reference

DEAD = 255  # the code of an output that passes no gradient


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


def _steps(length, direction):
    return range(length) if direction == 0 else reversed(range(length))


def lstm_train(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):
    steps, batch, hidden, directions = x.shape[0], x.shape[1], h_0.shape[2], len(weight_ih)
    output = x.new_empty(steps, batch, directions * hidden)
    reserve = x.new_empty(directions, steps, batch, 5, hidden)
    h_n, c_n = h_0.clone(), c_0.clone()
    for d in range(directions):
        biases = (bias_ih[d], bias_hh[d]) if bias_ih else (None, None)
        for t in _steps(steps, d):
            h_n[d], c_n[d], reserve[d, t] = lstm_cell_train(
                x[t], h_n[d], c_n[d], weight_ih[d], weight_hh[d], *biases
            )
            output[t, :, d * hidden : (d + 1) * hidden] = h_n[d]
    return output, h_n, c_n, reserve


def lstm(*args):
    return lstm_train(*args)[:3]


def lstm_cell_train(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    gates = F.linear(x, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c_1 = f * c + i * g
    return o * torch.tanh(c_1), c_1, torch.stack((i, f, g, o, c_1), -2)


def lstm_cell(*args):
    return lstm_cell_train(*args)[:2]


def _gates_backward(grad_h, grad_c, c, reserve):
    """(gradient of the summed gates [N, 4*H], gradient of the previous c) of one step."""
    i, f, g, o, c_1 = reserve.unbind(-2)
    tanh_c = torch.tanh(c_1)
    grad_c = grad_c + grad_h * o * (1 - tanh_c**2)
    grad_gates = (
        grad_c * g * i * (1 - i),
        grad_c * c * f * (1 - f),
        grad_c * i * (1 - g**2),
        grad_h * tanh_c * o * (1 - o),
    )
    return torch.cat(grad_gates, -1), grad_c * f


def lstm_backward(
    grad_output, grad_h_n, grad_c_n, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
    output, reserve, need_x, need_state, need_weight, need_bias,
):  # fmt: skip
    steps, batch, hidden, directions = x.shape[0], x.shape[1], h_0.shape[2], len(weight_ih)
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    grad_h_0, grad_c_0 = torch.zeros_like(h_0), torch.zeros_like(c_0)
    grad_weight_ih, grad_weight_hh, grad_bias = [], [], []
    for d in range(directions):
        columns = slice(d * hidden, (d + 1) * hidden)
        grad_h = torch.zeros_like(h_0[d]) if grad_h_n is None else grad_h_n[d]
        grad_c = torch.zeros_like(c_0[d]) if grad_c_n is None else grad_c_n[d]
        grad_gates = x.new_empty(steps, batch, 4 * hidden)
        earlier = -1 if d == 0 else 1  # where the step before t stands in time
        for t in _steps(steps, 1 - d):
            if grad_output is not None:
                grad_h = grad_h + grad_output[t, :, columns]
            first = not 0 <= t + earlier < steps
            c = c_0[d] if first else reserve[d, t + earlier, :, 4]
            grad_gates[t], grad_c = _gates_backward(grad_h, grad_c, c, reserve[d, t])
            grad_h = grad_gates[t] @ weight_hh[d]
        grad_h_0[d], grad_c_0[d] = grad_h, grad_c
        states = output[:, :, columns]
        h = torch.cat((h_0[d : d + 1], states[:-1]) if d == 0 else (states[1:], h_0[d : d + 1]))[:steps]
        flat = grad_gates.flatten(0, 1)
        if need_x:
            grad_x += grad_gates @ weight_ih[d]
        if need_weight:
            grad_weight_ih.append(flat.t() @ x.flatten(0, 1))
            grad_weight_hh.append(flat.t() @ h.flatten(0, 1))
        if need_bias and bias_ih:
            grad_bias.append(flat.sum(0))
    if not need_state:
        grad_h_0, grad_c_0 = x.new_empty(0), x.new_empty(0)
    return grad_x, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias


def lstm_cell_backward(
    grad_h_1, grad_c_1, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh,
    reserve, need_x, need_state, need_weight, need_bias,
):  # fmt: skip
    none = x.new_empty(0)
    grad_h_1 = torch.zeros_like(h) if grad_h_1 is None else grad_h_1
    grad_c_1 = torch.zeros_like(c) if grad_c_1 is None else grad_c_1
    grad_gates, grad_c = _gates_backward(grad_h_1, grad_c_1, c, reserve)
    return (
        grad_gates @ weight_ih if need_x else none,
        grad_gates @ weight_hh if need_state else none,
        grad_c if need_state else none,
        grad_gates.t() @ x if need_weight else none,
        grad_gates.t() @ h if need_weight else none,
        grad_gates.sum(0) if need_bias and bias_ih is not None else none,
    )
