"""The short way of one step: from the module's call to the operator, with as few tests between as can be.

Every function here returns None where a call may need more than the operator, or where the operator refused
its operands. The way through ``functional`` then does the same, or tells what does not fit.
"""

from operator import itemgetter

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_tracing_state as tracing
from torch.nn import Module
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from cnnrnn_ext._autograd_rnn import CellStep
from cnnrnn_ext._backend import plain_operands
from cnnrnn_ext.functional._common import needs_grad
from cnnrnn_ext.reference._cells import CELLS
from cnnrnn_ext.reference._rnn import rates_per_state

# What OpOverload.__call__ calls: its frame costs as much as all tests here.
rnn = torch.ops.cnnrnn_ext.rnn.default._op
rnn_layer = torch.ops.cnnrnn_ext.rnn_layer.default._op
rnn_narrow = torch.ops.cnnrnn_ext.rnn_narrow.default._op
rnn_cell = torch.ops.cnnrnn_ext.rnn_cell.default._op
rnn_cell_narrow = torch.ops.cnnrnn_ext.rnn_cell_narrow.default._op


module_call = Module.__call__


class ShortCall:
    """``nn.Module.__call__``, which takes as long as a small cell's kernel, where it only calls forward."""

    def __call__(self, *args, **kwargs):
        if (
            kwargs
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or self._compiled_call_impl is not None
            or Module.__call__ is not module_call  # somebody looks on: a tracer, a profiler
            or tracing()
        ):
            return super().__call__(*args, **kwargs)
        return self.forward(*args)


def _states(cell, hx):
    """(h, c), either of them None where there is none, if they are tensors of torch's own."""
    if hx is None:
        return None, None
    if cell == "lstm":
        fits = type(hx) is tuple and len(hx) == 2 and type(hx[0]) is Tensor and type(hx[1]) is Tensor
        return hx if fits else None
    return (hx, None) if type(hx) is Tensor else None


def stream_cell(cell, module, input, hx):
    """One call of a cell module, for an input that is ``plain``; what it returns, or None."""
    states = _states(cell, hx)
    if states is None:
        return None
    h, c = states
    own, narrow = module._parameters, module._narrow
    try:
        weights = weight_ih, weight_hh, bias_ih, bias_hh = (
            own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"],
        )  # fmt: skip
        if is_grad_enabled() and needs_grad(input, h, c, *weights):
            return CellStep.apply(cell, input, h, c, *weights) if plain_operands(*weights) else None
        if narrow is None:
            new = rnn_cell(cell, input, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
        else:
            operands = narrow.kept((weight_ih, weight_hh)).operands
            new = rnn_cell_narrow(cell, input, h, c, *operands, bias_ih, bias_hh)
    except (KeyError, RuntimeError):  # a weight that is no parameter (any more), or does not fit
        return None
    return new if cell == "lstm" else new[0]


def plan_of(module):
    """What stream_sequence needs of a sequence module beside its parameters; False where it has no short way.

    (cell, whether the batch stands first, a getter of all parameters, their number for each direction,
    directions, layers)
    """
    cell = module.mode.lower()
    noise = (module.dropout and module.num_layers > 1) or module.recurrent_dropout
    if (
        module.proj_size
        or any(rates_per_state(cell, module.zoneout))
        or (noise and module.training)
        or module._norms() is not None
    ):
        return False
    directions = 2 if module.bidirectional else 1
    weights_of = itemgetter(*module._flat_weights_names)
    return cell, module.batch_first, weights_of, 4 if module.bias else 2, directions, module.num_layers


def stream_sequence(plan, module, input, hx):
    """One call of a sequence module, for an input that is ``plain``; what it returns, or None."""
    cell, batch_first, weights_of, each, directions, layers = plan
    states = _states(cell, hx)
    if states is None:
        return None
    h, c = states
    swapped = batch_first and input.shape[:2] != (1, 1)
    x = input.transpose(0, 1) if swapped else input
    try:
        weights = weights_of(module._parameters)
        if is_grad_enabled() and needs_grad(x, h, c, *weights):
            return None
        narrow = module._narrow
        if narrow is not None:
            matrices = weights if each == 2 else [w for i, w in enumerate(weights) if i % 4 < 2]
            narrow = narrow.kept(matrices).operands
        if layers == 1:
            x, h_n, c_n = _layer(cell, x, h, c, weights, each, narrow and narrow[0])
        else:
            x, h_n, c_n = _layers(cell, x, h, c, weights, each, directions, layers, narrow)
    except (KeyError, RuntimeError):  # a weight that is no parameter (any more), or does not fit
        return None
    return x.transpose(0, 1) if swapped else x, (h_n, c_n) if cell == "lstm" else h_n


def _layer(cell, x, h, c, weights, each, narrow):
    """weights: of each direction in turn, ``each`` tensors."""
    if len(weights) == each and not narrow:
        return rnn_layer(cell, x, h, c, *weights, *(None,) * (4 - each))
    bias_ih, bias_hh = (weights[2::4], weights[3::4]) if each == 4 else ([], [])
    if narrow:
        return rnn_narrow(cell, x, h, c, *narrow, bias_ih, bias_hh, None, None, None)
    return rnn(cell, x, h, c, weights[::each], weights[1::each], bias_ih, bias_hh, None, None, None)


def _layers(cell, x, h, c, weights, each, directions, layers, narrow):
    nothing, rows = [None] * layers, each * directions
    h, c = (nothing if s is None else s.split(directions) for s in (h, c))
    if len(h) != layers or len(c) != layers:
        raise RuntimeError("a state of another number of layers")
    finals = []
    for index in range(layers):
        group = weights[index * rows : (index + 1) * rows]
        x, *last = _layer(cell, x, h[index], c[index], group, each, narrow and narrow[index])
        finals.append(last)
    h_n, c_n = zip(*finals, strict=True)
    return x, torch.cat(h_n), torch.cat(c_n) if CELLS[cell].states == 2 else None
