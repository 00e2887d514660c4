"""conv_pool1d against torch.nn."""

import functools

import pytest
import torch
import torch.nn.functional as F
from _oracle import compare

import cnnrnn_ext as cx

CONFIGS_1D = {
    "default": ((2, 3, 20, 5, 3), {}),
    "everything": (
        (2, 4, 31, 6, 3),
        {
            "stride": 2,
            "padding": 2,
            "dilation": 2,
            "groups": 2,
            "pool_size": 3,
            "pool_stride": 2,
            "pool_padding": 1,
        },
    ),
    "same, ceil": ((2, 3, 21, 6, 5), {"padding": "same", "ceil_mode": True, "activation": "none"}),
}


def stock_conv_pool1d(
    input,
    weight,
    bias,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation="relu",
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
):
    y = F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    y = torch.relu(y) if activation == "relu" else y
    return F.max_pool1d(y, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)


@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", CONFIGS_1D)
def test_one_dimension(mode, name, unbatched):
    (n, c, length, k, kernel), options = CONFIGS_1D[name]
    tensors = {
        "input": torch.randn(n, c, length),
        "weight": torch.randn(k, c // options.get("groups", 1), kernel),
        "bias": torch.randn(k),
    }
    if unbatched:
        tensors["input"] = tensors["input"][0]
    ours = functools.partial(cx.functional.conv_pool1d, **options)
    # conv_pool1d runs on the two-dimensional operator, and in "reference" on its reference.
    compare(ours, functools.partial(stock_conv_pool1d, **options), tensors, mode, ["conv_pool2d"])
