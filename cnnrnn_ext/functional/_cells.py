"""Single recurrent steps: checks, one operator call."""

import torch

from cnnrnn_ext._autograd_rnn import CellStep
from cnnrnn_ext._backend import plain_operands, use_compiled
from cnnrnn_ext._checks import check_choice, check_same, check_tensor, shape_of
from cnnrnn_ext._checks_rnn import check_gate_weights, check_states
from cnnrnn_ext.functional._common import HALF, autocast_dtype, beyond_autocast, cast, needs_grad
from cnnrnn_ext.functional._narrow import narrow_entry, narrow_note, narrow_uncovered, widened
from cnnrnn_ext.reference._cells import CELLS, NONLINEARITIES, one_step


def lstm_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """One LSTM step, as ``nn.LSTMCell`` computes it; the formula stands at ``lstm``.

    Args:
        input: [N, I].
        hx: (h [N, H], c [N, H]); None for zeros.
        weight_ih: [4*H, I], gates in torch's order i, f, g, o. weight_hh: [4*H, H].
        bias_ih, bias_hh: [4*H], or both None.

    Returns:
        (h_1, c_1), both [N, H].

    Raises:
        TypeError, RuntimeError: arguments whose type, shape, dtype or device does not fit, by name.
    """
    return run_cell("lstm_cell", "lstm", input, hx, (weight_ih, weight_hh, bias_ih, bias_hh))


def gru_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    """One GRU step, as ``nn.GRUCell`` computes it; the formula stands at ``gru``.

    Args:
        input: [N, I].
        hx: h [N, H]; None for zeros.
        weight_ih: [3*H, I], gates in torch's order r, z, n. weight_hh: [3*H, H].
        bias_ih, bias_hh: [3*H], or both None.

    Returns:
        h_1 [N, H].

    Raises:
        TypeError, RuntimeError: arguments whose type, shape, dtype or device does not fit, by name.
    """
    states = None if hx is None else (hx,)
    return run_cell("gru_cell", "gru", input, states, (weight_ih, weight_hh, bias_ih, bias_hh))[0]


def rnn_cell(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, nonlinearity="tanh"):
    """One step of an Elman network, as ``nn.RNNCell`` computes it; the formula stands at ``rnn``.

    Args:
        input: [N, I].
        hx: h [N, H]; None for zeros.
        weight_ih: [H, I]. weight_hh: [H, H].
        bias_ih, bias_hh: [H], or both None.
        nonlinearity: "tanh" or "relu".

    Returns:
        h_1 [N, H].

    Raises:
        ValueError: another nonlinearity.
        TypeError, RuntimeError: arguments whose type, shape, dtype or device does not fit, by name.
    """
    check_choice("nonlinearity", nonlinearity, tuple(NONLINEARITIES))
    cell, states = NONLINEARITIES[nonlinearity], None if hx is None else (hx,)
    return run_cell("rnn_cell", cell, input, states, (weight_ih, weight_hh, bias_ih, bias_hh))[0]


def run_cell(op, cell, input, states, weights, narrow=None):
    """What the three functions above share, and their modules: (h_1, c_1) or (h_1,).

    narrow: the NarrowWeights of a module, or None.
    """
    names = _check(cell, input, states, weights)
    given = weights[:2], (input, *(states or ()), *weights[2:])
    input, states, weights, result_dtype = _autocast(cell, input, states, weights)
    hidden = weights[1].shape[1]
    for name, tensor in zip(names, states or (), strict=False):
        check_same(name, tensor, "input", input)
        if shape_of(tensor) != [input.shape[0], hidden]:
            raise RuntimeError(f"{name}: expected shape [{input.shape[0]}, {hidden}], got {shape_of(tensor)}")
    check_gate_weights(input, weights, hidden * CELLS[cell].gates, input.shape[1], hidden)
    entry = narrow_entry(narrow, given[0], *given[1])
    uncovered, note = (narrow_uncovered(input), narrow_note(narrow)) if entry else (None, None)
    if use_compiled(op, input, uncovered, note):
        if input.device.type == "cpu" and input.dtype in HALF:
            input, *tensors = (t if t is None else t.float() for t in (input, *(states or ()), *weights))
            states, weights = tensors[: len(states or ())], tensors[len(states or ()) :]
        with beyond_autocast(input):
            new = _run_operator(cell, input, states, weights, entry)
    else:
        if entry:
            weights = *(widened(*copy, input.dtype) for copy in entry.copies), *weights[2:]
        new, _ = one_step(cell, input, states, *weights)
    return tuple(state.to(result_dtype) for state in new)


def _check(cell, input, states, weights):
    """Types and ranks; returns the names of the states."""
    names = ("h", "c") if CELLS[cell].states == 2 else ("hx",)
    check_tensor("input", input)
    if states is not None:
        check_states(names, states)
    for name, tensor in zip(("weight_ih", "weight_hh"), weights, strict=False):
        check_tensor(name, tensor)
    if input.dim() != 2:
        raise RuntimeError(f"input: expected [N, I], got shape {shape_of(input)}")
    if weights[1].dim() != 2:
        gates = CELLS[cell].gates
        raise RuntimeError(f"weight_hh: expected [{gates}*H, H], got shape {shape_of(weights[1])}")
    if (weights[2] is None) != (weights[3] is None):
        raise RuntimeError("bias_ih and bias_hh: expected both or neither")
    return names


def _autocast(cell, input, states, weights):
    """The operands under autocast, and the dtype of the result, both as in torch's own cells.

    On the CPU the products alone are autocast there: a state that mixes with its old value stays in the
    old one's dtype. Here the whole step is in float32.
    """
    dtype = autocast_dtype(input.device)
    if dtype is None:
        return input, states, weights, input.dtype
    on_cpu = input.device.type == "cpu"
    result = dtype
    if on_cpu and CELLS[cell].blends:
        result = (input if states is None else states[0]).dtype
    if input.dtype == torch.float64:
        result = torch.float64
    count = len(states or ())
    input, *tensors = cast(torch.float32 if on_cpu else dtype, input, *(states or ()), *weights)
    return input, tuple(tensors[:count]) if states is not None else None, tuple(tensors[count:]), result


def _run_operator(cell, input, states, weights, entry):
    h, c = (*(states or (None,)), None)[:2]
    if entry:
        new = torch.ops.cnnrnn_ext.rnn_cell_narrow(cell, input, h, c, *entry.operands, *weights[2:])
        return new[: CELLS[cell].states]
    operands = input, h, c, *weights
    if needs_grad(*operands):
        if not torch.compiler.is_compiling() and plain_operands(*operands):
            new = CellStep.apply(cell, *operands)
            return new if CELLS[cell].states == 2 else (new,)
        h_1, c_1, _ = torch.ops.cnnrnn_ext.rnn_cell_train(cell, *operands)
    else:
        h_1, c_1 = torch.ops.cnnrnn_ext.rnn_cell(cell, *operands)
    return (h_1, c_1)[: CELLS[cell].states]
