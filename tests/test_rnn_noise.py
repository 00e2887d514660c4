"""Zoneout, recurrent dropout, layer normalisation: against loops written out here."""

import pytest
import torch
import torch.nn.functional as F
from _feature_cases import KINDS, LENGTHS, H, I, N, T, check_alike, tensors
from _oracle import running_on
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cnnrnn_ext as cx


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
