"""Wrong input to LSTM and its cell, function and module: torch's exception type, the argument named."""

import pytest
import torch
from _refusals import check_refusal, raised
from torch import nn

import cnnrnn_ext as cx

LSTM_MODULE = {
    "input rank 1": ((torch.randn(3),), ["input"]),
    "input rank 4": ((torch.randn(1, 4, 2, 3),), ["input"]),
    "input width": ((torch.randn(4, 2, 5),), ["input"]),
    "input float64": ((torch.randn(4, 2, 3, dtype=torch.float64),), ["input", "weight"]),
    "input int64": ((torch.ones(4, 2, 3, dtype=torch.int64),), ["input", "weight"]),
    "h_0 batch": ((torch.randn(4, 2, 3), (torch.randn(1, 3, 4), torch.randn(1, 2, 4))), ["h_0", "hidden[0]"]),
    "h_0 width": ((torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 4))), ["h_0"]),
    "h_0 layers": ((torch.randn(4, 2, 3), (torch.randn(2, 2, 4), torch.randn(1, 2, 4))), ["h_0"]),
    "h_0 rank": ((torch.randn(4, 2, 3), (torch.randn(2, 4), torch.randn(2, 4))), ["h_0", "hx"]),
    "c_0 batch": ((torch.randn(4, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 3, 4))), ["c_0"]),
    "c_0 width": ((torch.randn(4, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 3))), ["c_0"]),
    "states float64": ((torch.randn(4, 2, 3), tuple(torch.randn(1, 2, 4).double() for _ in "hc")), ["h_0"]),
    "unbatched, batched states": (
        (torch.randn(4, 3), (torch.randn(1, 1, 4), torch.randn(1, 1, 4))),
        ["h_0", "hx"],
    ),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", LSTM_MODULE)
def test_lstm_module(mode, name):
    operands, words = LSTM_MODULE[name]
    ours, stock = cx.LSTM(3, 4), nn.LSTM(3, 4)
    with cx.backend(mode):
        check_refusal(lambda: ours(*operands), lambda: stock(*operands), words)


def test_lstm_module_one_state_float64(mode):
    """torch refuses a c_0 of another dtype on some paths only; here it always names the tensor."""
    with cx.backend(mode), pytest.raises(RuntimeError, match="c_0"):
        cx.LSTM(3, 4)(torch.randn(4, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4).double()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_size": 3, "hidden_size": 0},
        {"input_size": 3, "hidden_size": -4},
        {"input_size": 3, "hidden_size": 4.0},
        {"input_size": 3, "hidden_size": 4, "num_layers": 0},
        {"input_size": 3, "hidden_size": 4, "proj_size": 4},
        {"input_size": 3, "hidden_size": 4, "proj_size": -1},
        {"input_size": 3, "hidden_size": 4, "dropout": 1.5},
        {"input_size": 3, "hidden_size": 4, "dropout": True},
        {"input_size": 3, "hidden_size": 4, "dropout": -0.1},
        {"input_size": -3, "hidden_size": 4},
    ],
    ids=lambda a: ", ".join(f"{k}={v}" for k, v in a.items()),
)
def test_lstm_module_arguments(arguments):
    expected = raised(lambda: nn.LSTM(**arguments))
    assert expected is not None
    with pytest.raises(type(expected)) as error:
        cx.LSTM(**arguments)
    assert str(error.value) == str(expected)


def lstm_call(**spoiled):
    operands = {
        "input": torch.randn(4, 2, 3),
        "h_0": torch.randn(1, 2, 5),
        "c_0": torch.randn(1, 2, 5),
        "weight_ih": torch.randn(20, 3),
        "weight_hh": torch.randn(20, 5),
        "bias_ih": torch.randn(20),
        "bias_hh": torch.randn(20),
        **spoiled,
    }
    x, h_0, c_0, *weights = operands.values()
    return cx.functional.lstm(x, (h_0, c_0), weights)


LSTM_FUNCTIONAL = {
    **{
        f"{n} {k}": (n, v)
        for n in ("h_0", "c_0")
        for k, v in {
            "batch": torch.randn(1, 3, 5),
            "width": torch.randn(1, 2, 4),
            "rank": torch.randn(2, 5),
            "directions": torch.randn(2, 2, 5),
            "dtype": torch.randn(1, 2, 5).double(),
            "device": torch.empty(1, 2, 5, device="meta"),
        }.items()
    },
    "weight_ih width": ("weight_ih", torch.randn(20, 4)),
    "weight_ih dtype": ("weight_ih", torch.randn(20, 3).double()),
    "weight_ih device": ("weight_ih", torch.empty(20, 3, device="meta")),
    "weight_hh width": ("weight_hh", torch.randn(20, 4)),
    "weight_hh rank": ("weight_hh", torch.randn(20)),
    "bias_ih length": ("bias_ih", torch.randn(19)),
    "bias_hh length": ("bias_hh", torch.randn(5)),
    "bias_hh dtype": ("bias_hh", torch.randn(20).half()),
    "input rank": ("input", torch.randn(4, 3)),
    "input rank 4": ("input", torch.randn(4, 2, 3, 1)),
}


@pytest.mark.pure
@pytest.mark.parametrize("name", LSTM_FUNCTIONAL)
def test_lstm_functional(mode, name):
    argument, value = LSTM_FUNCTIONAL[name]
    with cx.backend(mode), pytest.raises(RuntimeError, match=argument):
        lstm_call(**{argument: value})


@pytest.mark.parametrize("argument", ["input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("value", [None, 1.0, [1.0]], ids=str)
def test_lstm_functional_non_tensor(argument, value):
    with pytest.raises(TypeError, match=argument):
        lstm_call(**{argument: value})


def test_lstm_functional_number_of_weights():
    x, states = torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    for weights in ([], [torch.randn(20, 3)], [torch.randn(20, 3), torch.randn(20, 5)] * 3):
        with pytest.raises(RuntimeError, match="flat_weights"):
            cx.functional.lstm(x, states, weights)


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ([2, 3], "batch_sizes"),
        ([3, 2, 2], "batch_sizes"),
        ([3, 0], "batch_sizes"),
        ([-1, 6], "batch_sizes"),
        ([], "batch_sizes"),
    ],
    ids=str,
)
def test_lstm_functional_batch_sizes(sizes, word):
    """Packed rows are 5: sizes that rise, do not add up, are not positive or are none."""
    h = torch.randn(1, max(sizes, default=1), 5)
    weights = [torch.randn(20, 3), torch.randn(20, 5), torch.randn(20), torch.randn(20)]
    with pytest.raises(RuntimeError, match=word):
        cx.functional.lstm(
            torch.randn(5, 3), (h, h), weights, batch_sizes=torch.tensor(sizes, dtype=torch.int64)
        )


# ---- LSTMCell ----

CELL_MODULE = {
    "input rank 0": ((torch.tensor(1.0),), ["input"]),
    "input rank 3": ((torch.randn(1, 2, 3),), ["input"]),
    "input width": ((torch.randn(2, 4),), ["input", "weight_ih"]),
    "input float64": ((torch.randn(2, 3).double(),), ["input", "weight"]),
    "h rank": ((torch.randn(2, 3), (torch.randn(4), torch.randn(4))), ["h "]),
    "h rank 3": ((torch.randn(2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))), ["h "]),
    "h width": ((torch.randn(2, 3), (torch.randn(2, 5), torch.randn(2, 4))), ["h"]),
    "h batch": ((torch.randn(2, 3), (torch.randn(3, 4), torch.randn(3, 4))), ["h"]),
    "c width": ((torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 5))), ["c"]),
}


@pytest.mark.parametrize("name", CELL_MODULE)
def test_cell_module(mode, name):
    operands, words = CELL_MODULE[name]
    ours, stock = cx.LSTMCell(3, 4), nn.LSTMCell(3, 4)
    with cx.backend(mode):
        check_refusal(lambda: ours(*operands), lambda: stock(*operands), words)


@pytest.mark.parametrize("argument", ["input", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize(
    "value",
    [3.0, torch.randn(7), torch.empty(2, 3, 4), torch.empty(20, 5, device="meta")],
    ids=["number", "rank 1", "rank 3", "meta"],
)
def test_cell_functional(mode, argument, value):
    operands = {
        "input": torch.randn(2, 3),
        "h": torch.randn(2, 5),
        "c": torch.randn(2, 5),
        "weight_ih": torch.randn(20, 3),
        "weight_hh": torch.randn(20, 5),
        "bias_ih": torch.randn(20),
        "bias_hh": torch.randn(20),
    }
    x, h, c, *weights = {**operands, argument: value}.values()
    error = TypeError if isinstance(value, float) else RuntimeError
    with cx.backend(mode), pytest.raises(error, match=argument):
        cx.functional.lstm_cell(x, (h, c), *weights)


def test_cell_functional_one_bias():
    x, h, w_ih, w_hh = torch.randn(2, 3), torch.randn(2, 5), torch.randn(20, 3), torch.randn(20, 5)
    with pytest.raises(RuntimeError, match="bias"):
        cx.functional.lstm_cell(x, (h, h), w_ih, w_hh, torch.randn(20), None)


# ---- and what looks wrong but is right ----


@pytest.mark.pure
def test_empty_but_right(mode):
    with cx.backend(mode):
        assert list(cx.ConvPool2d(3, 4, 3)(torch.randn(0, 3, 8, 8)).shape) == [0, 4, 3, 3]
        assert list(cx.LSTM(3, 4)(torch.randn(5, 0, 3))[0].shape) == [5, 0, 4]
        assert list(cx.LSTM(3, 4, num_layers=2, bidirectional=True)(torch.randn(0, 2, 3))[0].shape) == [
            0,
            2,
            8,
        ]
        assert list(cx.LSTMCell(3, 4)(torch.randn(0, 3))[0].shape) == [0, 4]
