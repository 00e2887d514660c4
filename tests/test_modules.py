"""ConvPool2d, ConvPool1d, LSTM, CNNRNN as drop-in modules: torch's arguments, state dicts, copies, dtypes."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from _oracle import compiled_missing, running_on
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import cnnrnn_ext as cx


def twins(stock_class, our_class, *args, **kwargs):
    """(ours, stock) with the same parameters, loaded through the state dict, strictly, both ways."""
    stock = stock_class(*args, **kwargs)
    ours = our_class(*args, **kwargs)
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock_class(*args, **kwargs).load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def flatten(result):
    """Every tensor of nested outputs, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in (result.values() if isinstance(result, dict) else result) for t in flatten(part)]


def check_alike(ours, stock, mode, ops, *inputs, **tolerance):
    """Outputs and gradients of every input and parameter, on the same inputs."""
    leaves = [t for t in flatten(inputs) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for module, where in ((ours, mode), (stock, None)):
        if where is None:
            result = module(*inputs)
        else:
            with running_on(where, *ops):
                result = module(*inputs)
        outputs = flatten(result)
        loss = sum((y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
        results.append(([y.detach() for y in outputs], grads))
    (our_outputs, our_grads), (their_outputs, their_grads) = results
    for a, b in zip(our_outputs, their_outputs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


# ---- parameters ----


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("stock_class", "our_class", "args"),
    [
        (nn.Conv2d, cx.ConvPool2d, (3, 8, 3)),
        (nn.Conv1d, cx.ConvPool1d, (3, 8, 3)),
        (nn.LSTMCell, cx.LSTMCell, (5, 6)),
        (nn.GRUCell, cx.GRUCell, (5, 6)),
        (nn.RNNCell, cx.RNNCell, (5, 6)),
    ],
)
def test_parameters_are_torchs(stock_class, our_class, args, bias):
    """Names, order, shapes and, from the same seed, values of the initial parameters."""
    torch.manual_seed(0)
    stock = stock_class(*args, bias=bias)
    torch.manual_seed(0)
    ours = our_class(*args, bias=bias)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)
    twins(stock_class, our_class, *args, bias=bias)


@pytest.mark.parametrize(
    ("bias", "bidirectional", "proj_size", "num_layers"),
    list(itertools.product((True, False), (True, False), (0, 3), (1, 2))),
)
def test_lstm_parameters_are_torchs(bias, bidirectional, proj_size, num_layers):
    options = {"bias": bias, "bidirectional": bidirectional, "proj_size": proj_size, "num_layers": num_layers}
    torch.manual_seed(0)
    stock = nn.LSTM(5, 6, **options)
    torch.manual_seed(0)
    ours = cx.LSTM(5, 6, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(ours.all_weights) == len(stock.all_weights)
    assert not isinstance(ours, nn.LSTM)


@pytest.mark.parametrize(("stock_class", "our_class"), [(nn.GRU, cx.GRU), (nn.RNN, cx.RNN)])
@pytest.mark.parametrize(("bias", "bidirectional"), list(itertools.product((True, False), repeat=2)))
def test_gru_and_rnn_parameters_are_torchs(stock_class, our_class, bias, bidirectional):
    options = {"bias": bias, "bidirectional": bidirectional, "num_layers": 2}
    torch.manual_seed(0)
    stock = stock_class(5, 6, **options)
    torch.manual_seed(0)
    ours = our_class(5, 6, **options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert repr(ours) == repr(stock)
    assert not isinstance(ours, stock_class)


def test_positional_arguments_stand_in_torchs_order():
    for stock, ours, arguments in (
        (nn.LSTM, cx.LSTM, (5, 6, 2, False, True, 0.5, True, 3, "meta", torch.float64)),
        (nn.GRU, cx.GRU, (5, 6, 2, False, True, 0.5, True, 0, "meta", torch.float64)),
        (nn.RNN, cx.RNN, (5, 6, 2, "relu", False, True, 0.5, True, 0, "meta", torch.float64)),
        (nn.LSTMCell, cx.LSTMCell, (5, 6, False, "meta", torch.float64)),
        (nn.GRUCell, cx.GRUCell, (5, 6, False, "meta", torch.float64)),
        (nn.RNNCell, cx.RNNCell, (5, 6, False, "relu", "meta", torch.float64)),
    ):
        pair = stock(*arguments), ours(*arguments)
        assert repr(pair[0]) == repr(pair[1])
        shapes = [{n: (p.shape, p.dtype, p.device) for n, p in m.named_parameters()} for m in pair]
        assert shapes[0] == shapes[1]


# ---- LSTM, GRU, RNN over torch's arguments ----

KINDS = {
    "lstm": ("lstm", nn.LSTM, cx.LSTM, {}),
    "gru": ("gru", nn.GRU, cx.GRU, {}),
    "rnn": ("rnn", nn.RNN, cx.RNN, {}),
    "rnn relu": ("rnn", nn.RNN, cx.RNN, {"nonlinearity": "relu"}),
}


def random_states(kind, *shape):
    states = torch.randn(shape), torch.randn(shape)
    return states if kind == "lstm" else states[0]


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


# ---- copies and files ----


def modules_and_inputs():
    lstm = cx.LSTM(5, 6, num_layers=2, bidirectional=True)
    conv = cx.ConvPool2d(3, 4, 3, padding=1, pool_size=3, pool_stride=2, ceil_mode=True)
    return [
        (lstm, torch.randn(4, 3, 5)),
        (conv, torch.randn(2, 3, 9, 9)),
        (cx.ConvPool1d(3, 4, 3), torch.randn(2, 3, 9)),
        (cx.GRU(5, 6, zoneout=0.1), torch.randn(4, 3, 5)),
        (cx.RNN(5, 6, nonlinearity="relu", recurrent_dropout=0.2).eval(), torch.randn(4, 3, 5)),
        (cx.LSTM(5, 6, layer_norm=True), torch.randn(4, 3, 5)),
        (cx.LSTMCell(5, 6), torch.randn(3, 5)),
        (cx.GRUCell(5, 6), torch.randn(3, 5)),
        (cx.RNNCell(5, 6, nonlinearity="relu"), torch.randn(3, 5)),
        (cx.models.CNNRNN({"a": 2, "b": 3}, 1, (10, 10), (3, 4), 5), torch.randn(2, 3, 1, 10, 10)),
    ]


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    fresh = copy.deepcopy(module)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    return fresh


@pytest.mark.pure
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save, through_state_dict],
    ids=["deepcopy", "pickle", "torch.save", "state_dict"],
)
def test_copies(copied):
    for module, x in modules_and_inputs():
        twin = copied(module)
        assert repr(twin) == repr(module)
        torch.manual_seed(0)
        expected = flatten(module(x))
        torch.manual_seed(0)
        for a, b in zip(expected, flatten(twin(x)), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.fill_(0.5)
        assert not any((p == 0.5).all() for p in module.parameters()), "the copy shares its parameters"


def test_state_dict_of_other_shapes_is_refused():
    for module, other in ((cx.LSTM(5, 6), cx.LSTM(5, 7)), (cx.ConvPool2d(1, 2, 3), cx.ConvPool2d(1, 2, 5))):
        with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
            module.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        cx.LSTM(5, 6).load_state_dict(cx.LSTM(5, 6, num_layers=2).state_dict())


# ---- parametrizations, replaced parameters, dtypes ----


def test_weight_norm(mode):
    for ours, stock, name, x in (
        (*twins(nn.LSTM, cx.LSTM, 5, 6), "weight_hh_l0", torch.randn(4, 3, 5)),
        (*twins(nn.GRU, cx.GRU, 5, 6), "weight_ih_l0", torch.randn(4, 3, 5)),
        (*twins(nn.LSTMCell, cx.LSTMCell, 5, 6), "weight_ih", torch.randn(3, 5)),
    ):
        weight_norm(ours, name)
        weight_norm(stock, name)
        for module in (ours, stock):
            with torch.no_grad():
                getattr(module.parametrizations, name).original0.mul_(1.7)
        ops = {nn.LSTM: "lstm", nn.GRU: "gru", nn.LSTMCell: "lstm_cell"}
        op = next(name for kind, name in ops.items() if isinstance(stock, kind))
        check_alike(ours, stock, mode, [op], x)
        check_alike(copy.deepcopy(ours).double(), stock.double(), mode, [op], x.detach().double())
    conv = weight_norm(cx.ConvPool2d(3, 4, 3))
    stock = weight_norm(nn.Conv2d(3, 4, 3))
    stock.load_state_dict(conv.state_dict(), strict=True)
    sequence = nn.Sequential(stock, nn.ReLU(), nn.MaxPool2d(2))
    check_alike(conv, sequence, mode, ["conv_pool2d"], torch.randn(2, 3, 9, 9))


def test_replaced_parameter_is_read(mode):
    """No stale copy of a weight: one that was replaced, or whose data was, counts at the next call."""
    lstm, x = cx.LSTM(5, 6), torch.randn(4, 3, 5)
    with running_on(mode, "lstm"):
        before = lstm(x)[0]
        lstm.weight_ih_l0 = nn.Parameter(torch.zeros(24, 5))
        replaced = lstm(x)[0]
        assert not torch.allclose(before, replaced)
        torch.testing.assert_close(replaced[:, 0], replaced[:, 1])
        lstm.weight_ih_l0.data = torch.randn(24, 5)
        assert not torch.allclose(lstm(x)[0], replaced)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_converted_modules(dtype):
    """.double(), and .bfloat16() by way of float32, run compiled where there are kernels."""
    for (ours, stock), x, op in (
        (twins(nn.LSTM, cx.LSTM, 5, 6, num_layers=2), torch.randn(4, 3, 5), "lstm"),
        (twins(nn.GRU, cx.GRU, 5, 6, num_layers=2), torch.randn(4, 3, 5), "gru"),
        (twins(nn.RNN, cx.RNN, 5, 6, num_layers=2), torch.randn(4, 3, 5), "rnn"),
        (twins(nn.LSTMCell, cx.LSTMCell, 5, 6), torch.randn(3, 5), "lstm_cell"),
        (twins(nn.GRUCell, cx.GRUCell, 5, 6), torch.randn(3, 5), "gru_cell"),
        (twins(nn.RNNCell, cx.RNNCell, 5, 6), torch.randn(3, 5), "rnn_cell"),
    ):
        ours, stock, x = ours.to(dtype), stock.to(dtype), x.to(dtype)
        with cx.trace() as log:
            result = flatten(ours(x))
        assert {c.op for c in log} == {op}
        assert {c.backend for c in log} == {"reference" if compiled_missing() else "compiled"}
        for a, b in zip(result, flatten(stock(x)), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(
                a, b, **({"rtol": 0.05, "atol": 0.02} if dtype == torch.bfloat16 else {})
            )


def test_factory_arguments():
    for module in (cx.LSTM(5, 6, dtype=torch.float64), cx.ConvPool2d(1, 2, 3, dtype=torch.float64)):
        assert {p.dtype for p in module.parameters()} == {torch.float64}
    for module in (
        cx.LSTM(5, 6, device="meta"),
        cx.LSTMCell(5, 6, device="meta"),
        cx.ConvPool2d(1, 2, 3, device="meta"),
    ):
        assert {p.device.type for p in module.parameters()} == {"meta"}
    y = cx.ConvPool2d(1, 2, 3, device="meta")(torch.empty(4, 1, 8, 9, device="meta"))
    assert list(y.shape) == [4, 2, 3, 3]
    assert y.device.type == "meta"


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
