"""return_indices of conv_pool: the places of the maxima, as F.max_pool2d gives them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from _oracle import compiled_missing, conv_tensors, running_on, whole

import cnnrnn_ext as cx
from cnnrnn_ext import reference

OPS = ["conv_pool2d"]
BY_KERNELS = ("none", "relu", "leaky_relu", "gelu", "silu")
POOLS = {
    "2": {},
    "ceil": {"ceil_mode": True},
    "3/2 padded": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "3/2 padded, ceil": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    "2x1": {"pool_size": (2, 1)},
    "1x3/2, gaps": {"pool_size": (1, 3), "pool_stride": (2, 4)},
}


def stock(input, weight, bias=None, *, padding=0, activation="relu", pool_size=2, pool_stride=None, **pool):
    """(y, indices) of torch alone."""
    y = reference.ACTIVATIONS[activation](F.conv2d(input, weight, bias, padding=padding))
    return F.max_pool2d(y, pool_size, pool_stride, return_indices=True, padding=pool.get("pool_padding", 0),
                        ceil_mode=pool.get("ceil_mode", False))  # fmt: skip


@pytest.mark.pure
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(2, 3, 11, 12, 8, 3), (2, 16, 13, 14, 8, 3)], ids=["direct", "winograd"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", BY_KERNELS)
def test_indices_are_torchs(mode, activation, pool, shape, channels_last):
    """Whole numbers, full of ties and of windows that ReLU leaves empty: the first of equals wins.

    8 outputs: torch computes what is left over of a vector to another last bit, and equals no longer tie.
    """
    options = {"activation": activation, "padding": 1, **POOLS[pool]}
    tensors = whole(conv_tensors(*shape), -1, 2)
    tensors["bias"] -= 8  # many windows without a positive value
    if channels_last:
        tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    expected, places = stock(**tensors, **options)
    with running_on(mode, *OPS):
        y, indices = cx.functional.conv_pool2d(**tensors, **options, return_indices=True)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, places)
    assert indices.stride() == y.stride()
    torch.testing.assert_close(y, expected)
    if activation == "relu":
        assert (expected == 0).float().mean() > 0.1


@pytest.mark.parametrize("activation", ["relu6", "tanh", "sigmoid", "elu"])
def test_flat_activations_compose(activation):
    """Their winner follows from the activated values, which the kernels do not see; the trace says so."""
    tensors = whole(conv_tensors(2, 3, 11, 12, 7, 3))
    with cx.trace() as log:
        y, indices = cx.functional.conv_pool2d(**tensors, activation=activation, return_indices=True)
    assert log[0].backend == "reference"
    assert compiled_missing() or "return_indices" in log[0].reason
    expected, places = stock(**tensors, activation=activation)
    assert torch.equal(y, expected)
    assert torch.equal(indices, places)


def test_nan_and_infinity(mode):
    x = torch.randn(8, 1, 6, 6)
    x[0, 0, 1, 1], x[1, 0, 2, 3], x[2, 0, 5, 5] = float("nan"), float("inf"), float("-inf")
    x[3] = float("-inf")
    for activation in ("none", "relu"):
        for options in POOLS.values():
            tensors = {"input": x, "weight": torch.ones(1, 1, 1, 1)}
            with running_on(mode, *OPS):
                _, indices = cx.functional.conv_pool2d(
                    **tensors, activation=activation, **options, return_indices=True
                )
            assert torch.equal(indices, stock(**tensors, activation=activation, **options)[1])


def test_gradient_beside_indices(mode):
    """y alone has a gradient, and it is the one of a call without indices."""
    tensors = whole(conv_tensors(2, 3, 11, 12, 7, 3))
    grads = []
    for more in ({}, {"return_indices": True}):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        with running_on(mode, *OPS):
            y = cx.functional.conv_pool2d(**leaves, **more)
        y, indices = y if more else (y, None)
        assert indices is None or not indices.requires_grad
        grads.append(torch.autograd.grad(y.square().sum(), list(leaves.values())))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_unpooling_with_them(mode):
    """What they are for: F.max_unpool2d puts every maximum back where it stood."""
    tensors = conv_tensors(2, 3, 14, 14, 5, 3)
    with running_on(mode, *OPS):
        y, indices = cx.functional.conv_pool2d(**tensors, return_indices=True)
    there = F.max_unpool2d(y, indices, 2, output_size=(12, 12))
    conv = F.relu(F.conv2d(**tensors))
    kept = there != 0
    torch.testing.assert_close(there[kept], conv[kept])
    assert kept.sum() == (y != 0).sum()


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_modules_and_one_dimension(mode, batched):
    x1, x2 = torch.randn(2, 3, 20), torch.randn(2, 3, 9, 10)
    for make, conv, pool, x in (
        (cx.ConvPool1d, F.conv1d, F.max_pool1d, x1),
        (cx.ConvPool2d, F.conv2d, F.max_pool2d, x2),
    ):
        module = make(3, 5, 3, pool_size=3, pool_stride=2, return_indices=True)
        x = x if batched else x[0]
        with running_on(mode, *OPS):
            y, indices = module(x)
        expected, places = pool(F.relu(conv(x, module.weight, module.bias)), 3, 2, return_indices=True)
        torch.testing.assert_close(y, expected)
        assert torch.equal(indices, places)


@pytest.mark.parametrize("pool", ["avg", "none"])
def test_only_of_maxima(mode, pool):
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    match = f"return_indices.*'max'.*{pool!r}"
    with cx.backend(mode), pytest.raises(ValueError, match=match):
        cx.functional.conv_pool2d(x, weight, pool=pool, return_indices=True)
    with cx.backend(mode), pytest.raises(ValueError, match=match):
        cx.functional.conv_pool1d(x[:, :, 0], weight[:, :, 0], pool=pool, return_indices=True)
    for make in (cx.ConvPool1d, cx.ConvPool2d):
        with pytest.raises(ValueError, match=match):
            make(3, 4, 3, pool=pool, return_indices=True)


def test_in_a_graph(compiled):
    function = functools.partial(cx.functional.conv_pool2d, return_indices=True)
    tensors = conv_tensors(2, 3, 9, 10, 5, 3)
    compiled_function = torch.compile(function, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled_function(**tensors), function(**tensors), strict=True):
        assert torch.equal(a, b)


def test_unfused(mode):
    """The stock pool of a module taken apart returns them too."""
    module = torch.nn.Sequential(cx.ConvPool2d(3, 5, 3, return_indices=True))
    x = torch.randn(2, 3, 9, 10)
    with running_on(mode, *OPS):
        y, indices = module(x)
    cx.unfuse_(module)
    expected, places = module(x)
    torch.testing.assert_close(y, expected)
    assert torch.equal(indices, places)
