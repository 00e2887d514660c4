"""What no stock module has: lengths, reset, return_all, zoneout, recurrent dropout, layer normalisation.

The oracle is torch.nn in float64 on each row and each piece of it alone, or a loop written out here.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from _oracle import running_on
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import cnnrnn_ext as cx

T, N, I, H = 7, 4, 5, 6  # noqa: E741
KINDS = {
    "lstm": ("lstm", nn.LSTM, cx.LSTM, {}),
    "gru": ("gru", nn.GRU, cx.GRU, {}),
    "rnn": ("rnn", nn.RNN, cx.RNN, {}),
    "rnn relu": ("rnn", nn.RNN, cx.RNN, {"nonlinearity": "relu"}),
}
LENGTHS = torch.tensor([3, 7, 0, 5])
OPTIONS = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 2, "bias": False},
]


def twins(kind, dtype=torch.float64, **options):
    _, stock_class, our_class, more = KINDS[kind]
    stock = stock_class(I, H, **options, **more).to(dtype)
    ours = our_class(I, H, **options, **more).to(dtype)
    ours.load_state_dict(stock.state_dict(), strict=True)
    return ours, stock


def random_states(kind, rows, batch=N, hidden=H):
    states = [torch.randn(rows, batch, hidden, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    return tuple(states) if kind == "lstm" else states[0]


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in tensors(part)]


def part(states, direction, row):
    """One direction and row of the states [D, N, H], as [1, 1, H]."""
    if isinstance(states, torch.Tensor):
        return states[direction : direction + 1, row : row + 1]
    return tuple(part(s, direction, row) for s in states)


def check_alike(ours, theirs, leaves):
    """Two lists of tensors, and the gradients of one random loss of each."""
    weights = [torch.randn_like(y) for y in theirs]
    gradients = []
    for outputs in (ours, theirs):
        loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*gradients, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert not a.isnan().any()
        torch.testing.assert_close(*torch.broadcast_tensors(a.double(), b.double()))


# ---- lengths and reset, against each row and each piece of it alone ----


def pieces(length, reset):
    """The spans of a row between its resets."""
    borders = sorted({0, length, *(t for t in range(length) if reset is not None and reset[t])})
    return list(itertools.pairwise(borders))


def row_alone(layer_of, x, states, row, length, reset):
    """(output [length, D*H], final states [D, H]) of one layer on one row, direction by direction.

    ``layer_of(direction)`` is a stock module of one direction. A span in which no state comes from hx starts
    from zero.
    """
    outputs, finals = [], []
    directions = 2 if layer_of(1) is not None else 1
    for d in range(directions):
        module, spans = layer_of(d), pieces(length, reset)
        order = spans if d == 0 else spans[::-1]
        hx = None if states is None else part(states, d, row)
        if d == 0 and length and reset is not None and reset[0]:
            hx = None  # the state does not cross into step 0
        empty, spans_out = x.new_zeros(0, module.hidden_size), []
        last = hx
        for begin, end in order:
            piece = x[begin:end, row : row + 1]
            y, last = module(piece if d == 0 else piece.flip(0), hx)
            spans_out.append((y if d == 0 else y.flip(0))[:, 0])
            hx = None
        outputs.append(torch.cat([empty, *(spans_out if d == 0 else spans_out[::-1])]))
        if last is None:
            zeros = x.new_zeros(1, 1, module.hidden_size)
            last = (zeros, zeros) if isinstance(module, nn.LSTM) else zeros
        finals.append([s[0, 0] for s in tensors(last)])
    return torch.cat(outputs, -1), [torch.stack(s) for s in zip(*finals, strict=True)]


def expected(kind, stock, x, states, lengths, reset):
    """[output, states ...] of the stock module's parameters, row by row, layer by layer."""
    _, stock_class, _, more = KINDS[kind]
    batch_first = stock.batch_first
    x = x.transpose(0, 1) if batch_first else x
    reset = reset.t() if batch_first and reset is not None else reset
    directions, finals = 2 if stock.bidirectional else 1, []
    for layer in range(stock.num_layers):

        def layer_of(d, layer=layer, width=x.shape[-1]):
            if d >= directions:
                return None
            module = stock_class(width, stock.hidden_size, bias=stock.bias, **more).double()
            for name in [n for n, _ in module.named_parameters()]:
                source = name.replace("_l0", f"_l{layer}" + ("_reverse" if d else ""))
                delattr(module, name)
                setattr(module, name, getattr(stock, source))
            module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]
            module._update_flat_weights = lambda: None
            return module

        rows = slice(layer * directions, (layer + 1) * directions)
        mine = None
        if states is not None:
            mine = tuple(s[rows] for s in states) if isinstance(states, tuple) else states[rows]
        padded, last = [], []
        for n in range(x.shape[1]):
            length = len(x) if lengths is None else int(lengths[n])
            output, final = row_alone(layer_of, x, mine, n, length, None if reset is None else reset[:, n])
            padded.append(F.pad(output, (0, 0, 0, len(x) - length)))
            last.append(final)
        x = torch.stack(padded, 1)
        finals.append([torch.stack(s, 1) for s in zip(*last, strict=True)])
    x = x.transpose(0, 1) if batch_first else x
    return [x, *(torch.cat(s) for s in zip(*finals, strict=True))]


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", ["lengths", "reset", "both"])
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
def test_lengths_and_reset(mode, kind, options, given, state):
    op = KINDS[kind][0]
    ours, _ = twins(kind, **options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.4
    reset[0, 1] = True
    if options.get("batch_first"):
        x, reset = x.transpose(0, 1).contiguous(), reset.t().contiguous()
    lengths = LENGTHS if given != "reset" else None
    reset = reset if given != "lengths" else None
    leaves = [x.requires_grad_()]
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = random_states(kind, rows) if state else None
    leaves += [] if hx is None else tensors(hx)
    with running_on(mode, op):
        result = tensors(ours(x, hx, lengths=lengths, reset=reset))
    wanted = expected(kind, ours, x, hx, lengths, reset)
    check_alike(result, wanted, [*leaves, *ours.parameters()])


@pytest.mark.isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_is_not_read(mode, kind, bidirectional):
    """NaN behind a row's end, and resets there, change nothing, forward and backward."""
    op = KINDS[kind][0]
    ours, _ = twins(kind, bidirectional=bidirectional, num_layers=2)
    x = torch.randn(T, N, I, dtype=torch.float64)
    behind = torch.arange(T)[:, None] >= LENGTHS
    reset = torch.rand(T, N) < 0.4
    results = []
    for spoiled in (False, True):
        inputs = x.masked_fill(behind[..., None], float("nan") if spoiled else 0.0).requires_grad_()
        cut = reset | behind if spoiled else reset & ~behind
        with running_on(mode, op):
            outputs = tensors(ours(inputs, lengths=LENGTHS, reset=cut))
        loss = sum((y * torch.linspace(0, 1, y.numel()).view(y.shape)).sum() for y in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [inputs, *ours.parameters()])])
    for a, b in zip(*results, strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not results[1][0][behind].any()
    assert not results[1][-len(list(ours.parameters())) - 1][behind].any()


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_packing(mode, kind):
    """lengths= on padded input gives what torch gives for the packed one."""
    ours, stock = twins(kind, num_layers=2, bidirectional=True)
    x, lengths = torch.randn(T, N, I, dtype=torch.float64), torch.tensor([3, 7, 1, 5], dtype=torch.int32)
    with running_on(mode, KINDS[kind][0]):
        output, states = ours(x, lengths=lengths)
    packed, wanted = stock(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(output, pad_packed_sequence(packed)[0])
    torch.testing.assert_close(states, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_with_reset_and_return_all(mode, kind, batch_first, enforce_sorted):
    """A PackedSequence gives what lengths= gives, with resets in the caller's order of rows."""
    ours, _ = twins(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([7, 5, 3, 1] if enforce_sorted else [3, 7, 1, 5])
    x = torch.randn(T, N, I, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.4
    if batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    hx = random_states(kind, 4)
    leaves = [x.requires_grad_(), *tensors(hx), *ours.parameters()]
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=enforce_sorted)
    with running_on(mode, KINDS[kind][0]):
        output, states, everything = ours(packed, hx, reset=reset, return_all=True)
        result = [pad_packed_sequence(output, batch_first)[0], *tensors(states), *tensors(everything)]
        wanted = tensors(ours(x, hx, lengths=lengths, reset=reset, return_all=True))
    check_alike(result, wanted, leaves)


# ---- return_all ----


@pytest.mark.pure
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("kind", [*KINDS, "lstm proj"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_return_all(mode, kind, batch_first, grad):
    """Every layer's h and c at each step, against one step at a time through the stock cells' formulas."""
    options = {"num_layers": 2, "batch_first": batch_first}
    if kind == "lstm proj":
        mode, op, hidden = "reference", "lstm", 3
        stock = nn.LSTM(I, H, proj_size=3, **options).double()
        ours = cx.LSTM(I, H, proj_size=3, **options).double()
        ours.load_state_dict(stock.state_dict())
    else:
        op, hidden = KINDS[kind][0], H
        ours, stock = twins(kind, **options)
    x = torch.randn(T, N, I, dtype=torch.float64)
    inputs = x.transpose(0, 1) if batch_first else x
    with running_on(mode, op), torch.set_grad_enabled(grad):
        output, states, everything = ours(inputs, return_all=True)
    everything = tensors(everything)
    assert everything[0].requires_grad == grad
    if batch_first:
        everything = [s.transpose(1, 2) for s in everything]
        output = output.transpose(0, 1)
    assert list(everything[0].shape) == [2, T, N, hidden]
    for t in range(T):  # the states after step t are those of the sequence cut there
        part = inputs[:, : t + 1] if batch_first else inputs[: t + 1]
        finals = tensors(stock(part)[1])
        for all_steps, final in zip(everything, finals, strict=True):
            torch.testing.assert_close(all_steps[:, t], final)
    assert torch.equal(everything[0][-1], output)
    for all_steps, final in zip(everything, tensors(states), strict=True):
        assert torch.equal(all_steps[:, -1], final)


@pytest.mark.parametrize("kind", KINDS)
def test_return_all_has_gradients(mode, kind):
    """A loss on h_all and c_all alone: the same gradients as through the sequences cut after each step."""
    ours, stock = twins(kind, num_layers=2)
    x = torch.randn(4, N, I, dtype=torch.float64, requires_grad=True)
    with running_on(mode, KINDS[kind][0]):
        everything = tensors(ours(x, return_all=True)[2])
    steps = [tensors(stock(x[: t + 1])[1]) for t in range(4)]
    wanted = [torch.stack(s, 1) for s in zip(*steps, strict=True)]
    weights = [torch.randn_like(s) for s in wanted]
    losses = [
        sum((s * w).sum() for s, w in zip(group, weights, strict=True)) for group in (everything, wanted)
    ]
    ours_grads = torch.autograd.grad(losses[0], [x, *ours.parameters()])
    stock_grads = torch.autograd.grad(losses[1], [x, *stock.parameters()])
    for a, b in zip(ours_grads, stock_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched(mode, kind, batch_first):
    """[T, I] with a reset [T], a length [] and all states: the batch of one without its dimension."""
    ours, _ = twins(kind, batch_first=batch_first, num_layers=2, bidirectional=True)
    x, reset = torch.randn(T, I, dtype=torch.float64), torch.rand(T) < 0.4
    with running_on(mode, KINDS[kind][0]):
        alone = tensors(ours(x, lengths=torch.tensor(5), reset=reset, return_all=True))
        dim = 0 if batch_first else 1
        batch = ours(x.unsqueeze(dim), lengths=torch.tensor([5]), reset=reset.unsqueeze(dim), return_all=True)
    output, states, everything = batch
    for a, b in zip(
        alone,
        [
            output.squeeze(dim),
            *(s.squeeze(1) for s in tensors(states)),
            *(s.squeeze(dim + 1) for s in tensors(everything)),
        ],
        strict=True,
    ):
        assert torch.equal(a, b)


# ---- noise and normalisation, against loops written out here ----


def cell_step(kind, module, x, h, c, suffix, mask=None):
    """One step in float64, by the textbook: (h, c)."""
    w_ih, w_hh = (getattr(module, f"weight_{n}{suffix}") for n in ("ih", "hh"))
    b_ih, b_hh = (getattr(module, f"bias_{n}{suffix}") for n in ("ih", "hh"))
    recurrent = h if mask is None else h * mask
    from_x, from_h = x @ w_ih.t(), recurrent @ w_hh.t()
    normalised = getattr(module, "layer_norm", False)
    if normalised:
        from_x = normalise(from_x, *(getattr(module, f"ln_ih_{n}{suffix}") for n in ("weight", "bias")))
        from_h = normalise(from_h, *(getattr(module, f"ln_hh_{n}{suffix}") for n in ("weight", "bias")))
    from_x, from_h = from_x + b_ih, from_h + b_hh
    size = h.shape[-1]
    if kind == "lstm":
        i, f, g, o = ((from_x + from_h)[:, k * size : (k + 1) * size] for k in range(4))
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        shown = c
        if normalised:
            shown = normalise(c, *(getattr(module, f"ln_c_{n}{suffix}") for n in ("weight", "bias")))
        return o.sigmoid() * shown.tanh(), c
    if kind == "gru":
        r, z = ((from_x + from_h)[:, k * size : (k + 1) * size].sigmoid() for k in range(2))
        n = (from_x[:, 2 * size :] + r * from_h[:, 2 * size :]).tanh()
        return (1 - z) * n + z * h, None
    return (from_x + from_h).relu() if kind == "rnn relu" else (from_x + from_h).tanh(), None


def normalise(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def loop(kind, module, x, *, keep_h=None, keep_c=None, mask=None, lengths=None, reverse=False):
    """One direction of one layer from zero: (output, h, c of each step).

    keep_h(t, old, new), keep_c(t, old, new): what zoneout makes of a step; mask [N, H] of the recurrent h.
    """
    suffix = "_l0_reverse" if reverse else "_l0"
    h = c = x.new_zeros(x.shape[1], module.hidden_size)
    hs, cs, outputs = [None] * len(x), [None] * len(x), [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        new_h, new_c = cell_step(kind, module, x[t], h, c, suffix, mask)
        new_h = new_h if keep_h is None else keep_h(t, h, new_h)
        new_c = new_c if keep_c is None or new_c is None else keep_c(t, c, new_c)
        if lengths is not None:
            alive = (t < lengths)[:, None]
            outputs[t] = torch.where(alive, new_h, 0)
            new_h = torch.where(alive, new_h, h)
            new_c = None if new_c is None else torch.where(alive, new_c, c)
        else:
            outputs[t] = new_h
        h, c = new_h, new_c if new_c is not None else c
        hs[t], cs[t] = h, c
    return torch.stack(outputs), torch.stack(hs), torch.stack(cs)


def no_kernel(word, op):
    """Asserts that a call ran on plain PyTorch, and that the trace says why."""

    def check(log):
        assert {(c.op, c.backend) for c in log} == {(op, "reference")}
        assert all(word in c.reason for c in log)

    return check


def kept(values, direction=0):
    """zoneout of one direction as it happened: who kept the old value is read from the values themselves."""
    values = values[..., direction * H : (direction + 1) * H].detach()
    before = F.pad(values[1:], (0, 0, 0, 0, 0, 1)) if direction else F.pad(values[:-1], (0, 0, 0, 0, 1, 0))
    return lambda t, old, new: torch.where(values[t] == before[t], old, new)


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 7, 5, 0])], ids=["full", "lengths"])
@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_in_training(kind, lengths):
    """Some units keep their old value; the others, and all gradients, are the step's."""
    op, _, our_class, more = KINDS[kind]
    rate = (0.3, 0.6) if kind == "lstm" else 0.3
    module = our_class(I, H, zoneout=rate, bidirectional=True, **more).double()
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    with cx.trace() as log:
        output, states, everything = module(x, lengths=lengths, return_all=True)
    no_kernel("zoneout", op)(log)
    h_all, *c_all = (s[0] for s in tensors(everything))

    parts = [
        loop(
            kind, module, x, lengths=lengths, reverse=d == 1, keep_h=kept(h_all, d),
            keep_c=kept(c_all[0], d) if c_all else None,
        )
        for d in (0, 1)
    ]  # fmt: skip
    wanted = torch.cat([p[0] for p in parts], -1)
    check_alike([output], [wanted], [x, *module.parameters()])
    last = parts[0][1][-1], parts[1][1][0]
    torch.testing.assert_close(tensors(states)[0], torch.stack(last))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_zoneout_rates(kind):
    """Over many units the kept share is the rate, of h and of c; the first step keeps zeros."""
    _, _, our_class, more = KINDS[kind]
    module = our_class(3, 200, zoneout=(0.1, 0.4) if kind == "lstm" else 0.1, **more).double()
    _, _, everything = module(torch.randn(10, 20, 3, dtype=torch.float64), return_all=True)
    for values, rate in zip(tensors(everything), (0.1, 0.4), strict=False):
        before = F.pad(values[0, :-1], (0, 0, 0, 0, 1, 0))
        share = (values[0] == before).double().mean().item()
        assert abs(share - rate) < 0.01  # 40,000 draws: four sigma


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_in_eval_is_its_expectation(kind):
    op, _, our_class, more = KINDS[kind]
    rates = (0.3, 0.6)
    module = our_class(I, H, zoneout=rates if kind == "lstm" else 0.3, **more).double().eval()
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    with cx.trace() as log:
        output = module(x, lengths=LENGTHS)[0]
    no_kernel("zoneout", op)(log)

    def mixture(rate):
        return lambda t, old, new: rate * old + (1 - rate) * new

    wanted = loop(kind, module, x, keep_h=mixture(0.3), keep_c=mixture(0.6), lengths=LENGTHS)[0]
    check_alike([output], [wanted], [x, *module.parameters()])


def test_no_zoneout_of_c_does_not_touch_c():
    module = cx.LSTM(I, H, zoneout=(0.5, 0.0)).double()
    x = torch.randn(T, N, I, dtype=torch.float64)
    h_all, c_all = (s[0] for s in module(x, return_all=True)[2])
    wanted = loop("lstm", module, x, keep_h=kept(h_all))
    torch.testing.assert_close(c_all, wanted[2])
    assert (h_all[1:] == h_all[:-1]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_dropout(kind, bidirectional):
    """One mask for each sequence and direction on h before its product, scaled by 1 / (1 - p)."""
    op, _, our_class, more = KINDS[kind]
    rate = 0.4
    # A probe of the same shapes under the same seed: with weights of one, h_2 = mask ⊙ h_1 shows the mask.
    probe = cx.RNN(I, H, nonlinearity="relu", recurrent_dropout=rate, bidirectional=bidirectional).double()
    for name, parameter in probe.named_parameters():
        nn.init.zeros_(parameter)
        if "weight_hh" in name:
            nn.init.eye_(parameter)
    directions = 2 if bidirectional else 1
    ones = torch.ones(directions, N, H, dtype=torch.float64)
    torch.manual_seed(5)
    shown = probe(torch.zeros(1, N, I, dtype=torch.float64), ones)[0].detach()[0].split(H, -1)
    for mask in shown:
        kept = torch.tensor(1 / (1 - rate), dtype=torch.float64)
        assert ((mask == 0) | torch.isclose(mask, kept)).all()
        assert 0 < (mask == 0).double().mean() < 1
    assert not bidirectional or not torch.equal(*shown)

    module = our_class(I, H, recurrent_dropout=rate, bidirectional=bidirectional, **more).double()
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    with cx.trace() as log:
        output = module(x)[0]
    no_kernel("recurrent_dropout", op)(log)
    wanted = [loop(kind, module, x, mask=mask, reverse=d == 1)[0] for d, mask in enumerate(shown)]
    check_alike([output], [torch.cat(wanted, -1)], [x, *module.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout_rests_in_eval(mode, kind):
    """In eval there is none, and a kernel runs where there is one."""
    _, _, our_class, more = KINDS[kind]
    ours, stock = our_class(I, H, recurrent_dropout=0.5, **more), KINDS[kind][1](I, H, **more)
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(T, N, I)
    with running_on(mode, KINDS[kind][0]):
        torch.testing.assert_close(ours.eval()(x), stock(x))


def test_recurrent_dropout_of_everything():
    """p = 1: no step sees the one before, and nothing is NaN."""
    module = cx.GRU(I, H, recurrent_dropout=1.0)
    output = module(torch.randn(T, N, I))[0]
    assert output.isfinite().all()


NOISY = [
    (cx.LSTM, {"zoneout": 0.2}),
    (cx.LSTM, {"zoneout": (0.1, 0.3), "recurrent_dropout": 0.3, "layer_norm": True, "dropout": 0.2}),
    (cx.GRU, {"zoneout": 0.2, "recurrent_dropout": 0.2, "dropout": 0.2}),
    (cx.RNN, {"recurrent_dropout": 0.2}),
]


@pytest.mark.pure
@pytest.mark.parametrize(("our_class", "options"), NOISY, ids=str)
def test_a_seed_replays_the_noise(our_class, options):
    """Bitwise, gradients too; another seed gives another result; functional draws the same."""
    module = our_class(I, H, num_layers=2, bidirectional=True, **options)
    x = torch.randn(T, N, I)
    reset = torch.rand(T, N) < 0.2
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        output = module(x, lengths=LENGTHS, reset=reset)[0]
        results.append([output, *torch.autograd.grad(output.sum(), module.parameters())])
    for a, b in zip(results[0], results[1], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(results[0][0], results[2][0])

    function = getattr(cx.functional, our_class.__name__.lower())
    arguments = {"layer_norm": module._norms()} if our_class is cx.LSTM else {}
    torch.manual_seed(1)
    output = function(
        x, None, [getattr(module, n) for names in module._all_weights for n in names], num_layers=2,
        bidirectional=True, training=True, lengths=LENGTHS, reset=reset, dropout=module.dropout,
        zoneout=module.zoneout, recurrent_dropout=module.recurrent_dropout, **arguments,
    )[0]  # fmt: skip
    assert torch.equal(output, results[0][0])


@pytest.mark.parametrize(("our_class", "options"), NOISY, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_everything_together(our_class, options, training):
    """Noise with lengths, resets, packing, layers, directions: packed equals padded in eval; padding and
    states that were cut leak nowhere."""
    module = our_class(I, H, num_layers=2, bidirectional=True, **options).double().train(training)
    lengths = torch.tensor([7, 5, 3, 1])
    x = torch.randn(T, N, I, dtype=torch.float64)
    reset = torch.rand(T, N) < 0.3
    packed = pack_padded_sequence(x, lengths)
    torch.manual_seed(3)
    output, states, everything = module(packed, reset=reset, return_all=True)
    torch.manual_seed(3)
    padded = module(x, lengths=lengths, reset=reset, return_all=True)
    if not training:
        torch.testing.assert_close(pad_packed_sequence(output)[0], padded[0])
        torch.testing.assert_close(tensors(states), tensors(padded[1]))
        torch.testing.assert_close(tensors(everything), tensors(padded[2]))
    behind = torch.arange(T)[:, None] >= lengths
    assert not padded[0][behind].any()
    torch.manual_seed(3)
    spoiled = module(x.masked_fill(behind[..., None], float("nan")), lengths=lengths, reset=reset)
    torch.testing.assert_close(spoiled[0], padded[0])
    # What stands before a reset of every row is not seen behind it, nor the other way round.
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[4] = True
    other = x.clone()
    other[:4] = torch.randn(4, N, I)
    single = our_class(I, H, bidirectional=True, **{**options, "dropout": 0.0}).double().train(training)
    results = []
    for inputs in (x, other):
        torch.manual_seed(3)
        results.append(single(inputs, reset=reset)[0])
    assert torch.equal(results[0][4:], results[1][4:])
    assert not torch.equal(results[0][:4], results[1][:4])


@pytest.mark.pure
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layer_norm(bidirectional):
    module = cx.LSTM(I, H, layer_norm=True, bidirectional=bidirectional).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("ln_"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    with cx.trace() as log:
        output = module(x, lengths=LENGTHS)[0]
    no_kernel("layer_norm", "lstm")(log)
    wanted = [loop("lstm", module, x, lengths=LENGTHS, reverse=d == 1)[0] for d in range(1 + bidirectional)]
    check_alike([output], [torch.cat(wanted, -1)], [x, *module.parameters()])


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_parameters(bias):
    """They exist only if asked for, and behind torch's own, which stay as they are."""
    module = cx.LSTM(I, H, 2, bias=bias, bidirectional=True, proj_size=3, layer_norm=True)
    torch.manual_seed(0)
    plain = cx.LSTM(I, H, 2, bias=bias, bidirectional=True, proj_size=3)
    torch.manual_seed(0)
    module.reset_parameters()
    names = [n for n, _ in module.named_parameters()]
    count = len(list(plain.parameters()))
    assert names[:count] == [n for n, _ in plain.named_parameters()]
    kinds = [f"ln_{k}_{w}" for k in ("ih", "hh", "c") for w in (("weight", "bias") if bias else ("weight",))]
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    assert names[count:] == [k + s for s in suffixes for k in kinds]
    for name in names[count:]:
        parameter = getattr(module, name)
        assert list(parameter.shape) == [H if "_c_" in name else 4 * H]
        assert torch.equal(parameter, torch.full_like(parameter, 1.0 if "weight" in name else 0.0))
    for name, parameter in plain.named_parameters():
        assert parameter.shape == getattr(module, name).shape
    assert module(torch.randn(T, N, I))[0].shape == (T, N, 6)
    assert module.all_weights[0][0] is module.weight_ih_l0
    assert len(module.all_weights[0]) == len(plain.all_weights[0])


def test_options_are_shown():
    text = repr(cx.LSTM(3, 4, zoneout=(0.1, 0.2), recurrent_dropout=0.3, layer_norm=True))
    assert "zoneout=(0.1, 0.2), recurrent_dropout=0.3, layer_norm=True" in text
    assert repr(cx.LSTM(3, 4)) == "LSTM(3, 4)"


# ---- bad input ----

X = torch.randn(T, N, I)
BAD_CALLS = {
    "lengths shape": ({"lengths": torch.tensor([1, 2])}, RuntimeError, "lengths"),
    "lengths float": ({"lengths": torch.ones(N)}, RuntimeError, "lengths"),
    "lengths bool": ({"lengths": torch.ones(N, dtype=torch.bool)}, RuntimeError, "lengths"),
    "lengths too large": ({"lengths": torch.tensor([1, 2, 3, T + 1])}, RuntimeError, "lengths"),
    "lengths negative": ({"lengths": torch.tensor([1, 2, 3, -1])}, RuntimeError, "lengths"),
    "lengths a list": ({"lengths": [1, 2, 3, 4]}, TypeError, "lengths"),
    "reset shape": ({"reset": torch.zeros(N, T, dtype=torch.bool)}, RuntimeError, "reset"),
    "reset dtype": ({"reset": torch.zeros(T, N)}, RuntimeError, "reset"),
    "reset device": ({"reset": torch.zeros(T, N, dtype=torch.bool, device="meta")}, RuntimeError, "reset"),
    "reset a list": ({"reset": [False] * T}, TypeError, "reset"),
}


@pytest.mark.pure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(mode, kind, case):
    arguments, error, name = BAD_CALLS[case]
    module = KINDS[kind][2](I, H, **KINDS[kind][3])
    with cx.backend(mode), pytest.raises(error, match=name):
        module(X, **arguments)


def test_bad_calls_of_packed_sequences():
    packed = pack_padded_sequence(X, [7, 5, 3, 1])
    with pytest.raises(RuntimeError, match="lengths"):
        cx.GRU(I, H)(packed, lengths=torch.tensor([7, 5, 3, 1]))
    for reset in (torch.zeros(N, T, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="reset"):
            cx.GRU(I, H)(packed, reset=reset)
    with pytest.raises(RuntimeError, match="reset"):
        cx.GRU(I, H)(packed, reset=torch.zeros(T, N))


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.1", None, (0.1, 0.2, 0.3)], ids=str)
def test_bad_rates(value):
    for our_class in (cx.LSTM, cx.GRU, cx.RNN):
        with pytest.raises(ValueError, match="zoneout"):
            our_class(I, H, zoneout=value)
        with pytest.raises(ValueError, match="recurrent_dropout"):
            our_class(I, H, recurrent_dropout=value)
    for our_class in (cx.GRU, cx.RNN):
        with pytest.raises(ValueError, match="zoneout"):
            our_class(I, H, zoneout=(0.1, 0.1))


def test_bad_constructors():
    with pytest.raises(TypeError, match="layer_norm"):
        cx.LSTM(I, H, layer_norm=1)
    for our_class in (cx.GRU, cx.RNN):
        with pytest.raises(TypeError, match="layer_norm"):
            our_class(I, H, layer_norm=True)
        with pytest.raises(ValueError, match="proj_size"):
            our_class(I, H, proj_size=3)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'selu'"):
        cx.RNN(I, H, nonlinearity="selu")


def test_bad_layer_norm_tensors():
    module = cx.LSTM(I, H, layer_norm=True)
    weights = list(module.parameters())[:4]
    norms = [getattr(module, n) for n in module._norm_names]
    with pytest.raises(RuntimeError, match="layer_norm"):
        cx.functional.lstm(X, None, weights, layer_norm=norms[:5])
    for index, name in enumerate(module._norm_names):
        spoiled = [*norms[:index], torch.randn(3), *norms[index + 1 :]]
        with pytest.raises(RuntimeError, match=name):
            cx.functional.lstm(X, None, weights, layer_norm=spoiled)
