"""Recurrent layers over a sequence: checks, layout, one operator call for each layer."""

import torch

from cnnrnn_ext._backend import is_traced, use_compiled
from cnnrnn_ext._checks import check_choice, check_tensor
from cnnrnn_ext._checks_rnn import check_sequence
from cnnrnn_ext.functional._common import autocast_dtype, beyond_autocast, cast, needs_grad, runs_in_float32
from cnnrnn_ext.functional._narrow import narrow_entry, narrow_note, narrow_uncovered, widened
from cnnrnn_ext.functional._schedule import schedule_note, tf32_allowed
from cnnrnn_ext.reference._cells import CELLS, NONLINEARITIES
from cnnrnn_ext.reference._rnn import (
    Options,
    arrange,
    group_weights,
    rates_per_state,
    run_layers,
    sequence,
    time_first,
)


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
    lengths=None,
    reset=None,
    return_all=False,
    zoneout=0.0,
    recurrent_dropout=0.0,
    layer_norm=None,
    recompute_gates=False,
):
    """A stack of LSTM layers over a sequence, as ``nn.LSTM`` computes it.

    For each step, with σ the logistic function::

        i, f, g, o = σ, σ, tanh, σ of (weight_ih x_t + bias_ih + weight_hh h_{t-1} + bias_hh)
        c_t = f ⊙ c_{t-1} + i ⊙ g;   h_t = o ⊙ tanh(c_t)

    (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000), D = 2 if bidirectional.

    Args:
        input: [T, N, I]; [N, T, I] if batch_first; packed [R, I], R = sum(batch_sizes), if batch_sizes is
            given. Here and below batch_first is ignored for packed input.
        hx: (h_0 [num_layers*D, N, P], c_0 [num_layers*D, N, H]), P = proj_size or H; None for zeros.
        flat_weights: torch's order; for each layer and direction weight_ih [4*H, I or D*P],
            weight_hh [4*H, P], then bias_ih, bias_hh [4*H] if has_biases, then weight_hr [P, H] if proj_size.
        dropout: probability of zeroing an output between layers, where ``training``.
        batch_sizes: [T] int64 on the CPU, decreasing, as in ``PackedSequence``.
        lengths: [N] integers from 0 to T, in any order: row n ends after lengths[n] steps. What stands in
            input behind a row's end is not read; the output there is 0, and h_n, c_n are the states after
            the row's last step (hx for a length of 0). The reverse direction begins at the row's last step.
        reset: [T, N] bool ([N, T] if batch_first, [R] if packed): no state crosses from step t - 1 to t
            where reset[t] is set. It is zeroed before step t, and in the reverse direction before t - 1.
        return_all: whether to return every layer's states at every step as well.
        zoneout: z or (z_h, z_c): each unit of h (of c) keeps its old value at a step with this probability
            where ``training``, else the mixture z ⊙ old + (1 - z) ⊙ new (Krueger et al. 2016).
        recurrent_dropout: p: where ``training``, h_{t-1} enters its product with weight_hh multiplied by a
            mask of 0 (probability p) and 1 / (1 - p), one for all steps of a sequence, for each layer and
            direction (Gal and Ghahramani 2016).
        layer_norm: None, or a flat list: for each layer and direction the weight and bias of layer
            normalisations of weight_ih x [4*H], of weight_hh h [4*H] and of c before its tanh [H] (Ba et al.
            2016; eps 1e-5; biases are added behind them). Without has_biases, the three weights alone.
        recompute_gates: whether a call that needs a gradient keeps h and c of every step alone, and the
            backward computes the gates again: 2 values of a unit and step where else there are 6 (a GRU: 1
            and 5; an Elman layer keeps no gates anyway), for the time of a forward (on a GPU, of its products
            over all steps at once). Plain PyTorch keeps what its autograd keeps.

    On a GPU float32 runs in TF32 where torch's own switch for nn.LSTM allows it, as told at ``LSTM``.
    zoneout, recurrent_dropout, layer_norm and proj_size have no kernel and run on plain PyTorch. All noise
    is drawn from torch's default generator before the first step, so that a seed replays it.

    Returns:
        output [T, N, D*P] (laid out as input), (h_n, c_n) shaped as hx; and where return_all
        (h_all [num_layers, T, N, D*P], c_all [num_layers, T, N, D*H]): [num_layers, N, T, ...] if
        batch_first, [num_layers, R, ...] if packed; 0 behind a row's end.

    Raises:
        TypeError, RuntimeError: arguments whose type, shape, dtype or device does not fit, by name.
        ValueError: a probability outside [0, 1].
    """
    options = Options(
        has_biases=has_biases, num_layers=num_layers,
        dropout=dropout, training=training, bidirectional=bidirectional, batch_first=batch_first,
        proj_size=proj_size, batch_sizes=batch_sizes, lengths=lengths, reset=reset, return_all=return_all,
        zoneout=zoneout, recurrent_dropout=recurrent_dropout, layer_norm=layer_norm,
        recompute_gates=recompute_gates,
    )  # fmt: skip
    return run_sequence("lstm", "lstm", input, hx, flat_weights, options)


def gru(
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
    batch_sizes=None,
    lengths=None,
    reset=None,
    return_all=False,
    zoneout=0.0,
    recurrent_dropout=0.0,
    recompute_gates=False,
):
    """A stack of GRU layers over a sequence, as ``nn.GRU`` computes it.

    For each step::

        r, z = σ of (weight_ih x_t + bias_ih + weight_hh h_{t-1} + bias_hh), their rows of both
        n = tanh(weight_in x_t + bias_in + r ⊙ (weight_hn h_{t-1} + bias_hn))
        h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}

    (Cho et al. 2014; the reset gate stands behind the product, as in cuDNN and torch).

    Args:
        hx: h_0 [num_layers*D, N, H]; None for zeros.
        flat_weights: as ``lstm``'s, with 3*H rows in torch's order r, z, n, and no weight_hr.
        zoneout: one probability, of h.
        The others: as ``lstm``'s.

    Returns:
        output [T, N, D*H], h_n shaped as h_0; and where return_all h_all [num_layers, T, N, D*H].
        Layouts and errors as ``lstm``'s.
    """
    options = Options(
        has_biases=has_biases, num_layers=num_layers,
        dropout=dropout, training=training, bidirectional=bidirectional, batch_first=batch_first,
        batch_sizes=batch_sizes, lengths=lengths, reset=reset, return_all=return_all, zoneout=zoneout,
        recurrent_dropout=recurrent_dropout, recompute_gates=recompute_gates,
    )  # fmt: skip
    return run_sequence("gru", "gru", input, None if hx is None else (hx,), flat_weights, options)


def rnn(
    input,
    hx,
    flat_weights,
    *,
    nonlinearity="tanh",
    has_biases=True,
    num_layers=1,
    dropout=0.0,
    training=False,
    bidirectional=False,
    batch_first=False,
    batch_sizes=None,
    lengths=None,
    reset=None,
    return_all=False,
    zoneout=0.0,
    recurrent_dropout=0.0,
    recompute_gates=False,
):
    """A stack of Elman layers over a sequence, as ``nn.RNN`` computes it (Elman 1990).

    For each step ``h_t = tanh(weight_ih x_t + bias_ih + weight_hh h_{t-1} + bias_hh)``.

    Args:
        hx: h_0 [num_layers*D, N, H]; None for zeros.
        flat_weights: as ``lstm``'s, with H rows, and no weight_hr.
        nonlinearity: "tanh" or "relu".
        zoneout: one probability, of h.
        The others: as ``lstm``'s.

    Returns:
        output [T, N, D*H], h_n shaped as h_0; and where return_all h_all [num_layers, T, N, D*H].
        Layouts and errors as ``lstm``'s; ValueError for another nonlinearity.
    """
    check_choice("nonlinearity", nonlinearity, tuple(NONLINEARITIES))
    options = Options(
        has_biases=has_biases,
        num_layers=num_layers, dropout=dropout, training=training, bidirectional=bidirectional,
        batch_first=batch_first, batch_sizes=batch_sizes, lengths=lengths, reset=reset,
        return_all=return_all, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
        recompute_gates=recompute_gates,
    )  # fmt: skip
    return run_sequence(
        "rnn", NONLINEARITIES[nonlinearity], input, None if hx is None else (hx,), flat_weights, options
    )


def run_sequence(op, cell, input, states, flat_weights, options, narrow=None):
    """What the three functions above share, and their modules, on an operator or on the reference.

    narrow: the NarrowWeights of a module, or None.
    """
    check_tensor("input", input)
    given = input, states, flat_weights
    input, states, flat_weights, options, dtype = _autocast(cell, input, states, flat_weights, options)
    check_sequence(cell, input, states, flat_weights, options)
    entry = _narrow_entry(narrow, *given, options)
    uncovered, note = _uncovered(cell, options), None
    if entry:
        uncovered, note = uncovered or narrow_uncovered(input), narrow_note(narrow)
    elif is_traced() and uncovered is None:
        note = _schedule_note(cell, input, states, flat_weights, options)
    compiled = use_compiled(op, input, uncovered, note)
    if entry and (not compiled or (options.return_all and CELLS[cell].states == 2)):
        # No narrow operator: the cells of every step come from the one for training.
        flat_weights, entry = _widened(flat_weights, entry.copies, input.dtype), None
    if not compiled:
        return _in_dtype(sequence(cell, input, states, flat_weights, options), input.dtype, dtype)
    if runs_in_float32(input, narrow=bool(entry)):
        input, *rest = (t.float() for t in (input, *(states or ()), *flat_weights))
        states, flat_weights = _split(rest, states)
    x, reset = time_first(input, options)
    weights = group_weights(flat_weights, options)
    lengths = None if options.lengths is None else options.lengths.to(x.device, torch.int64)

    def layer(rows, x, states):
        steps = options.batch_sizes, lengths, reset
        narrow = entry and entry.operands[rows.start // options.directions]
        return _run_operator(cell, x, states, weights[rows], steps, options, narrow)

    with beyond_autocast(x):
        results = arrange(cell, *run_layers(layer, x, states, options), options)
    return _in_dtype(results, x.dtype, dtype)


def _in_dtype(results, computed, dtype):
    """The results, nested as they are, in the dtype that is wanted."""
    if computed == dtype:
        return results
    if isinstance(results, torch.Tensor):
        return results.to(dtype)
    return tuple(_in_dtype(part, computed, dtype) for part in results)


def _split(tensors, states):
    """(states, weights) of one list, with as many states as there were."""
    count = len(states or ())
    return tuple(tensors[:count]) if states else states, tensors[count:]


def _narrow_entry(narrow, input, states, flat_weights, options):
    if narrow is None:
        return None
    groups = group_weights(flat_weights, options)
    matrices = [weight for group in groups for weight in group[:2]]
    others = [weight for group in groups for weight in group[2:]]
    return narrow_entry(narrow, matrices, input, *(states or ()), *others, *(options.layer_norm or ()))


def _widened(flat_weights, copies, dtype):
    """flat_weights with those weights in place of weight_ih and weight_hh."""
    weights = list(flat_weights)
    each = len(weights) // (len(copies) // 2)
    for index, copy in enumerate(copies):
        weights[index // 2 * each + index % 2] = widened(*copy, dtype)
    return weights


def _autocast(cell, input, states, flat_weights, options):
    """The operands under autocast, and the dtype of the results, both as in torch's own layers.

    Those run an LSTM as one call in the autocast dtype. Of a GRU on the CPU they autocast the products alone,
    and a state that mixes with its old value stays in the old one's dtype: here all of it is in float32.
    """
    dtype = autocast_dtype(input.device)
    if dtype is None:
        return input, states, flat_weights, options, input.dtype
    result = dtype
    if cell == "gru" and input.device.type == "cpu":
        dtype, result = torch.float32, (input if states is None else states[0]).dtype
    if input.dtype == torch.float64:
        result = torch.float64
    input, *rest = cast(dtype, input, *(states or ()), *flat_weights)
    states, flat_weights = _split(rest, states)
    if options.layer_norm is not None:
        options = options._replace(layer_norm=cast(dtype, *options.layer_norm))
    return input, states, flat_weights, options, result


def _schedule_note(cell, input, states, flat_weights, options):
    batch = input.shape[0 if options.swapped else 1]
    if options.batch_sizes is not None:
        batch = int(options.batch_sizes[0]) if len(options.batch_sizes) else 0
    train = needs_grad(input, *(states or ()), *flat_weights)
    return schedule_note(cell, input, batch, flat_weights[1].shape[1], options.directions, train)


def _uncovered(cell, options):
    """Why the kernels do not serve this configuration, or None."""
    if options.proj_size:
        return "no kernel for proj_size"
    if options.layer_norm is not None:
        return "no kernel for layer_norm"
    if any(rates_per_state(cell, options.zoneout)):
        return "no kernel for zoneout"
    if options.recurrent_dropout and options.training:
        return "no kernel for recurrent_dropout in training"
    return None


def _run_operator(cell, x, states, weights, steps, options, narrow):
    """One layer; results as ``run_layers`` wants them. narrow: its operands from NarrowWeights, or None."""
    weight_ih, weight_hh, bias_ih, bias_hh, _ = (list(group) for group in zip(*weights, strict=True))
    if bias_ih[0] is None:
        bias_ih = bias_hh = []
    h_0, c_0 = (*(states or (None,)), None)[:2]
    count = CELLS[cell].states
    if narrow:
        results = torch.ops.cnnrnn_ext.rnn_narrow(cell, x, h_0, c_0, *narrow, bias_ih, bias_hh, *steps)
        return results[:1], results[1 : 1 + count]
    arguments = (cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, *steps, tf32_allowed(x))
    train = needs_grad(x, h_0, c_0, *weight_ih, *weight_hh, *bias_ih, *bias_hh)
    if train or (options.return_all and count == 2):
        output, h_n, c_n, cells, _ = torch.ops.cnnrnn_ext.rnn_train(*arguments, options.recompute_gates)
        return (output, cells)[:count], (h_n, c_n)[:count]
    output, h_n, c_n = torch.ops.cnnrnn_ext.rnn(*arguments)
    return (output,), (h_n, c_n)[:count]
