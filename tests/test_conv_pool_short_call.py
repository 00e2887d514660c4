"""The short way of a conv_pool call: when it is taken, that it changes no bit, what it says of bad input."""

import copy
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnrnn_ext as cx
from cnnrnn_ext._autograd_conv_pool import ConvPoolTrain
from cnnrnn_ext.modules import conv_pool as modules

operators = torch.ops.cnnrnn_ext


@pytest.fixture
def taken(compiled, monkeypatch):
    """What the modules called at once, in order: "forward" or "train"."""
    calls, operator, forward = [], modules.operator, ConvPoolTrain.forward

    def counted(*args):
        y = operator(*args)
        calls.append("forward")
        return y

    def counted_train(ctx, *args):
        y = forward(ctx, *args)
        calls.append("train")
        return y

    monkeypatch.setattr(modules, "operator", counted)
    monkeypatch.setattr(ConvPoolTrain, "forward", staticmethod(counted_train))
    return calls


def make(dims=2, *args, dtype=None, **options):
    return (cx.ConvPool2d if dims == 2 else cx.ConvPool1d)(4, 6, *(args or (3,)), dtype=dtype, **options)


def image(dims=2, batch=2, dtype=None):
    return torch.randn(batch, 4, *((15, 13) if dims == 2 else (31,)), dtype=dtype)


def long_way(module, x):
    with cx.trace():
        return module(x)


COVERED = [
    {},
    {"bias": False, "stride": 2, "padding": 1, "dilation": 2},
    {"padding": "valid", "activation": "silu"},
    {"groups": 2, "activation": "none", "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    {"precision": "high"},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("options", COVERED, ids=str)
@pytest.mark.parametrize("dims", [1, 2])
def test_taken_and_equal(taken, dims, options, batch, dtype):
    module, x = make(dims, dtype=dtype, **options), image(dims, batch, dtype)
    with torch.no_grad():
        y = module(x)
        assert taken == ["forward"]
        assert torch.equal(y, long_way(module, x))
    trained = module(x)
    assert taken == ["forward", "train"]
    expected = long_way(module, x)
    assert torch.equal(trained, expected)
    grad = torch.randn_like(y)
    leaves = list(module.parameters())
    a, b = (torch.autograd.grad(z, leaves, grad) for z in (trained, expected))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("pool", ["none", "avg"])
def test_other_pools_where_the_operator_serves(taken, pool):
    """3x3 of float32, which double takes away and float brings back."""
    module, x = cx.ConvPool2d(8, 6, 3, pool=pool), torch.randn(2, 8, 15, 13)
    for dtype in (torch.float32, torch.float64, torch.float32):
        module, x = module.to(dtype), x.to(dtype)
        taken.clear()
        with torch.no_grad():
            y = module(x)
        trained = module(x)
        assert taken == (["forward", "train"] if dtype == torch.float32 else [])
        assert torch.equal(y, long_way(module, x))
        assert torch.equal(trained, y)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "none", "groups": 2},
        {"pool": "avg"},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"return_indices": True},
    ],
    ids=str,
)
def test_not_taken(taken, options):
    module, x = make(**options), image()
    with torch.no_grad():
        module(x)
        module.requires_grad_(False)
        depthwise = cx.ConvPool2d(4, 4, 3, groups=4)
        assert torch.equal(depthwise(x), long_way(depthwise, x))
    assert taken == []


def test_layouts_and_ranks(taken):
    module, x = make(), image()
    with torch.no_grad():
        last = module(x.contiguous(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert taken == ["forward"]
        assert torch.equal(module(x[0]), module(x)[0])
        assert taken == ["forward", "forward"]  # without a batch it is the long way
        torch.testing.assert_close(last, module(x))


def test_follows_every_change(taken):
    """Of attributes, parameters, dtype."""
    module, x = make(), image()
    with torch.no_grad():
        for change in (
            lambda: setattr(module, "stride", (2, 1)),
            lambda: setattr(module, "activation", "tanh"),
            lambda: setattr(module, "pool", "avg"),
            lambda: setattr(module, "pool", "max"),
            lambda: setattr(module, "bias", None),
            lambda: setattr(module, "weight", torch.nn.Parameter(torch.randn(8, 4, 5, 3))),
            lambda: setattr(module, "padding", 1),  # not as the constructor leaves it
            lambda: module.weight.mul_(2),
        ):
            module(x)
            change()
            assert torch.equal(module(x), long_way(module, x))
        module.double()
        assert torch.equal(module(x.double()), long_way(module, x.double()))
    assert taken.count("forward") > 8


def test_parametrized_weight(taken):
    module, x = make(), image()
    with torch.no_grad():
        module(x)
        parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.mul_(3)
        assert torch.equal(module(x), long_way(module, x))
    assert taken == ["forward"]


def test_copied_and_pickled(taken):
    module, x = make(), image()
    with torch.no_grad():
        y = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(x), y)
            other.stride = (3, 3)
            assert not torch.equal(other(x), y)
    assert taken == ["forward"] * 5


def test_hooks(taken):
    module, x = make(), image()
    seen = []
    handle = module.register_forward_hook(lambda m, args, y: seen.append(y))
    y = module(x)
    handle.remove()
    assert seen == [y]
    assert module(x) is not None
    assert len(seen) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_bad_input_is_told_as_by_the_function(compiled, grad):
    module, x = make(), image()
    other = make()
    other.bias = torch.nn.Parameter(torch.zeros(5))
    with torch.set_grad_enabled(grad):
        for bad, where, message in (
            (x[:, :3], module, "input: expected 4 channels"),
            (x.double(), module, "weight: expected dtype"),
            (x[:, :, :2], module, "larger than the padded input"),
            (x[:, :, :, :3], module, "pool_size: the window"),
            (x, other, "bias: expected shape"),
        ):
            with pytest.raises(RuntimeError, match=message):
                where(bad)


# ---- training ----


def operands(dtype=torch.float64):
    """x, weight, bias, all of which want a gradient, and the configuration."""
    shapes = (2, 3, 7, 8), (4, 3, 3, 3), (4,)
    tensors = [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return tensors, ([1, 1], [1, 0], [1, 1], 1)


POOLS = {
    "max": ["max", [2, 2], [2, 2], [0, 0], False, "highest"],
    "overlapping": ["max", [3, 3], [2, 2], [1, 1], True, "highest"],
    "avg": ["avg", [2, 2], [2, 2], [0, 0], False, "highest"],
}


@pytest.mark.parametrize("activation", ["relu", "none", "tanh", "gelu"])
@pytest.mark.parametrize("pool", POOLS)
def test_gradients(compiled, pool, activation):
    tensors, conv = operands()
    config = *conv, activation, *POOLS[pool]
    ours, (expected, *_) = (
        ConvPoolTrain.apply(*tensors, *config),
        operators.conv_pool2d_train(*tensors, *config),
    )
    assert torch.equal(ours, expected)
    grad = torch.randn_like(ours)
    for wanted in range(1, 8):
        leaves = [t for i, t in enumerate(tensors) if wanted >> i & 1]
        a, b = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for y in (ours, expected))
        assert all(map(torch.equal, a, b))
    if activation != "gelu":  # its float64 pieces alone take long

        def function(*tensors):
            return ConvPoolTrain.apply(*tensors, *config)

        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors)


class Onlooker(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Tagged(torch.nn.Parameter):
    pass


def test_onlookers_see_the_registered_operator(taken):
    module, x = make(), image()
    with Onlooker() as mode:
        module(x).sum().backward()
    assert any("conv_pool2d_train" in name for name in mode.seen)
    assert any("conv_pool2d_backward" in name for name in mode.seen)
    module.weight = Tagged(module.weight.detach())
    module(x)
    assert taken == []


def test_checkpointed_and_under_autocast(taken):
    module, x = make(), image()
    module(x).sum().backward()
    expected = module.weight.grad.clone()
    module.zero_grad()
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert torch.equal(module.weight.grad, expected)
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert taken == []
