"""conv_pool2d against torch.nn: values, every gradient, and torch's semantics exactly."""

import functools
import itertools

import pytest
import torch
from _oracle import check_equal, compare, conv_tensors, running_on, stock_conv_pool2d, whole

import cnnrnn_ext as cx

OPS = ["conv_pool2d"]


def both(**options):
    """(ours, stock) with the same options."""
    ours = functools.partial(cx.functional.conv_pool2d, **options)
    return ours, functools.partial(stock_conv_pool2d, **options)


# name: (n, c, h, w, k, kernel), options
CONFIGS = {
    "default": ((2, 3, 12, 12, 5, 3), {}),
    "odd sizes": ((3, 5, 13, 11, 7, 3), {}),
    "one pixel out": ((2, 3, 4, 4, 5, 3), {}),
    "wide": ((1, 2, 5, 67, 33, 3), {}),
    "tall": ((1, 2, 67, 5, 17, 3), {}),
    "many channels": ((2, 33, 8, 9, 34, 3), {}),
    "one channel": ((5, 1, 28, 28, 32, 3), {}),
    "colour frames": ((4, 3, 28, 28, 32, 3), {}),
    "kernel 1": ((2, 6, 8, 8, 9, 1), {}),
    "kernel 5": ((2, 3, 15, 14, 8, 5), {}),
    "kernel 2x4": ((2, 3, 9, 12, 8, (2, 4)), {}),
    "padding 1": ((2, 3, 10, 10, 8, 3), {"padding": 1}),
    "padding beyond the kernel": ((1, 2, 5, 5, 3, 3), {"padding": 4}),
    "padding uneven": ((2, 3, 9, 10, 8, (3, 5)), {"padding": (0, 2)}),
    "padding same": ((2, 3, 10, 9, 8, 3), {"padding": "same"}),
    "padding same, dilated": ((2, 3, 10, 9, 8, (3, 5)), {"padding": "same", "dilation": 2}),
    "padding valid": ((2, 3, 10, 9, 8, 3), {"padding": "valid"}),
    "stride 2": ((2, 3, 17, 18, 8, 3), {"stride": 2}),
    "stride uneven": ((2, 3, 17, 18, 8, 3), {"stride": (1, 3), "padding": 1}),
    "dilation 2": ((2, 3, 14, 13, 8, 3), {"dilation": 2}),
    "groups": ((2, 6, 10, 10, 9, 3), {"groups": 3}),
    "depthwise, two each": ((2, 4, 10, 10, 8, 3), {"groups": 4}),
    "everything": ((2, 4, 20, 21, 6, 3), {"stride": 2, "padding": 2, "dilation": (1, 2), "groups": 2}),
    "pool 3/2": ((2, 3, 13, 13, 8, 3), {"pool_size": 3, "pool_stride": 2}),
    "pool 3/2 padded": ((2, 3, 12, 13, 8, 3), {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}),
    "pool 3/1": ((2, 3, 10, 10, 4, 3), {"pool_size": 3, "pool_stride": 1}),
    "pool 2/3, gaps": ((2, 3, 14, 14, 4, 3), {"pool_size": 2, "pool_stride": 3}),
    "pool 1x3": ((2, 3, 10, 14, 4, 3), {"pool_size": (1, 3)}),
    "pool 1": ((2, 3, 10, 10, 4, 3), {"pool_size": 1}),
    "pool padded": ((2, 3, 10, 11, 4, 3), {"pool_padding": 1}),
    "ceil": ((2, 3, 11, 12, 4, 3), {"ceil_mode": True}),
    "ceil 3/2": ((2, 3, 12, 14, 4, 3), {"pool_size": 3, "pool_stride": 2, "ceil_mode": True}),
    "ceil, last window dropped": (
        (1, 2, 7, 7, 3, 1),
        {"pool_size": 2, "pool_stride": 3, "pool_padding": 1, "ceil_mode": True},
    ),
    "no activation": ((2, 3, 11, 10, 5, 3), {"activation": "none"}),
    "no activation, padded pool": (
        (2, 3, 12, 13, 4, 3),
        {"activation": "none", "pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    ),
    "largest pool": ((1, 1, 20, 18, 2, 3), {"pool_size": (17, 15)}),
}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_against_torch(mode, name, dtype):
    shape, options = CONFIGS[name]
    ours, stock = both(**options)
    compare(ours, stock, conv_tensors(*shape, groups=options.get("groups", 1), dtype=dtype), mode, OPS)


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("name", CONFIGS)
def test_ties_are_torchs(mode, name):
    """Whole numbers tie in most windows: the first in row-major order wins, gradients equal to the bit."""
    shape, options = CONFIGS[name]
    ours, stock = both(**options)
    tensors = whole(conv_tensors(*shape, groups=options.get("groups", 1)))
    grad = torch.randint(-3, 4, stock(**tensors).shape).float()
    check_equal(ours, stock, tensors, mode, OPS, grad_outputs=[grad])


@pytest.mark.isa
@pytest.mark.parametrize(
    "shape", [(512, 1, 28, 28, 32, 3), (512, 32, 13, 13, 64, 3)], ids=["seed block 1", "seed block 2"]
)
def test_real_sizes(compiled, shape):
    """The seed's two blocks. Values in sixteenths are exact before the pool, so that no rounding decides
    which position wins; the error of real values is compared forward."""
    ours, stock = both()
    tensors = conv_tensors(*shape)
    compare(ours, stock, tensors, compiled, OPS, wanted=[])
    exact = {k: (v * 16).round() / 16 for k, v in tensors.items()}
    compare(ours, stock, exact, compiled, OPS)


def test_without_bias(mode):
    compare(*both(padding=1), conv_tensors(2, 3, 9, 10, 8, 3, bias=False), mode, OPS)


# ---- gradients asked for, and not ----

NAMES = ("input", "weight", "bias")
SUBSETS = [s for r in (1, 2, 3) for s in itertools.combinations(NAMES, r)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_any_subset_of_gradients(mode, wanted):
    compare(*both(), conv_tensors(2, 3, 9, 10, 8, 3), mode, OPS, wanted=list(wanted))


def test_inference_equals_training_bitwise(compiled):
    tensors = conv_tensors(3, 5, 13, 11, 7, 3)
    with running_on(compiled, *OPS):
        inference = cx.functional.conv_pool2d(**tensors)
        tensors["weight"].requires_grad_()
        training = cx.functional.conv_pool2d(**tensors)
        with torch.no_grad():
            no_grad = cx.functional.conv_pool2d(**tensors)
        with torch.inference_mode():
            inferred = cx.functional.conv_pool2d(**tensors)
    assert training.requires_grad
    assert not no_grad.requires_grad
    for other in (training, no_grad, inferred):
        assert torch.equal(inference, other.detach())


# ---- semantics at special values ----


def identity(channels=1):
    """A 1×1 convolution that passes values on unchanged: the pool sees exactly the input."""
    return torch.eye(channels).view(channels, channels, 1, 1)


def pool_only(x, mode, grad=None, **options):
    """Our output and input gradient beside torch's, through an identity convolution."""
    ours, stock = both(**options)
    tensors = {"input": x, "weight": identity(x.shape[1])}
    return check_equal(
        ours, stock, tensors, mode, OPS, wanted=["input"], grad_outputs=None if grad is None else [grad]
    )


@pytest.mark.isa
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_all_positions_of_a_window_tie(mode, activation):
    x = torch.full((2, 3, 6, 6), 2.0)
    pool_only(x, mode, activation=activation)
    pool_only(x, mode, activation=activation, pool_size=3, pool_stride=2, pool_padding=1)


@pytest.mark.isa
@pytest.mark.pure
def test_every_winning_position(mode):
    """One window per ordering of four values, one tie per pair: the winner is torch's in each."""
    for values in (*itertools.permutations((1.0, 2.0, 3.0, 4.0)), *itertools.product((1.0, 2.0), repeat=4)):
        x = torch.tensor(values).view(1, 1, 2, 2)
        for activation in ("relu", "none"):
            pool_only(x, mode, torch.ones(1, 1, 1, 1), activation=activation)


@pytest.mark.isa
@pytest.mark.pure
def test_all_negative_windows_have_no_gradient(mode):
    x = -torch.rand(2, 3, 8, 8) - 0.1
    ours, _ = both()
    with running_on(mode, *OPS):
        x.requires_grad_()
        y = ours(x, identity(3))
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.zeros(2, 3, 4, 4))
    assert torch.equal(grad, torch.zeros(2, 3, 8, 8))
    pool_only(-torch.rand(2, 3, 9, 8) - 0.1, mode, activation="none")


@pytest.mark.isa
def test_zero_has_no_gradient(mode):
    x = torch.tensor([[0.0, -1.0], [-0.0, -2.0]]).view(1, 1, 2, 2)
    pool_only(x, mode)
    pool_only(x, mode, activation="none")


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "options", [{}, {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}], ids=["2", "3/2"]
)
def test_special_value_at_each_position(mode, activation, value, options):
    """NaN wins its window and passes the gradient, as in torch; infinities compare as numbers."""
    for position in range(16):
        x = torch.randn(1, 1, 4, 4)
        x.view(-1)[position] = value
        pool_only(x, mode, activation=activation, **options)


@pytest.mark.isa
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_windows_full_of_special_values(mode, activation):
    special = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0]
    for values in itertools.product(special, repeat=4):
        if len(set(map(str, values))) > 2:
            continue
        pool_only(torch.tensor(values).view(1, 1, 2, 2), mode, torch.ones(1, 1, 1, 1), activation=activation)


def test_windows_of_minus_infinity_and_padding(mode):
    x = torch.full((1, 1, 4, 4), float("-inf"))
    pool_only(x, mode, activation="none", pool_size=3, pool_stride=2, pool_padding=1)


def test_nan_in_weights_reaches_the_output(mode):
    tensors = conv_tensors(2, 3, 9, 10, 8, 3)
    tensors["weight"][2, 1, 0, 0] = float("nan")
    tensors["weight"][4, 0, 2, 2] = float("inf")
    tensors["bias"][6] = float("nan")
    ours, stock = both()
    with running_on(mode, *OPS):
        y = ours(**tensors)
    expected = stock(**tensors)
    assert torch.equal(y.isnan(), expected.isnan())
    assert expected.isnan().any()
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_overlapping_windows_add_their_gradients(mode):
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1.0  # wins all four 3/2 windows
    ours, _ = both(pool_size=3, pool_stride=2)
    with running_on(mode, *OPS):
        x.requires_grad_()
        y = ours(x, identity())
        (grad,) = torch.autograd.grad(y, x, torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]]))
    assert grad[0, 0, 2, 2] == 15
    assert grad.count_nonzero() == 1


# ---- layouts ----


def strided_views(x):
    """The same values in other strides."""
    n, c, h, w = x.shape
    wide = torch.empty(n, c + 1, h + 2, 2 * w)
    wide[:, 1:, 1:-1, ::2] = x
    yield "sliced", wide[:, 1:, 1:-1, ::2]
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "batch inside", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)


def test_strided_inputs(mode):
    tensors = conv_tensors(2, 3, 9, 10, 8, 3)
    ours, stock = both()
    for name, view in strided_views(tensors["input"]):
        assert name == "channels_last" or not view.is_contiguous()
        compare(ours, stock, {**tensors, "input": view}, mode, OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expanded_input_and_gradient(mode, dtype):
    """Stride 0: a broadcast input, and the expanded gradient that sum() sends back."""
    tensors = conv_tensors(1, 3, 9, 10, 8, 3, dtype=dtype)
    x, weight = tensors["input"], tensors["weight"]
    grads = []
    for function in both():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        with cx.backend(mode):
            function(leaves[0].expand(4, -1, -1, -1), leaves[1]).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.isa
@pytest.mark.parametrize("name", CONFIGS)
def test_channels_last(compiled, name):
    """channels_last in, channels_last out; the gradient of the input too."""
    shape, options = CONFIGS[name]
    ours, stock = both(**options)
    tensors = conv_tensors(*shape, groups=options.get("groups", 1))
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    (y,) = compare(ours, stock, tensors, compiled, OPS)
    if not tensors["input"].is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)
        x = tensors["input"].requires_grad_()
        (grad,) = torch.autograd.grad(ours(**{**tensors, "input": x}).sum(), x)
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_weight_and_gradient(compiled):
    tensors = conv_tensors(2, 4, 9, 10, 8, 3)
    tensors["weight"] = tensors["weight"].contiguous(memory_format=torch.channels_last)
    ours, stock = both()
    grad = torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    compare(ours, stock, tensors, compiled, OPS, grad_outputs=[grad])


def test_unbatched(mode):
    tensors = conv_tensors(1, 3, 9, 10, 8, 3)
    tensors["input"] = tensors["input"][0]
    (y,) = compare(*both(), tensors, mode, OPS)
    assert y.dim() == 3


@pytest.mark.pure
@pytest.mark.parametrize("shape", [(0, 3, 9, 10, 8, 3)], ids=["no images"])
def test_zero_size_batch(mode, shape):
    result = compare(*both(), conv_tensors(*shape), mode, OPS)
    assert list(result[0].shape) == [0, 8, 3, 4]
