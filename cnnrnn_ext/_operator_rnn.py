"""The recurrent operators (operators.schema) in plain PyTorch, forward and backward by formula."""

import torch

from cnnrnn_ext.reference._cells import CELLS, one_step
from cnnrnn_ext.reference._rnn import cuts, scan_layer, step_masks, step_sizes

# ---- forward ----


def _directions(weight_ih, weight_hh, bias_ih, bias_hh):
    """Weights as ``scan_layer`` takes them."""
    nothing = [None] * len(weight_ih)
    return list(zip(weight_ih, weight_hh, bias_ih or nothing, bias_hh or nothing, nothing, strict=True))


def _given(cell, h, c):
    return (h, c)[: CELLS[cell].states]


def _or_empty(x, tensors, count):
    """The tensors, and empty ones to make them ``count``."""
    return *tensors, *(x.new_empty(0) for _ in range(count - len(tensors)))


def reserve_dtype(x):
    """Of what rnn_train keeps for the backward: float32 beside bfloat16 on the CPU."""
    return torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x.dtype


def rnn_train(
    cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, lengths, reset,
    tf32=False, recompute_gates=False,
):  # fmt: skip
    weights = _directions(weight_ih, weight_hh, bias_ih, bias_hh)
    (output, *cells), finals, reserve = scan_layer(
        cell, x, _given(cell, h_0, c_0), weights, batch_sizes, lengths, reset, keep=True
    )
    reserve = reserve[..., :0, :] if recompute_gates else reserve
    return output, *_or_empty(x, finals, 2), *_or_empty(x, cells, 1), reserve.to(reserve_dtype(x))


def rnn(*arguments):
    return rnn_train(*arguments)[:3]


def rnn_layer(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):
    biases = ([b] if b is not None else [] for b in (bias_ih, bias_hh))
    return rnn(cell, x, h_0, c_0, [weight_ih], [weight_hh], *biases, None, None, None)


def _widened(weights, scales, dtype):
    """Narrow weights in x's dtype: int8 rows are multiplied by their scales."""
    weights = [w.to(dtype) for w in weights]
    return [s[:, None] * w for w, s in zip(weights, scales, strict=True)] if scales else weights


def rnn_narrow(
    cell, x, h_0, c_0, weight_ih, weight_hh, scale_ih, scale_hh, bias_ih, bias_hh,
    batch_sizes, lengths, reset,
):  # fmt: skip
    weight_ih, weight_hh = _widened(weight_ih, scale_ih, x.dtype), _widened(weight_hh, scale_hh, x.dtype)
    return rnn(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, lengths, reset)


def rnn_cell_train(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    new, kept = one_step(cell, x, _given(cell, h, c), weight_ih, weight_hh, bias_ih, bias_hh)
    reserve = torch.stack(kept, -2) if kept else x.new_empty(x.shape[0], 0, new[0].shape[1])
    return *_or_empty(x, new, 2), reserve


def rnn_cell(*arguments):
    return rnn_cell_train(*arguments)[:2]


def rnn_cell_narrow(cell, x, h, c, weight_ih, weight_hh, scale_ih, scale_hh, bias_ih, bias_hh):
    (weight_ih,) = _widened([weight_ih], None if scale_ih is None else [scale_ih], x.dtype)
    (weight_hh,) = _widened([weight_hh], None if scale_hh is None else [scale_hh], x.dtype)
    return rnn_cell(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)


# ---- the gates' gradients ----
# (grad_h, grad_c, states before, states after, kept)
#     -> gradients of from_x, of from_h [N, G*H], and of the states before beside the way through from_h


def _lstm_backward(grad_h, grad_c, before, after, kept):
    i, f, g, o = kept.unbind(-2)
    tanh_c = torch.tanh(after[1])
    grad_c = grad_c + grad_h * o * (1 - tanh_c**2)
    grad_gates = torch.cat(
        (
            grad_c * g * i * (1 - i),
            grad_c * before[1] * f * (1 - f),
            grad_c * i * (1 - g**2),
            grad_h * tanh_c * o * (1 - o),
        ),
        -1,
    )
    return grad_gates, grad_gates, torch.zeros_like(grad_h), grad_c * f


def _gru_backward(grad_h, grad_c, before, after, kept):
    r, z, n, h_n = kept.unbind(-2)
    grad_n = grad_h * (1 - z) * (1 - n**2)
    grad_r = grad_n * h_n * r * (1 - r)
    grad_z = grad_h * (before[0] - n) * z * (1 - z)
    from_x = torch.cat((grad_r, grad_z, grad_n), -1)
    return from_x, torch.cat((grad_r, grad_z, grad_n * r), -1), grad_h * z, None


def _rnn_tanh_backward(grad_h, grad_c, before, after, kept):
    grad = grad_h * (1 - after[0] ** 2)
    return grad, grad, torch.zeros_like(grad), None


def _rnn_relu_backward(grad_h, grad_c, before, after, kept):
    grad = torch.where(after[0] <= 0, 0, grad_h)  # NaN stays alive, as in torch
    return grad, grad, torch.zeros_like(grad), None


GATES_BACKWARD = {
    "lstm": _lstm_backward,
    "gru": _gru_backward,
    "rnn_tanh": _rnn_tanh_backward,
    "rnn_relu": _rnn_relu_backward,
}


# ---- backward ----


def _states_before(starts, sequences, sizes, valid, cut, order):
    """For each step the states it started from, found again from the outputs."""
    before, states = [None] * len(sizes), starts
    for t in order:
        n = sizes[t]
        old = tuple(s[:n] for s in states)
        before[t] = old if cut is None else tuple(s.masked_fill(cut[t], 0) for s in old)
        new = tuple(s[t] for s in sequences)
        if valid is not None:
            new = tuple(torch.where(valid[t], b, a) for a, b in zip(old, new, strict=True))
        states = tuple(torch.cat((b, s[n:])) for b, s in zip(new, states, strict=True))
    return before


def _scan_backward(cell, weight_hh, grads, grad_sequences, starts, sequences, reserve, valid, reset, reverse):
    """One direction, backward.

    Args:
        grads: of the last states, each [N, H].
        grad_sequences, sequences, reserve: for each step (of each state, the first two).

    Returns:
        Gradients of from_x and from_h at each step [n, G*H]; of the first states; h before each step [n, H].
    """
    sizes = [len(r) for r in reserve]
    order = list(reversed(range(len(sizes))) if reverse else range(len(sizes)))
    cut = None if reset is None or not sizes else cuts(reset, sizes, reverse)
    before = _states_before(starts, sequences, sizes, valid, cut, order)
    grad_x, grad_h = [None] * len(sizes), [None] * len(sizes)
    for t in reversed(order):
        n = sizes[t]
        held = tuple(g[:n] for g in grads)
        incoming = tuple(g if s is None else g + s[t] for g, s in zip(held, grad_sequences, strict=True))
        after = tuple(s[t] for s in sequences)
        grad_x[t], grad_h[t], *direct = GATES_BACKWARD[cell](
            incoming[0], incoming[-1], before[t], after, reserve[t]
        )
        if valid is not None:
            grad_x[t], grad_h[t] = (torch.where(valid[t], g, 0) for g in (grad_x[t], grad_h[t]))
        through = (direct[0] + grad_h[t] @ weight_hh, *direct[1:])[: len(grads)]
        if cut is not None:
            through = tuple(g.masked_fill(cut[t], 0) for g in through)
        if valid is not None:
            through = tuple(torch.where(valid[t], g, old) for g, old in zip(through, held, strict=True))
        grads = tuple(torch.cat((g, old[n:])) for g, old in zip(through, grads, strict=True))
    return grad_x, grad_h, grads, [b[0] for b in before]


def rnn_backward(
    grad_output, grad_h_n, grad_c_n, grad_cells, cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
    batch_sizes, lengths, reset, output, cells, reserve, need_x, need_state, need_weight, need_bias,
    tf32=False,
):  # fmt: skip
    if reserve.shape[-2] < CELLS[cell].kept:  # recompute_gates
        reserve = rnn_train(
            cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, lengths, reset
        )[4]
    sizes = step_sizes(x, batch_sizes)
    valid, reset = step_masks(x, lengths, reset)
    reserve = reserve.to(x.dtype)
    rows = x if valid is None else x.masked_fill(~valid, 0)
    rows = rows if batch_sizes is not None else rows.flatten(0, 1)
    batch, hidden = x.shape[1] if batch_sizes is None else sizes[0], weight_hh[0].shape[1]

    def steps(sequence, d):
        """Direction d of [T, N, D*H] or [R, D*H], a tensor for each step."""
        return sequence.reshape(len(rows), sequence.shape[-1])[:, d * hidden : (d + 1) * hidden].split(sizes)

    def joined(parts, width):
        return torch.cat(parts) if parts else x.new_empty(0, width)

    zeros = x.new_zeros(batch, hidden)
    grad_x, grad_starts = torch.zeros_like(rows), []
    grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh = [], [], [], []
    for d in range(len(weight_ih)):
        starts = tuple(zeros if s is None else s[d] for s in _given(cell, h_0, c_0))
        last = tuple(zeros if g is None else g[d] for g in _given(cell, grad_h_n, grad_c_n))
        along = [g if g is None else steps(g, d) for g in _given(cell, grad_output, grad_cells)]
        kept = reserve[d].flatten(0, -3) if len(rows) else reserve[d].view(0, *reserve.shape[-2:])
        from_x, from_h, first, h = _scan_backward(
            cell, weight_hh[d], last, along, starts, [steps(s, d) for s in _given(cell, output, cells)],
            kept.split(sizes) if sizes else (), valid, reset, d == 1,
        )  # fmt: skip
        grad_starts.append(first)
        from_x, from_h = (joined(g, weight_hh[d].shape[0]) for g in (from_x, from_h))
        grad_x += from_x @ weight_ih[d]
        grad_weight_ih.append(from_x.t() @ rows)
        grad_weight_hh.append(from_h.t() @ joined(h, hidden))
        grad_bias_ih.append(from_x.sum(0))
        grad_bias_hh.append(from_h.sum(0))
    grad_states = tuple(map(torch.stack, zip(*grad_starts, strict=True))) if need_state else ()
    need_bias = need_bias and bool(bias_ih)
    return (
        grad_x.view(x.shape) if need_x else x.new_empty(0),
        *_or_empty(x, grad_states, 2),
        grad_weight_ih if need_weight else [],
        grad_weight_hh if need_weight else [],
        grad_bias_ih if need_bias else [],
        grad_bias_hh if need_bias else [],
    )


def rnn_cell_backward(
    grad_h_1, grad_c_1, cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, h_1, c_1, reserve,
    need_x, need_state, need_weight, need_bias,
):  # fmt: skip
    zeros = torch.zeros_like(h_1)
    before = tuple(zeros if s is None else s for s in _given(cell, h, c))
    grads = [zeros if g is None else g for g in (grad_h_1, grad_c_1)]
    from_x, from_h, *direct = GATES_BACKWARD[cell](*grads, before, (h_1, c_1), reserve)
    grad_states = (direct[0] + from_h @ weight_hh, *direct[1:])[: CELLS[cell].states] if need_state else ()
    need_bias = need_bias and bias_ih is not None
    gradients = (
        (need_x, lambda: from_x @ weight_ih),
        (need_weight, lambda: from_x.t() @ x),
        (need_weight, lambda: from_h.t() @ before[0]),
        (need_bias, lambda: from_x.sum(0)),
        (need_bias, lambda: from_h.sum(0)),
    )
    grad_x, *grad_weights = (make() if needed else x.new_empty(0) for needed, make in gradients)
    return grad_x, *_or_empty(x, grad_states, 2), *grad_weights
