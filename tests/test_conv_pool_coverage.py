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
    "pool none, groups": {"pool": "none", "groups": 3},
    "tanh, no pool": {"activation": "tanh", "pool": "none", "groups": 3},
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
        (
            {"pool": "avg", "stride": 2},
            "pool='avg' has a CUDA kernel of torch.float32 only for 3x3 and stride 1",
        ),
        (
            {"pool": "none", "dilation": 2, "dtype": torch.float16, "channels": 5},
            "pool='none' has a CUDA kernel only for 3x3 and stride 1, or up to 4 channels",
        ),
        ({"pool": "avg"}, None),
        ({"activation": "gelu"}, None),
        ({"activation": "tanh", "return_indices": True}, None),
        ({"dtype": torch.float16, "channels": 5, "stride": 2, "pool_size": 3}, None),
        ({"dtype": torch.bfloat16, "pool": "none", "stride": 2}, None),
        ({"precision": "high", "dilation": 2}, None),
        (
            {"dtype": torch.float16, "groups": 4, "channels": 4},
            "no tensor-core kernel for one output channel of each group (depthwise)",
        ),
    ],
)
def test_what_cuda_kernels_cover(options, reason):
    """On tensors without data: what has no kernel is composed and says why."""
    options = dict(options)
    dtype, channels = options.pop("dtype", torch.float32), options.pop("channels", 3)
    with FakeTensorMode(), cx.trace() as log:
        x = torch.empty(1, channels, 12, 12, device="cuda", dtype=dtype)
        weight = x.new_empty(4, channels // options.get("groups", 1), 3, 3)
        y = cx.functional.conv_pool2d(x, weight, **options)
    y = y[0] if options.get("return_indices") else y
    assert y.device.type == "cuda"
    (call,) = log
    if reason is None and _library.libraries()["cuda"].loaded:
        assert call.backend == "compiled"
    else:
        assert call.reason == (reason or _library.libraries()["cuda"].reason)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": torch.float16}, "tensor cores"),
        ({"dtype": torch.float16, "pool_size": 3}, "tensor cores, gathered"),
        ({"dtype": torch.bfloat16, "stride": 2}, "tensor cores, gathered"),
        ({"dtype": torch.float32, "precision": "high"}, "tensor cores, TF32"),
        ({"dtype": torch.float32, "precision": "high", "dilation": 2}, "tensor cores, TF32, gathered"),
        ({"dtype": torch.float32}, None),
        ({"dtype": torch.float64, "precision": "high"}, None),
    ],
)
def test_what_a_trace_tells_of_cuda_kernels(options, told):
    """Where the library is compiled, a call names the kernels it would run on a GPU."""
    if not _library.libraries()["cuda"].loaded:
        pytest.skip("the CUDA library was not built")
    options = dict(options)
    with FakeTensorMode(), cx.trace() as log:
        x = torch.empty(1, 3, 12, 12, device="cuda", dtype=options.pop("dtype"))
        cx.functional.conv_pool2d(x, x.new_empty(4, 3, 3, 3), **options)
    assert log[0].kernel == (f"cuda, {told}" if told else "cuda")
