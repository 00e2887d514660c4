"""What the conv_pool kernels do not cover composes, visibly."""

import functools

import pytest
import torch
from _oracle import compare, conv_tensors, stock_conv_pool2d
from torch._subclasses.fake_tensor import FakeTensorMode

import cnnrnn_ext as cx
from cnnrnn_ext import _library

UNCOVERED = {
    "depthwise": {"groups": 3},
    "pool avg, few channels": {"pool": "avg"},
    "pool avg, padded": {
        "pool": "avg",
        "pool_size": 3,
        "pool_stride": 2,
        "pool_padding": 1,
        "ceil_mode": True,
    },
    "pool none, few channels": {"pool": "none"},
    "tanh, no pool": {"activation": "tanh", "pool": "none"},
    "window too large": {"pool_size": (16, 16), "padding": 8},
    "same, even kernel": {"padding": "same"},
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_uncovered_configuration_says_so(name):
    """In "auto" the trace names the reference and the reason; the result is right all the same."""
    options = UNCOVERED[name]
    groups = options.get("groups", 1)
    outputs = 3 if groups > 1 else 5
    tensors = conv_tensors(2, 3, 12, 12, outputs, 2 if "even" in name else 3, groups=groups)
    ours = functools.partial(cx.functional.conv_pool2d, **options)
    stock = functools.partial(stock_conv_pool2d, **options)
    with cx.trace() as log:
        y = ours(**tensors)
    (call,) = log
    assert call.backend == "reference"
    assert call.reason
    torch.testing.assert_close(y, stock(**tensors))
    compare(ours, stock, tensors, "reference", ["conv_pool2d"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pool": "avg", "stride": 2}, "pool='avg' has a CUDA kernel only for 3x3 and stride 1"),
        ({"pool": "none", "dilation": 2}, "pool='none' has a CUDA kernel only for 3x3 and stride 1"),
        ({"pool": "avg"}, None),
        ({"activation": "gelu"}, None),
        ({"activation": "tanh", "return_indices": True}, None),
        ({"dtype": torch.float16}, None),
        (
            {"dtype": torch.float16, "pool_size": 3},
            "torch.float16 has a CUDA kernel only for 3x3, stride 1 and windows of 1 or 2 side by side",
        ),
    ],
)
def test_what_cuda_kernels_cover(options, reason):
    """On tensors without data: what has no kernel is composed and says why."""
    with FakeTensorMode(), cx.trace() as log:
        dtype = options.get("dtype", torch.float32)
        x, weight = (
            torch.empty(shape, device="cuda", dtype=dtype) for shape in ((1, 3, 12, 12), (4, 3, 3, 3))
        )
        y = cx.functional.conv_pool2d(x, weight, **{k: v for k, v in options.items() if k != "dtype"})
    y = y[0] if options.get("return_indices") else y
    assert y.device.type == "cuda"
    (call,) = log
    if reason is None and _library.libraries()["cuda"].loaded:
        assert call.backend == "compiled"
    else:
        assert call.reason == (reason or _library.libraries()["cuda"].reason)
