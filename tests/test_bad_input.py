"""Wrong input to functional, module, raw operator: torch's exception type, the argument named, no crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _oracle import compiled_missing
from _raw_cases import CASES, GOOD_CASES, OTHER_CASES
from torch import nn

import cnnrnn_ext as cx

HERE = Path(__file__).parent


# ---- raw operators, in a process that may crash ----


def run_raw_cases():
    """{case name: {"type", "message"} or {"crash": return code}}."""
    cases = CASES + OTHER_CASES + GOOD_CASES
    outcomes, start = {}, 0
    environment = {**os.environ, "PYTHONPATH": str(Path(cx.__file__).parent.parent), "MALLOC_CHECK_": "3"}
    while start < len(cases):
        process = subprocess.run(
            [sys.executable, str(HERE / "_raw_cases.py"), str(start)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            if "end" in line:
                outcomes[cases[line["end"]][0]] = line
        begun = [line["begin"] for line in lines if "begin" in line]
        if not begun:
            raise RuntimeError(f"the cases did not start: {process.stderr[-2000:]}")
        start = begun[-1] + 1
        if process.returncode:
            outcomes[cases[begun[-1]][0]] = {"crash": process.returncode, "message": process.stderr[-500:]}
    return outcomes


@pytest.fixture(scope="module")
def raw_outcomes():
    return run_raw_cases()


# The shape of weight_hh says what H is: a wrong one shows as a state that does not fit it. Which cell it is
# says which states and gates there are; batch_sizes says whether x is packed, and how many rows there are.
ALSO_NAMES = {
    "weight_hh": ("h_0:", "h:"),
    "batch_sizes": ("x:", "h_0:"),
    "scale_ih": ("scale",),
    "scale_hh": ("scale",),
}


@pytest.mark.parametrize(("name", "argument"), [case[:2] for case in CASES], ids=[case[0] for case in CASES])
def test_raw_operator_refuses(raw_outcomes, name, argument):
    outcome = raw_outcomes[name]
    assert "crash" not in outcome, outcome
    assert outcome["type"] in ("RuntimeError", "TypeError", "ValueError"), "accepted in silence"
    if compiled_missing() is None:
        names = (argument, *ALSO_NAMES.get(argument, ()))
        assert any(n in outcome["message"] for n in names), outcome["message"]


@pytest.mark.parametrize("name", [case[0] for case in GOOD_CASES])
def test_raw_operator_takes_the_operands_that_the_cases_spoil(raw_outcomes, name):
    assert raw_outcomes[name].get("type", "") is None, raw_outcomes[name]


@pytest.mark.parametrize("name", [case[0] for case in OTHER_CASES])
def test_raw_operator_survives(raw_outcomes, name):
    assert "crash" not in raw_outcomes[name], raw_outcomes[name]


def test_code_outside_its_window_passes_no_gradient(compiled):
    """A forged code names no position: nothing is written, as for a dead window."""
    x, weight = torch.randn(1, 1, 6, 6), torch.randn(2, 1, 3, 3)
    config = ([1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False)
    y, code, _ = torch.ops.cnnrnn_ext.conv_pool2d_train(x, weight, None, *config)
    for value in (4, 5, 100, 254, 255):
        grads = torch.ops.cnnrnn_ext.conv_pool2d_backward(
            torch.ones_like(y),
            x,
            weight,
            None,
            torch.full_like(code, value),
            None,
            *config,
            True,
            True,
            False,
        )
        assert not grads[0].any()
        assert not grads[1].any()


# ---- functional and modules: torch's own type, from torch itself on the same input ----


def raised(function):
    try:
        function()
    except Exception as error:  # which type it is, is what the test asks
        return error
    return None


def check_refusal(ours, stock, words):
    expected = raised(stock)
    assert expected is not None, "torch itself accepts this"
    error = raised(ours)
    assert error is not None, f"accepted, where torch raises {type(expected).__name__}: {expected}"
    assert isinstance(error, type(expected)), f"{type(error).__name__}: {error}, torch: {expected!r}"
    assert any(word in str(error) for word in words), str(error)


X, W, B = torch.randn(2, 4, 8, 9), torch.randn(6, 4, 3, 3), torch.randn(6)
# name: (operands spoiled, words of which the message must hold one)
CONV = {
    "input rank 2": ({"input": torch.randn(8, 9)}, ["input"]),
    "input rank 5": ({"input": torch.randn(1, 2, 4, 8, 9)}, ["input"]),
    "input scalar": ({"input": torch.tensor(1.0)}, ["input"]),
    "input channels": ({"input": torch.randn(2, 3, 8, 9)}, ["input"]),
    "input int64": ({"input": torch.ones(2, 4, 8, 9, dtype=torch.int64)}, ["input", "weight"]),
    "input float64": ({"input": torch.randn(2, 4, 8, 9, dtype=torch.float64)}, ["input", "weight"]),
    "input list": ({"input": [[1.0]]}, ["input"]),
    "input None": ({"input": None}, ["input"]),
    "input too small": ({"input": torch.randn(2, 4, 2, 9)}, ["input"]),
    "weight rank": ({"weight": torch.randn(6, 4, 3)}, ["weight"]),
    "weight channels": ({"weight": torch.randn(6, 3, 3, 3)}, ["weight", "input"]),
    "weight int64": ({"weight": torch.ones(6, 4, 3, 3, dtype=torch.int64)}, ["weight"]),
    "weight None": ({"weight": None}, ["weight"]),
    "bias length": ({"bias": torch.randn(5)}, ["bias"]),
    "bias rank": ({"bias": torch.randn(6, 1)}, ["bias"]),
    "bias float64": ({"bias": torch.randn(6, dtype=torch.float64)}, ["bias"]),
    "bias number": ({"bias": 1.0}, ["bias"]),
    "stride 0": ({"stride": 0}, ["stride"]),
    "stride negative": ({"stride": (1, -1)}, ["stride"]),
    "stride float": ({"stride": 1.5}, ["stride"]),
    "stride text": ({"stride": "2"}, ["stride"]),
    "stride three": ({"stride": (1, 1, 1)}, ["stride"]),
    "padding negative": ({"padding": -1}, ["padding"]),
    "padding float": ({"padding": 0.5}, ["padding"]),
    "padding unknown": ({"padding": "full"}, ["padding"]),
    "padding same, strided": ({"padding": "same", "stride": 2}, ["padding"]),
    "dilation 0": ({"dilation": 0}, ["dilation"]),
    "dilation float": ({"dilation": 1.0}, ["dilation"]),
    "groups 0": ({"groups": 0}, ["groups"]),
    "groups negative": ({"groups": -1}, ["groups"]),
    "groups not a divisor": ({"groups": 3}, ["groups"]),
    "groups float": ({"groups": 1.0}, ["groups"]),
    "kernel larger than input": ({"weight": torch.randn(6, 4, 9, 3)}, ["kernel"]),
    "dilated kernel larger": ({"dilation": 5}, ["kernel"]),
    "pool_size 0": ({"pool_size": 0}, ["pool_size"]),
    "pool_size negative": ({"pool_size": (2, -2)}, ["pool_size"]),
    "pool_size float": ({"pool_size": 2.0}, ["pool_size"]),
    "pool_size larger than the map": ({"pool_size": 8}, ["pool_size"]),
    "pool_stride 0": ({"pool_stride": 0}, ["pool_stride"]),
    "pool_stride negative": ({"pool_stride": -1}, ["pool_stride"]),
    "pool_padding negative": ({"pool_padding": -1}, ["pool_padding"]),
    "pool_padding more than half": ({"pool_padding": 2}, ["pool_padding"]),
    "pool_padding float": ({"pool_padding": 0.5}, ["pool_padding"]),
}


def stock_conv_pool2d(
    input,
    weight,
    bias,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
):
    y = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.max_pool2d(F.relu(y), pool_size, pool_stride, pool_padding)


@pytest.mark.pure
@pytest.mark.parametrize("name", CONV)
def test_conv_pool2d(mode, name):
    spoiled, words = CONV[name]
    operands = {"input": X, "weight": W, "bias": B, **spoiled}
    with cx.backend(mode):
        check_refusal(
            lambda: cx.functional.conv_pool2d(**operands), lambda: stock_conv_pool2d(**operands), words
        )


def test_conv_pool2d_other_device(mode):
    """A meta operand among real ones (the other device every machine has)."""
    for name, tensor in (("weight", W), ("bias", B)):
        operands = {"input": X, "weight": W, "bias": B, name: tensor.to("meta")}
        with cx.backend(mode), pytest.raises(RuntimeError, match=name):
            cx.functional.conv_pool2d(**operands)


@pytest.mark.parametrize(
    ("option", "value"),
    [("activation", "swish"), ("pool", "median"), ("precision", "low"), ("activation", None)],
)
def test_conv_pool2d_unknown_choice(option, value):
    with pytest.raises(ValueError, match=option):
        cx.functional.conv_pool2d(X, W, B, **{option: value})
    with pytest.raises(ValueError, match=option):
        cx.ConvPool2d(4, 6, 3, **{option: value})
    with pytest.raises(ValueError, match=option):
        cx.ConvPool1d(4, 6, 3, **{option: value})


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, RuntimeError), (-1, RuntimeError), (1.5, TypeError), ("2", TypeError), (True, TypeError)],
)
@pytest.mark.parametrize("option", ["pool_size", "pool_stride"])
def test_conv_pool_module_refuses_sizes_at_once(option, value, error):
    with pytest.raises(error, match=option):
        cx.ConvPool2d(4, 6, 3, **{option: value})


CONV_MODULE = {
    "channels": torch.randn(2, 3, 8, 9),
    "rank": torch.randn(8, 9),
    "dtype": torch.randn(2, 4, 8, 9, dtype=torch.float64),
    "int": torch.ones(2, 4, 8, 9, dtype=torch.int64),
    "too small": torch.randn(2, 4, 2, 2),
    "not a tensor": "frames",
}


@pytest.mark.parametrize("name", CONV_MODULE)
def test_conv_pool_module(mode, name):
    ours = cx.ConvPool2d(4, 6, 3)
    stock = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = CONV_MODULE[name]
    with cx.backend(mode):
        check_refusal(lambda: ours(x), lambda: stock(x), ["input", "weight"])


@pytest.mark.parametrize(
    "arguments",
    [
        (4, 6, 3, 1, "full"),
        (4, 6, 3, 2, "same"),
        (4, 5, 3, 1, 0, 1, 2),
        (4, 6, 3, 1, 0, 1, 0),
        (4, 6, 3, 1, 0, 1, 1, True, "mirror"),
    ],
    ids=["padding", "same strided", "groups not a divisor", "groups 0", "padding_mode"],
)
def test_conv_pool_module_arguments(arguments):
    expected = raised(lambda: nn.Conv2d(*arguments))
    assert expected is not None
    with pytest.raises(type(expected)):
        cx.ConvPool2d(*arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_give_torchs_result(mode, value):
    weight = W.clone()
    weight[3, 2, 1, 1] = value
    with cx.backend(mode):
        y = cx.functional.conv_pool2d(X, weight, B)
    torch.testing.assert_close(y, stock_conv_pool2d(X, weight, B), equal_nan=True)
    ours, stock = cx.LSTM(3, 4), nn.LSTM(3, 4)
    with torch.no_grad():
        ours.weight_hh_l0[5, 1] = value
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 3)
    with cx.backend(mode):
        result = ours(x)
    torch.testing.assert_close(result, stock(x), equal_nan=True)


# ---- LSTM ----

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
