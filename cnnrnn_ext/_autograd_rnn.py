"""Autograd of the recurrent operators, one for every cell."""

import torch

from cnnrnn_ext._double_backward import double_backward
from cnnrnn_ext.reference._cells import CELLS, one_step
from cnnrnn_ext.reference._rnn import scan_layer

# ---- sequences ----
# inputs of rnn_train: the operands cell, x, h_0, c_0 and four lists of weights; the steps batch_sizes,
# lengths, reset; then tf32 and recompute_gates, left out by the dispatcher where they have their defaults
OPERANDS, STEPS = 8, 3


def _regroup(tensors, counts):
    tensors = iter(tensors)
    return [[next(tensors) for _ in range(count)] for count in counts]


def _sequence_setup(ctx, inputs, output):
    ctx.cell, x, h_0, c_0, *weights = inputs[:OPERANDS]
    steps, ctx.tf32 = inputs[OPERANDS : OPERANDS + STEPS], inputs[OPERANDS + STEPS]
    ctx.counts = [len(w) for w in weights]
    out, _, c_n, cells, reserve = output
    ctx.save_for_backward(*steps, out, cells, reserve, x, h_0, c_0, *(w for group in weights for w in group))
    ctx.mark_non_differentiable(reserve, *(() if CELLS[ctx.cell].states == 2 else (c_n, cells)))
    ctx.set_materialize_grads(False)


def _sequence_backward(ctx, grad_output, grad_h_n, grad_c_n, grad_cells, grad_reserve):
    grads = [grad_output, grad_h_n, grad_c_n, grad_cells]
    behind = [None] * (len(ctx.needs_input_grad) - OPERANDS)
    if all(g is None for g in grads):
        return (*[None] * 4, *([None] * count for count in ctx.counts), *behind)
    steps, saved, (x, h_0, c_0), flat = (
        ctx.saved_tensors[:3], ctx.saved_tensors[3:6], ctx.saved_tensors[6:9], ctx.saved_tensors[9:],
    )  # fmt: skip
    _, asked_x, asked_h, asked_c, *asked_weights = ctx.needs_input_grad[:OPERANDS]
    need_weight, need_bias = (any((*a, *b)) for a, b in (asked_weights[:2], asked_weights[2:]))
    grad_x, grad_h_0, grad_c_0, *grad_weights = torch.ops.cnnrnn_ext.rnn_backward(
        *grads, ctx.cell, x, h_0, c_0, *_regroup(flat, ctx.counts), *steps, *saved,
        asked_x, asked_h or asked_c, need_weight, need_bias, ctx.tf32,
    )  # fmt: skip
    per_list = [
        [g if wanted else None for g, wanted in zip(group, asked, strict=True)] if any(asked) else [None] * n
        for group, asked, n in zip(grad_weights, asked_weights, ctx.counts, strict=True)
    ]
    return (
        None,
        grad_x if asked_x else None,
        grad_h_0 if asked_h else None,
        grad_c_0 if asked_c else None,
        *per_list,
        *behind,
    )


# inputs of rnn_backward: four gradients, operands and steps as above, output, cells, reserve, flags, tf32


def _sequence_backward_setup(ctx, inputs, output):
    grads, ctx.cell, differentiable, weights = inputs[:4], inputs[4], inputs[5:8], inputs[8:12]
    steps, ctx.need = inputs[12:15], inputs[18:22]
    ctx.counts = [len(w) for w in weights]
    ctx.save_for_backward(*steps, *grads, *differentiable, *(w for group in weights for w in group))
    ctx.set_materialize_grads(False)


def _sequence_double_backward(ctx, outer_x, outer_h, outer_c, *outer_weights):
    steps, grads, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:7], ctx.saved_tensors[7:]
    counts, states = ctx.counts, CELLS[ctx.cell].states

    def function(x, h_0, c_0, *flat):
        weight_ih, weight_hh, bias_ih, bias_hh = _regroup(flat, counts)
        none = [None] * counts[0]
        weights = list(zip(weight_ih, weight_hh, bias_ih or none, bias_hh or none, none, strict=True))
        sequences, finals, _ = scan_layer(ctx.cell, x, (h_0, c_0)[:states], weights, *steps)
        output, cells = (*sequences, None)[:2]
        return output, *(*finals, None)[:2], cells

    need_x, need_state, need_weight, need_bias = ctx.need
    flags = (need_weight, need_weight, need_bias, need_bias)
    outer = [
        outer_x if need_x else None,
        *((outer_h, outer_c) if need_state else (None, None)),
        *(
            o
            for group, needed, count in zip(outer_weights, flags, counts, strict=True)
            for o in (group if needed and count else [None] * count)
        ),
    ]
    given = double_backward(function, inputs, grads, outer, zeros=range(1, 1 + states))
    grads, given = given[:4], given[4:]
    behind = [None] * (len(ctx.needs_input_grad) - len(grads) - OPERANDS)
    return (*grads, None, *given[:3], *_regroup(given[3:], counts), *behind)


# ---- cells ----


def _cell_setup(ctx, inputs, output):
    ctx.cell, *tensors = inputs
    _, c_1, reserve = output
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(reserve, *(() if CELLS[ctx.cell].states == 2 else (c_1,)))
    ctx.set_materialize_grads(False)


def _cell_backward(ctx, grad_h_1, grad_c_1, grad_reserve):
    return _cell_gradients(torch.ops.cnnrnn_ext.rnn_cell_backward.default, ctx, grad_h_1, grad_c_1)


def _cell_gradients(operator, ctx, grad_h_1, grad_c_1):
    asked = ctx.needs_input_grad[1:]
    if grad_h_1 is None and grad_c_1 is None:
        return (None,) * (1 + len(asked))
    grads = operator(
        grad_h_1, grad_c_1, ctx.cell, *ctx.saved_tensors,
        asked[0], asked[1] or asked[2], asked[3] or asked[4], asked[5] or asked[6],
    )  # fmt: skip
    return (None, *(g if wanted else None for g, wanted in zip(grads, asked, strict=True)))


class CellStep(torch.autograd.Function):
    """rnn_cell_train with its gradient, for eager calls on plain tensors: what ``register_autograd`` makes of
    the same formulas takes longer than a small cell's kernels.

    ``CellStep.apply(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)`` returns (h_1, c_1), or h_1 where
    that is the only state.
    """

    @staticmethod
    def forward(ctx, cell, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.cnnrnn_ext.rnn_cell_train.default(cell, *tensors)
        ctx.cell = cell
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        return output[:2] if CELLS[cell].states == 2 else output[0]

    @staticmethod
    def backward(ctx, grad_h_1, grad_c_1=None):
        operator = torch.ops.cnnrnn_ext.rnn_cell_backward.default
        if torch.is_grad_enabled():  # somebody wants to derive the gradient
            return _cell_gradients(operator, ctx, grad_h_1, grad_c_1)
        with torch._C._AutoDispatchBelowAutograd():
            return _cell_gradients(operator, ctx, grad_h_1, grad_c_1)


def _cell_backward_setup(ctx, inputs, output):
    grads, ctx.cell, tensors, ctx.need = inputs[:2], inputs[2], inputs[3:10], inputs[13:]
    ctx.save_for_backward(*grads, *tensors)
    ctx.set_materialize_grads(False)


def _cell_double_backward(ctx, outer_x, outer_h, outer_c, *outer_weights):
    grads, inputs = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
    states = CELLS[ctx.cell].states

    def function(x, h, c, *weights):
        new, _ = one_step(ctx.cell, x, (h, c)[:states], *weights)
        return (*new, None)[:2]

    need_x, need_state, need_weight, need_bias = ctx.need
    flags = (need_x, need_state, need_state, need_weight, need_weight, need_bias, need_bias)
    outer = (outer_x, outer_h, outer_c, *outer_weights)
    outer = [o if needed else None for o, needed in zip(outer, flags, strict=True)]
    given = double_backward(function, inputs, grads, outer, zeros=range(1, 1 + states))
    return (*given[:2], None, *given[2:], *[None] * (3 + 4))


FORMULAS = {
    "rnn_train": (_sequence_setup, _sequence_backward),
    "rnn_backward": (_sequence_backward_setup, _sequence_double_backward),
    "rnn_cell_train": (_cell_setup, _cell_backward),
    "rnn_cell_backward": (_cell_backward_setup, _cell_double_backward),
}
