"""The operators (operators.schema) without data: shapes, dtypes and layouts of what they return."""

import torch

from cnnrnn_ext._operator_conv_pool import KEPT, layout_of
from cnnrnn_ext._operator_rnn import reserve_dtype
from cnnrnn_ext.reference._cells import CELLS


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
    pool_size, pool_stride, pool_padding, ceil_mode, precision="highest",
):  # fmt: skip
    conv, pooled = conv_pool2d_sizes(
        x, weight, stride, padding, dilation, pool_size, pool_stride, pool_padding, ceil_mode
    )

    def image(size, dtype=x.dtype):
        size = (x.shape[0], weight.shape[0], *size)
        return torch.empty(size, dtype=dtype, device=x.device, memory_format=layout_of(x))

    none = x.new_empty(0)
    if pool == "avg":
        return image(pooled), none.to(torch.uint8), none if activation == "none" else image(conv)
    return image(pooled), image(pooled, torch.uint8), image(pooled) if activation in KEPT else none


def conv_pool2d_backward(
    grad_y, x, weight, bias, code, kept, stride, padding, dilation, groups, activation, pool,
    pool_size, pool_stride, pool_padding, ceil_mode, need_x, need_weight, need_bias, precision="highest",
):  # fmt: skip
    need_bias = need_bias and bias is not None
    layout = layout_of(x)
    none = x.new_empty(0)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_x else none,
        weight.new_empty(weight.shape) if need_weight else none,
        weight.new_empty(weight.shape[0]) if need_bias else none,
    )


def _batch(x, h_0, batch_sizes):
    if batch_sizes is None:
        return x.shape[1]
    return h_0.shape[1] if h_0 is not None else int(batch_sizes[0])


def _shape_if(x, condition, *shape):
    return x.new_empty(*shape) if condition else x.new_empty(0)


def _lists(needed, *groups):
    return tuple([t.new_empty(t.shape) for t in group] if needed else [] for group in groups)


def rnn_train(
    cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, lengths, reset,
    tf32=False, recompute_gates=False,
):  # fmt: skip
    kind, directions, hidden = CELLS[cell], len(weight_ih), weight_hh[0].shape[1]
    states = directions, _batch(x, h_0, batch_sizes), hidden
    sequence = *x.shape[:-1], directions * hidden
    return (
        x.new_empty(sequence),
        x.new_empty(states),
        _shape_if(x, kind.states == 2, *states),
        _shape_if(x, kind.states == 2, *sequence),
        x.new_empty(
            directions, *x.shape[:-1], 0 if recompute_gates else kind.kept, hidden, dtype=reserve_dtype(x)
        ),
    )


def rnn_backward(
    grad_output, grad_h_n, grad_c_n, grad_cells, cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
    batch_sizes, lengths, reset, output, cells, reserve, need_x, need_state, need_weight, need_bias,
    tf32=False,
):  # fmt: skip
    states = len(weight_ih), _batch(x, h_0, batch_sizes), weight_hh[0].shape[1]
    return (
        _shape_if(x, need_x, *x.shape),
        _shape_if(x, need_state, *states),
        _shape_if(x, need_state and CELLS[cell].states == 2, *states),
        *_lists(need_weight, weight_ih, weight_hh),
        *_lists(need_bias, bias_ih, bias_hh),
    )


def rnn(*args):
    return rnn_train(*args)[:3]


def rnn_layer(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):
    return rnn(cell, x, h_0, c_0, [weight_ih], [weight_hh], [], [], None, None, None)


def rnn_narrow(
    cell, x, h_0, c_0, weight_ih, weight_hh, scale_ih, scale_hh, bias_ih, bias_hh,
    batch_sizes, lengths, reset,
):  # fmt: skip
    return rnn(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, lengths, reset)


def rnn_cell_train(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    kind, state = CELLS[cell], (x.shape[0], weight_hh.shape[1])
    reserve = x.new_empty(state[0], kind.kept, state[1])
    return x.new_empty(state), _shape_if(x, kind.states == 2, *state), reserve


def rnn_cell_backward(
    grad_h_1, grad_c_1, cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, h_1, c_1, reserve,
    need_x, need_state, need_weight, need_bias,
):  # fmt: skip
    state = x.shape[0], weight_hh.shape[1]
    need_bias = need_bias and bias_ih is not None
    return (
        _shape_if(x, need_x, *x.shape),
        _shape_if(x, need_state, *state),
        _shape_if(x, need_state and CELLS[cell].states == 2, *state),
        _shape_if(x, need_weight, *weight_ih.shape),
        _shape_if(x, need_weight, *weight_hh.shape),
        _shape_if(x, need_bias, weight_ih.shape[0]),
        _shape_if(x, need_bias, weight_ih.shape[0]),
    )


def rnn_cell(*args):
    return rnn_cell_train(*args)[:2]


def rnn_cell_narrow(cell, x, h, c, weight_ih, weight_hh, scale_ih, scale_hh, bias_ih, bias_hh):
    return rnn_cell(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)


def conv_pool2d(*args):
    return conv_pool2d_train(*args)[0]
