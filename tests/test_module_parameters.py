"""Modules' parameters are torch's: names, shapes, order; copies, files, parametrizations, dtypes."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from _module_twins import check_alike, flatten, twins
from _oracle import compiled_missing, running_on
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import cnnrnn_ext as cx


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
