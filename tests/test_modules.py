"""Drop-in modules over torch's arguments: sequences, packed ones, dropout, training, convolutions."""

import itertools

import pytest
import torch
from _module_twins import KINDS, check_alike, flatten, random_states, twins
from _oracle import running_on
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import cnnrnn_ext as cx

LSTM_OPTIONS = [
    {"num_layers": layers, "bias": bias, "batch_first": first, "bidirectional": both}
    for layers, bias, first, both in itertools.product((1, 2), (True, False), (True, False), (True, False))
]


@pytest.mark.parametrize(
    "options", LSTM_OPTIONS, ids=lambda o: "-".join(f"{k}={int(v)}" for k, v in o.items())
)
@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_arguments(mode, kind, options):
    op, stock_class, our_class, more = KINDS[kind]
    ours, stock = twins(stock_class, our_class, 5, 6, **options, **more)
    rows = options["num_layers"] * (2 if options["bidirectional"] else 1)
    x = torch.randn(3, 4, 5)
    batch = 3 if options["batch_first"] else 4
    check_alike(ours, stock, mode, [op], x)
    check_alike(ours, stock, mode, [op], x, random_states(kind, rows, batch, 6))


@pytest.mark.pure
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(mode, kind, batch_first, state):
    op, stock_class, our_class, more = KINDS[kind]
    ours, stock = twins(stock_class, our_class, 5, 6, batch_first=batch_first, bidirectional=True, **more)
    hx = [random_states(kind, 2, 6)] if state else []
    check_alike(ours, stock, mode, [op], torch.randn(4, 5), *hx)


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}], ids=["1", "all"]
)
def test_lstm_projection(options):
    ours, stock = twins(nn.LSTM, cx.LSTM, 5, 6, proj_size=3, **options)
    check_alike(ours, stock, "reference", ["lstm"], torch.randn(4, 3, 5))


def test_lstm_zero_size_batch(mode):
    ours, stock = twins(nn.LSTM, cx.LSTM, 5, 6, bidirectional=True)
    check_alike(ours, stock, mode, ["lstm"], torch.randn(4, 0, 5))


def test_lstm_length_zero(mode):
    """Where nn.LSTM refuses: an empty output, and the states as they came."""
    with running_on(mode, "lstm"):
        output, (h_n, c_n) = cx.LSTM(5, 6)(torch.randn(0, 3, 5))
    assert list(output.shape) == [0, 3, 6]
    assert not h_n.any()
    assert not c_n.any()


# ---- packed sequences ----


@pytest.mark.pure
@pytest.mark.parametrize("kind", [*KINDS, "lstm proj"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no hx"])
def test_packed_sequence(mode, state, bidirectional, kind):
    """Unsorted lengths: outputs, states in the caller's order, and gradients are torch's."""
    proj_size = 3 if kind == "lstm proj" else 0
    op, stock_class, our_class, more = KINDS.get(kind, ("lstm", nn.LSTM, cx.LSTM, {"proj_size": 3}))
    ours, stock = twins(stock_class, our_class, 5, 6, bidirectional=bidirectional, num_layers=2, **more)
    rows = 4 if bidirectional else 2
    results = []
    sequences = [torch.randn(length, 5, requires_grad=True) for length in (3, 7, 1, 7)]
    hx = None
    if state:
        hx = torch.randn(rows, 4, proj_size or 6)
        hx = hx if op != "lstm" else (hx, torch.randn(rows, 4, 6))
    for module in (ours, stock):
        expected = (
            running_on("reference" if proj_size else mode, op) if module is ours else cx.backend("auto")
        )
        with expected:
            packed, states = module(pack_sequence(sequences, enforce_sorted=False), hx)
        states = flatten(states)
        padded, lengths = pad_packed_sequence(packed)
        loss = (padded * torch.linspace(0, 1, padded.numel()).view(padded.shape)).sum()
        loss = loss + sum((s * torch.linspace(0, 1, s.numel()).view(s.shape)).sum() for s in states)
        grads = torch.autograd.grad(loss, [*sequences, *module.parameters()])
        results.append((padded, lengths, packed.batch_sizes, packed.unsorted_indices, *states, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_packed_sequence_equals_each_sequence_alone(mode):
    """Packing changes nothing: row by row, the compiled kernel on the sequence alone gives the same."""
    module = cx.LSTM(5, 6, bidirectional=True)
    lengths = [4, 2, 6]
    x = torch.randn(6, 3, 5)
    packed, (h_n, c_n) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    padded, _ = pad_packed_sequence(packed)
    for row, length in enumerate(lengths):
        with running_on(mode, "lstm"):
            output, (h, c) = module(x[:length, row])
        torch.testing.assert_close(padded[:length, row], output)
        torch.testing.assert_close(h_n[:, row], h)
        torch.testing.assert_close(c_n[:, row], c)


# ---- dropout, eval, training ----


def test_lstm_dropout(mode):
    """Between layers, in training only; from the same seed it zeroes what torch's own zeroes."""
    ours, stock = twins(nn.LSTM, cx.LSTM, 5, 16, num_layers=3, dropout=0.5)
    x = torch.randn(4, 3, 5)
    with running_on(mode, "lstm"):
        torch.manual_seed(3)
        first = ours(x)[0]
        torch.manual_seed(4)
        second = ours(x)[0]
        ours.eval()
        resting = ours(x)[0]
    torch.manual_seed(3)
    torch.testing.assert_close(first, stock(x)[0])
    assert not torch.allclose(first, second)
    torch.testing.assert_close(resting, stock.eval()(x)[0])


@pytest.mark.pure
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_in_eval(mode, training):
    ours, stock = twins(nn.LSTM, cx.LSTM, 5, 6, num_layers=2, dropout=0.0)
    check_alike(ours.train(training), stock.train(training), mode, ["lstm"], torch.randn(4, 3, 5))
    conv = cx.ConvPool2d(2, 3, 3).train(training)
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    with running_on(mode, "conv_pool2d"):
        y = conv(x)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert conv.weight.grad.any()


def test_optimizer_steps_follow_torchs(mode):
    """Twelve steps of SGD with momentum, in place: the loss and every parameter stay beside stock's."""
    ours = cx.models.CNNRNN({"a": 3}, 1, (12, 12), (4, 5), 7)
    stock = cx.models.CNNRNN({"a": 3}, 1, (12, 12), (4, 5), 7)
    cx.unfuse_(stock)
    ours.load_state_dict(stock.state_dict(), strict=True)
    clips, labels = torch.randn(6, 4, 1, 12, 12), torch.randint(3, (6,))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, stock)]
    for _ in range(12):
        losses = []
        with running_on(mode, "conv_pool2d", "lstm"):
            losses.append(nn.functional.cross_entropy(ours(clips)["a"], labels))
        losses.append(nn.functional.cross_entropy(stock(clips)["a"], labels))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert losses[0] < 1.0


def test_changed_in_place_before_backward_raises(mode):
    """As torch: a saved tensor that was overwritten is an error, not a wrong gradient."""
    conv, lstm = cx.ConvPool2d(2, 3, 3), cx.LSTM(5, 6)
    for module, x in ((conv, torch.randn(1, 2, 6, 6)), (lstm, torch.randn(4, 3, 5))):
        x.requires_grad_()
        with cx.backend(mode):
            y = flatten(module(x))[0]
        with torch.no_grad():
            next(module.parameters()).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# ---- ConvPool2d over nn.Conv2d's arguments ----


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"], ids=["1x2", "same"])
def test_padding_modes(mode, padding_mode, padding):
    args, kwargs = (3, 4, (3, 5)), {"padding": padding, "padding_mode": padding_mode}
    conv, stock = twins(nn.Conv2d, cx.ConvPool2d, *args, **kwargs)
    sequence = nn.Sequential(stock, nn.ReLU(), nn.MaxPool2d(2))
    check_alike(conv, sequence, mode, ["conv_pool2d"], torch.randn(2, 3, 9, 10))


@pytest.mark.parametrize("padding_mode", ["reflect", "circular"])
def test_padding_modes_1d(mode, padding_mode):
    conv, stock = twins(nn.Conv1d, cx.ConvPool1d, 3, 4, 5, padding=2, padding_mode=padding_mode)
    sequence = nn.Sequential(stock, nn.ReLU(), nn.MaxPool1d(2))
    check_alike(conv, sequence, mode, ["conv_pool2d"], torch.randn(2, 3, 11))


@pytest.mark.pure
def test_equivalent_to(mode):
    """The line of the README: nn.Sequential(nn.Conv2d(...), nn.ReLU(), nn.MaxPool2d(2))."""
    conv, stock = twins(nn.Conv2d, cx.ConvPool2d, 3, 32, 3)
    check_alike(
        conv,
        nn.Sequential(stock, nn.ReLU(), nn.MaxPool2d(2)),
        mode,
        ["conv_pool2d"],
        torch.randn(2, 3, 14, 14),
    )


def test_precision_argument():
    conv = cx.ConvPool2d(3, 8, 3, precision="high")
    x = torch.randn(2, 3, 14, 14)
    expected = nn.functional.max_pool2d(nn.functional.conv2d(x, conv.weight, conv.bias).relu(), 2)
    torch.testing.assert_close(conv(x), expected, rtol=1e-2, atol=1e-3)


def test_repr_names_the_options():
    text = repr(cx.ConvPool2d(3, 8, 3, activation="tanh", pool="none"))
    assert "tanh" in text
    assert "3, 8" in text
