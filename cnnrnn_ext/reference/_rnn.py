"""Recurrent layers over a sequence in plain PyTorch: one scan over time for every cell."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from cnnrnn_ext.reference._cells import CELLS, NONLINEARITIES


class Extras(NamedTuple):
    """What one layer and direction has beside its weights, all of it in plain PyTorch alone."""

    zones: tuple = ()  # for each state: where it keeps its old value, bool [R, H]; or the probability of it
    mask_h: torch.Tensor | None = None  # [N, P]: recurrent dropout's factors of h before its product
    norms: tuple = (None, None, None)  # (weight, bias) of the layer normalisations of W_ih x, W_hh h and c


class Options(NamedTuple):
    """The keyword arguments of the functions below; their meaning stands at ``functional.lstm``."""

    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    batch_sizes: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    reset: torch.Tensor | None = None
    return_all: bool = False
    zoneout: float | tuple = 0.0
    recurrent_dropout: float = 0.0
    layer_norm: list | None = None
    recompute_gates: bool = False  # of the kernels; here it changes nothing

    @property
    def directions(self):
        return 2 if self.bidirectional else 1

    @property
    def swapped(self):
        """Whether the batch stands before the time: in a packed input it never does."""
        return self.batch_first and self.batch_sizes is None


# ---- the public functions ----


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
    """A stack of LSTM layers over a sequence; see ``functional.lstm``."""
    options = Options(
        has_biases=has_biases, num_layers=num_layers, dropout=dropout,
        training=training, bidirectional=bidirectional, batch_first=batch_first, proj_size=proj_size,
        batch_sizes=batch_sizes, lengths=lengths, reset=reset, return_all=return_all, zoneout=zoneout,
        recurrent_dropout=recurrent_dropout, layer_norm=layer_norm, recompute_gates=recompute_gates,
    )  # fmt: skip
    return sequence("lstm", input, hx, flat_weights, options)


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
    """A stack of GRU layers over a sequence; see ``functional.gru``."""
    options = Options(
        has_biases=has_biases, num_layers=num_layers, dropout=dropout,
        training=training, bidirectional=bidirectional, batch_first=batch_first, batch_sizes=batch_sizes,
        lengths=lengths, reset=reset, return_all=return_all, zoneout=zoneout,
        recurrent_dropout=recurrent_dropout,
    )  # fmt: skip
    return sequence("gru", input, None if hx is None else (hx,), flat_weights, options)


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
    """A stack of Elman layers over a sequence; see ``functional.rnn``."""
    options = Options(
        has_biases=has_biases,
        num_layers=num_layers, dropout=dropout, training=training, bidirectional=bidirectional,
        batch_first=batch_first, batch_sizes=batch_sizes, lengths=lengths, reset=reset,
        return_all=return_all, zoneout=zoneout, recurrent_dropout=recurrent_dropout,
        recompute_gates=recompute_gates,
    )  # fmt: skip
    cell = NONLINEARITIES[nonlinearity]
    return sequence(cell, input, None if hx is None else (hx,), flat_weights, options)


def sequence(cell, input, states, flat_weights, options):
    """Any cell's stack of layers; states are (h_0, c_0), (h_0,) or None."""
    x, reset = time_first(input, options)
    weights = group_weights(flat_weights, options)
    extras = _draw_extras(cell, x, weights, options)

    def layer(rows, x, states):
        sequences, finals, _ = scan_layer(
            cell, x, states, weights[rows], options.batch_sizes, options.lengths, reset, extras[rows]
        )
        return sequences, finals

    return arrange(cell, *run_layers(layer, x, states, options), options)


# ---- layers, shared with functional ----


def time_first(input, options):
    """(input, reset) with the time before the batch."""
    reset = options.reset
    if not options.swapped:
        return input, reset
    return input.transpose(0, 1), None if reset is None else reset.transpose(0, 1)


def group_weights(flat_weights, options):
    """torch's flat list of weights, as one (w_ih, w_hh, b_ih, b_hh, w_hr) per layer and direction."""
    has_biases, has_projection = options.has_biases, options.proj_size > 0
    each = 2 + 2 * has_biases + has_projection
    groups = [tuple(flat_weights[i : i + each]) for i in range(0, len(flat_weights), each)]
    return [
        (g[0], g[1], *(g[2:4] if has_biases else (None, None)), g[-1] if has_projection else None)
        for g in groups
    ]


def run_layers(layer, x, states, options):
    """Feeds x [T, N, I], or packed [R, I], through the layers, with dropout between them.

    ``layer(rows, x, states) -> sequences, finals`` runs one layer in all its directions: rows are theirs
    among those of all layers; sequences are its outputs (and, where return_all, its c) at every step,
    finals its last states, each [D, N, H].
    Returns the output, the finals of all layers, and the sequences of all layers or None.
    """
    finals, everything = [], []
    for index in range(options.num_layers):
        rows = slice(index * options.directions, (index + 1) * options.directions)
        sequences, last = layer(rows, x, None if states is None else tuple(s[rows] for s in states))
        finals.append(last)
        if options.return_all:
            everything.append(sequences)
        x = sequences[0]
        if options.dropout and options.training and index < options.num_layers - 1:
            x = F.dropout(x, options.dropout, True)
    finals = finals[0] if options.num_layers == 1 else tuple(map(torch.cat, zip(*finals, strict=True)))
    everything = tuple(map(torch.stack, zip(*everything, strict=True))) if options.return_all else None
    return x, finals, everything


def arrange(cell, output, finals, everything, options):
    """The results as they are returned: pairs only for a cell of two states, the batch first if asked for."""
    single = CELLS[cell].states == 1
    result = (output.transpose(0, 1) if options.swapped else output, finals[0] if single else tuple(finals))
    if everything is None:
        return result
    everything = tuple(s.transpose(1, 2) if options.swapped else s for s in everything)
    return *result, everything[0] if single else everything


def _draw_extras(cell, x, weights, options):
    """The Extras of each layer and direction. All noise is drawn here, from torch's default generator."""
    batch = x.shape[1] if options.batch_sizes is None else int(options.batch_sizes[0])
    states = CELLS[cell].states
    zoneout = rates_per_state(cell, options.zoneout)
    extras = []
    for (_, w_hh, *_, w_hr), norms in zip(
        weights, group_norms(options.layer_norm, len(weights)), strict=True
    ):
        width = w_hh.shape[1]
        widths = (width, width if w_hr is None else w_hr.shape[1])[:states]
        mask_h, zones = None, ()
        if options.training and options.recurrent_dropout:
            mask_h = F.dropout(x.new_ones(batch, width), options.recurrent_dropout, True)
        if any(zoneout) and options.training:
            rows = x.shape[:-1].numel()
            zones = tuple(
                torch.rand(rows, w, device=x.device) < z for z, w in zip(zoneout, widths, strict=True)
            )
        elif any(zoneout):
            zones = zoneout
        extras.append(Extras(zones, mask_h, norms))
    return extras


def rates_per_state(cell, zoneout):
    """zoneout's rate of each state of the cell, of one number or of as many as there are states."""
    return tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout,) * CELLS[cell].states


def group_norms(layer_norm, count):
    """The flat list of the layer normalisations' weights (and biases), as Extras.norms of each direction."""
    if layer_norm is None:
        return [(None, None, None)] * count
    each = len(layer_norm) // count
    has_biases = each == 6
    pairs = [
        (layer_norm[i], layer_norm[i + 1] if has_biases else None)
        for i in range(0, len(layer_norm), 1 + has_biases)
    ]
    return [tuple(pairs[i : i + 3]) for i in range(0, len(pairs), 3)]


# ---- one layer ----


def scan_layer(cell, x, states, weights, batch_sizes=None, lengths=None, reset=None, extras=None, keep=False):
    """One layer in all its directions.

    Args:
        x: [T, N, I], or packed [R, I] with batch_sizes [T].
        states: (h_0 [D, N, P], c_0 [D, N, H]) or (h_0,); None, or None among them, for zeros.
        weights: for each direction (w_ih, w_hh, b_ih, b_hh, w_hr), None where there is none.
        lengths, reset, and the results: as operators.schema has them.
        keep: whether to return the reserve.

    Returns:
        sequences (output, cells) or (output,); finals (h_n, c_n) or (h_n,); the reserve, or None.
    """
    kind = CELLS[cell]
    sizes = step_sizes(x, batch_sizes)
    valid, reset = step_masks(x, lengths, reset)
    if valid is not None:
        x = x.masked_fill(~valid, 0)  # what stands there may be anything, NaN too
    rows = x if batch_sizes is not None else x.flatten(0, 1)
    batch = sizes[0] if batch_sizes is not None else x.shape[1]
    directions = []
    for d, group in enumerate(weights):
        w_ih, *_, w_hr = group
        hidden = w_ih.shape[0] // kind.gates
        widths = (hidden if w_hr is None else w_hr.shape[0], hidden)[: kind.states]
        given = (None,) * kind.states if states is None else states
        start = tuple(
            x.new_zeros(batch, width) if s is None else s[d] for s, width in zip(given, widths, strict=True)
        )
        extra = Extras() if extras is None else extras[d]
        directions.append(_scan(kind, rows, start, group, sizes, valid, reset, d == 1, extra, keep))
    sequences, finals, kept = zip(*directions, strict=True)
    sequences = tuple(torch.cat(s, -1) if len(s) > 1 else s[0] for s in zip(*sequences, strict=True))
    if batch_sizes is None:
        sequences = tuple(s.view(*x.shape[:2], s.shape[-1]) for s in sequences)
    finals = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    reserve = torch.stack(kept).view(len(kept), *x.shape[:-1], *kept[0].shape[1:]) if keep else None
    return sequences, finals, reserve


def step_sizes(x, batch_sizes):
    """How many rows each step has."""
    return [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()


def step_masks(x, lengths, reset):
    """(which steps are part of a row [T, N, 1], or None; reset as rows [R, 1], or None)."""
    valid = None
    if lengths is not None:
        times = torch.arange(x.shape[0], device=x.device)[:, None]
        valid = (times < lengths.to(x.device)).unsqueeze(-1)
    if reset is not None:
        # A reset behind a row's end cuts nothing: the reverse direction starts from h_0 there.
        reset = reset if valid is None else reset & valid.squeeze(-1)
        reset = reset.reshape(-1, 1)
    return valid, reset


def cuts(reset, sizes, reverse):
    """For each step, which of its rows start from a state of zero, [n, 1]."""
    steps = reset.split(sizes)
    if not reverse:
        return steps
    # The state that enters step t comes from t + 1. Rows that t + 1 does not have start here.
    later = [*steps[1:], reset[:0]]
    return [F.pad(cut, (0, 0, 0, n - cut.shape[0])) for cut, n in zip(later, sizes, strict=True)]


def _product(x, weight, bias, norm):
    if norm is None:
        return F.linear(x, weight, bias)
    y = F.layer_norm(F.linear(x, weight), weight.shape[:1], *norm)
    return y if bias is None else y + bias


def _zone_out(zone, old, new):
    """Krueger et al. 2016: the old value with a probability, or its expectation."""
    return torch.where(zone, old, new) if isinstance(zone, torch.Tensor) else torch.lerp(new, old, zone)


def _scan(kind, rows, states, weights, sizes, valid, reset, reverse, extras, keep):
    """One direction. rows [R, I]; returns its sequences [R, H], last states [N, H] and reserve [R, K, H]."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    norm_x, norm_h, norm_c = extras.norms
    from_x = _product(rows, w_ih, b_ih, norm_x).split(sizes)
    cut = None if reset is None or not sizes else cuts(reset, sizes, reverse)
    zones = [z.split(sizes) if isinstance(z, torch.Tensor) else [z] * len(sizes) for z in extras.zones]
    sequences, reserve = [None] * len(sizes), [None] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        # Rows beyond sizes[t] belong to sequences that have ended (forward) or not begun (reverse).
        n = sizes[t]
        before = tuple(s[:n] for s in states)
        old = before if cut is None else tuple(s.masked_fill(cut[t], 0) for s in before)
        h = old[0] if extras.mask_h is None else old[0] * extras.mask_h[:n]
        new, kept = kind.step(from_x[t], _product(h, w_hh, b_hh, norm_h), old, norm_c)
        if w_hr is not None:
            new = (F.linear(new[0], w_hr), *new[1:])
        if zones:
            new = tuple(_zone_out(z[t], a, b) for z, a, b in zip(zones, old, new, strict=True))
        shown = new
        if valid is not None:
            shown = tuple(s.masked_fill(~valid[t], 0) for s in new)
            new = tuple(torch.where(valid[t], b, a) for a, b in zip(before, new, strict=True))
        sequences[t] = shown
        if keep:
            reserve[t] = torch.stack(kept, -2) if kept else shown[0].new_empty(n, 0, shown[0].shape[-1])
        states = tuple(
            torch.cat((b, s[n:])) if n < s.shape[0] else b for b, s in zip(new, states, strict=True)
        )
    if not sizes:
        sequences = [tuple(s[:0] for s in states)]
        reserve = [states[0].new_empty(0, kind.kept, states[0].shape[-1])]
    sequences = tuple(torch.cat(s) for s in zip(*sequences, strict=True))
    return sequences, states, torch.cat(reserve) if keep else None
