"""The operators (operators.schema) without data: shapes, dtypes and layouts of what they return."""

import torch

from cnnrnn_ext._operator_reference import layout_of


def pooled_size(size, kernel, stride, padding, ceil_mode):
    """Number of pooling windows along one dimension, by torch's rule: the last window starts inside."""
    count = size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)
    count = count // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def conv_pool2d_sizes(x, weight, stride, padding, dilation, pool_size, pool_stride, pool_padding, ceil_mode):
    """((conv height, conv width), (pooled height, pooled width))."""
    conv = tuple(
        (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (weight.shape[d + 2] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    )
    pooled = tuple(
        pooled_size(conv[d], pool_size[d], pool_stride[d], pool_padding[d], ceil_mode) for d in (0, 1)
    )
    return conv, pooled


def conv_pool2d_train(
    x, weight, bias, stride, padding, dilation, groups, activation, pool,
    pool_size, pool_stride, pool_padding, ceil_mode,
):  # fmt: skip
    _, (height, width) = conv_pool2d_sizes(
        x, weight, stride, padding, dilation, pool_size, pool_stride, pool_padding, ceil_mode
    )
    layout = layout_of(x)
    size = (x.shape[0], weight.shape[0], height, width)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    return y, torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=layout)


def conv_pool2d_backward(grad_y, x, weight, bias, code, *config):
    need_x, need_weight, need_bias = config[-3:]
    need_bias = need_bias and bias is not None
    layout = layout_of(x)
    none = x.new_empty(0)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_x else none,
        weight.new_empty(weight.shape) if need_weight else none,
        weight.new_empty(weight.shape[0]) if need_bias else none,
    )


def lstm_train(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):
    directions, batch, hidden = h_0.shape
    output = x.new_empty(x.shape[0], batch, directions * hidden)
    reserve = x.new_empty(directions, x.shape[0], batch, 5, hidden)
    return output, h_0.new_empty(h_0.shape), c_0.new_empty(c_0.shape), reserve


def lstm_backward(
    grad_output, grad_h_n, grad_c_n, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
    output, reserve, need_x, need_state, need_weight, need_bias,
):  # fmt: skip
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape) if need_x else none,
        h_0.new_empty(h_0.shape) if need_state else none,
        c_0.new_empty(c_0.shape) if need_state else none,
        [w.new_empty(w.shape) for w in weight_ih] if need_weight else [],
        [w.new_empty(w.shape) for w in weight_hh] if need_weight else [],
        [b.new_empty(b.shape) for b in bias_ih] if need_bias else [],
    )


def lstm_cell_train(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    return h.new_empty(h.shape), c.new_empty(c.shape), h.new_empty(h.shape[0], 5, h.shape[1])


def lstm_cell_backward(
    grad_h_1, grad_c_1, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh,
    reserve, need_x, need_state, need_weight, need_bias,
):  # fmt: skip
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape) if need_x else none,
        h.new_empty(h.shape) if need_state else none,
        c.new_empty(c.shape) if need_state else none,
        weight_ih.new_empty(weight_ih.shape) if need_weight else none,
        weight_hh.new_empty(weight_hh.shape) if need_weight else none,
        bias_ih.new_empty(bias_ih.shape) if need_bias and bias_ih is not None else none,
    )


def conv_pool2d(*args):
    return conv_pool2d_train(*args)[0]


def lstm(*args):
    return lstm_train(*args)[:3]


def lstm_cell(*args):
    return lstm_cell_train(*args)[:2]
