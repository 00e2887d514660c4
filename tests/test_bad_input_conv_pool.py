"""Wrong input to conv_pool, function and module: torch's exception type, the argument named."""

import pytest
import torch
import torch.nn.functional as F
from _refusals import B, W, X, check_refusal, raised
from torch import nn

import cnnrnn_ext as cx

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
