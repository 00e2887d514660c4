"""Activations and average pools of conv_pool against torch.nn: values, gradients, ties, NaN, inf."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from _oracle import (
    check_equal,
    compare,
    conv_tensors,
    running_on,
    stock_conv_pool2d,
    torch_alone,
    whole,
)

import cnnrnn_ext as cx
from cnnrnn_ext import reference

OPS = ["conv_pool2d"]
ACTIVATIONS = [a for a in reference.ACTIVATIONS if a not in ("none", "relu")]


def both(**options):
    """(ours, stock) with the same options."""
    ours = functools.partial(cx.functional.conv_pool2d, **options)
    return ours, functools.partial(stock_conv_pool2d, **options)


# name: (n, c, h, w, k, kernel), options. Each way that the kernels take.
MAX = {
    "in registers": ((2, 3, 13, 12, 17, 3), {}),
    "two in registers": ((2, 3, 11, 13, 9, 3), {"pool_size": (1, 2), "padding": 1}),
    "through the map": (
        (2, 3, 13, 12, 19, 3),
        {"pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    ),
    "groups": ((2, 6, 12, 11, 10, 5), {"groups": 2, "stride": 2, "padding": 2, "ceil_mode": True}),
    "winograd 2x2": ((2, 16, 13, 12, 12, 3), {"padding": 1, "ceil_mode": True}),
    "winograd 2x1": ((2, 17, 13, 12, 9, 3), {"padding": 1, "pool_size": (2, 1), "ceil_mode": True}),
    "winograd 1x2": ((2, 16, 9, 15, 11, 3), {"pool_size": (1, 2), "ceil_mode": True}),
    "winograd, no pool": ((2, 16, 13, 12, 12, 3), {"padding": 1, "pool": "none"}),
}
AVERAGE = {
    "one channel": ((3, 1, 28, 28, 6, 5), {"padding": 2}),
    "one channel, odd": ((2, 1, 13, 20, 9, 3), {"ceil_mode": True}),
    "one channel, 3/2 padded": (
        (2, 1, 14, 19, 9, (3, 4)),
        {"pool_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True},
    ),
    "one channel, gaps": ((2, 1, 15, 16, 5, 3), {"pool_size": (2, 1), "pool_stride": (3, 2)}),
    "winograd": ((2, 16, 13, 13, 12, 3), {"padding": 1}),
    "winograd, 3/1 padded": (
        (2, 16, 11, 14, 9, 3),
        {"pool_size": 3, "pool_stride": 1, "pool_padding": 1},
    ),
    "winograd, 3x2 ceil": (
        (2, 17, 12, 15, 12, 3),
        {"pool_size": (3, 2), "pool_stride": (2, 3), "pool_padding": (1, 1), "ceil_mode": True},
    ),
}
AVERAGE = {name: (shape, {**options, "pool": "avg"}) for name, (shape, options) in AVERAGE.items()}
CASES = MAX | AVERAGE


def laid_out(tensors, channels_last):
    if channels_last:
        tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    return tensors


def eighths(shape, options, dtype=torch.float32):
    """Operands exact before the activation in any order of summation, so that rounding decides no window."""
    tensors = conv_tensors(*shape, groups=options.get("groups", 1), dtype=dtype)
    return {k: (v * 12).round() / 8 for k, v in tensors.items()}


@pytest.mark.isa
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", CASES)
def test_against_torch(compiled, name, activation, channels_last):
    shape, options = CASES[name]
    tensors = laid_out(eighths(shape, options), channels_last)
    (y,) = compare(*both(activation=activation, **options), tensors, compiled, OPS)
    if channels_last and shape[1] > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "name", ["in registers", "through the map", "one channel, odd", "one channel, 3/2 padded"]
)
def test_float64(compiled, name, activation):
    shape, options = CASES[name]
    compare(*both(activation=activation, **options), eighths(shape, options, torch.float64), compiled, OPS)


@pytest.mark.parametrize("name", MAX)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_of_random_values(compiled, name, activation):
    """Outputs alone: where two positions are near to each other, rounding may choose either."""
    shape, options = MAX[name]
    tensors = conv_tensors(*shape, groups=options.get("groups", 1))
    tensors["weight"] *= 2
    compare(*both(activation=activation, **options), tensors, compiled, OPS, wanted=[])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_over_the_whole_range(compiled, activation):
    """One weight of 1: the activation alone, dense between -10 and 10 and thin beyond."""
    x = torch.cat([torch.linspace(-10, 10, 6000), torch.linspace(-100, 100, 400)]).view(1, 1, 1, -1)
    for options in ({"pool_size": 1}, {"pool": "avg", "pool_size": 1}):
        compare(*both(activation=activation, **options), {"input": x, "weight": torch.ones(1, 1, 1, 1)},
                compiled, OPS, wanted=["input"])  # fmt: skip


# ---- averages, exactly ----


@pytest.mark.isa
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("name", ["one channel", "one channel, gaps", "winograd"])
def test_averages_of_whole_numbers(compiled, name, activation, channels_last):
    """Divisors of 2 and 4 are exact: the same bits as torch's, gradients included."""
    shape, options = AVERAGE[name]
    ours, stock = both(activation=activation, **options)
    tensors = laid_out(whole(conv_tensors(*shape)), channels_last)
    grad = 4.0 * torch.randint(-3, 4, stock(**tensors).shape)
    check_equal(ours, stock, tensors, compiled, OPS, grad_outputs=[grad])


@pytest.mark.isa
@pytest.mark.parametrize("options", [{}, {"pool_size": 3, "pool_stride": 2, "pool_padding": 1}])
@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "silu"])
def test_average_of_special_values(compiled, activation, options):
    for value in (float("nan"), float("inf"), float("-inf")):
        for position in range(16):
            x = torch.randn(1, 1, 4, 4)
            x.view(-1)[position] = value
            tensors = {"input": x, "weight": torch.ones(1, 1, 1, 1)}
            compare(*both(pool="avg", activation=activation, **options), tensors, compiled, OPS, wanted=[],
                    few=True)  # fmt: skip


# ---- ties, flat ends, NaN ----

NUMBERS = (0.0, -0.0, 1.0, 7.0, 20.0, -1.0, -7.0, -30.0)
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, 6.0, -1.0, -40.0)


def check_as_torch(ours, stock, tensors, mode):
    """Values and the gradient of the input as torch's float32, NaN at the same places.

    The float64 oracle would not do: where float32 is flat it has another winner. A position that loses has no
    gradient here; torch multiplies its zero by the derivative, and that is NaN where the value is not finite.
    """
    results = []
    for function in (ours, stock):
        x = tensors["input"].clone().requires_grad_()
        with torch_alone():
            if function is ours:
                with running_on(mode, *OPS):
                    y = ours(**{**tensors, "input": x})
            else:
                y = stock(**{**tensors, "input": x})
            torch.manual_seed(7)
            (grad,) = torch.autograd.grad(y, x, torch.rand(y.shape) + 0.5)
        results.append((y, grad))
    (y, grad), (their_y, their_grad) = results
    lost = their_grad.isnan() & ~tensors["input"].isfinite() & (grad == 0)
    torch.testing.assert_close(y, their_y, rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad, their_grad.masked_fill(lost, 0), rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.isa
@pytest.mark.parametrize("values", [NUMBERS, SPECIAL], ids=["numbers", "special"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_window_of_special_values(mode, activation, values):
    """Each window of four of these. Where torch's argmax differs from ours, after an activation that is
    flat, no gradient tells them apart; gelu and silu must take torch's winner, which may be the least."""
    windows = torch.tensor(list(itertools.product(values, repeat=4)))
    # 8 channels: torch's vectors and its scalar rest disagree about NaN.
    tensors = {
        "input": windows.view(-1, 1, 2, 2).repeat(1, 8, 1, 1),
        "weight": torch.eye(8).view(8, 8, 1, 1),
    }
    if values is SPECIAL:  # 0 * inf of the other channels is NaN
        tensors = {"input": windows.view(-1, 1, 2, 2), "weight": torch.ones(1, 1, 1, 1)}
        tensors["input"] = tensors["input"][: len(windows) // 8 * 8]
    ours, stock = both(activation=activation)
    check_as_torch(ours, stock, tensors, mode)


@pytest.mark.isa
@pytest.mark.parametrize("pool_size", [(2, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_window_by_winograd(compiled, activation, pool_size):
    """The same numbers where the pool is in the inverse transform: whole numbers pass it exactly."""
    windows = torch.tensor(list(itertools.product(NUMBERS, repeat=4)))
    image = windows.view(64, 64, 2, 2).permute(0, 2, 1, 3).reshape(1, 1, 128, 128)
    weight = torch.zeros(16, 16, 3, 3)
    weight[range(16), range(16), 1, 1] = 1
    tensors = {"input": image.repeat(1, 16, 1, 1), "weight": weight}
    ours, stock = both(activation=activation, pool_size=pool_size, padding=1)
    check_as_torch(ours, stock, tensors, compiled)


@pytest.mark.isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_special_values_by_winograd(compiled, activation):
    """Images that are not finite go through the direct kernel, with what is kept for the backward."""
    tensors = {k: v / 4 for k, v in conv_tensors(3, 16, 12, 12, 8, 3).items()}
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors["input"][1, 3, 5, 6] = value
        with torch_alone():
            compare(*both(activation=activation), tensors, compiled, OPS, wanted=[])


@pytest.mark.isa
@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh"])
def test_all_negative_windows(mode, activation):
    """gelu and silu rise again to the left: the least value may win."""
    x = -torch.rand(2, 3, 9, 8) * 6
    tensors = {"input": x, "weight": torch.eye(3).view(3, 3, 1, 1)}
    compare(*both(activation=activation), tensors, mode, OPS, wanted=["input"])
    if activation != "tanh":
        ours, _ = both(activation=activation)
        y, least = ours(**tensors), -F.max_pool2d(-x, 2)
        assert (y == F.max_pool2d(reference.ACTIVATIONS[activation](x), 2)).float().mean() > 0.5
        assert torch.isclose(y, reference.ACTIVATIONS[activation](least)).float().mean() > 0.5


# ---- everything else a call can ask for ----


@pytest.mark.parametrize("activation", ["gelu", "elu"])
@pytest.mark.parametrize("name", ["through the map", "winograd 2x2", "one channel, odd", "winograd"])
def test_same_bits(compiled, name, activation):
    """At 1 and 2 threads, in training, and for an image alone."""
    shape, options = CASES[name]
    ours, _ = both(activation=activation, **options)
    tensors = conv_tensors(*shape)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ours(**tensors))
    assert torch.equal(*results)
    alone = ours(**{**tensors, "input": tensors["input"][1:2]})
    assert torch.equal(alone[0], results[0][1])
    tensors["weight"].requires_grad_()
    assert torch.equal(ours(**tensors).detach(), results[0])


@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize("name", ["in registers", "winograd"])
def test_second_derivative(compiled, name, activation):
    shape, options = CASES[name]
    tensors = eighths(shape, options)
    results = []
    outer = torch.randn_like(tensors["weight"])
    for function in both(activation=activation, **options):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        y = function(**leaves)
        grad_y = torch.ones_like(y).requires_grad_()
        (grad,) = torch.autograd.grad(y, leaves["weight"], grad_y, create_graph=True)
        results.append(torch.autograd.grad(grad, [grad_y, *leaves.values()], outer, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["in registers", "through the map", "winograd 2x2", *AVERAGE])
def test_no_images(compiled, name):
    (_, *shape), options = CASES[name]
    compare(*both(activation="gelu", **options), conv_tensors(0, *shape), compiled, OPS)


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_one_dimension(compiled, activation, pool):
    tensors = {"input": torch.randn(2, 1, 40), "weight": torch.randn(6, 1, 5), "bias": torch.randn(6)}
    tensors = {k: (v * 8).round() / 8 for k, v in tensors.items()}
    options = {"activation": activation, "pool": pool, "pool_size": 3, "pool_stride": 2, "ceil_mode": True}

    def stock(input, weight, bias):
        y = reference.ACTIVATIONS[activation](F.conv1d(input, weight, bias, 1, 2))
        if pool == "max":
            return F.max_pool1d(y, 3, 2, ceil_mode=True)
        return F.avg_pool1d(y, 3, 2, ceil_mode=True)

    compare(functools.partial(cx.functional.conv_pool1d, padding=2, **options), stock, tensors, compiled, OPS)


def test_reference_activations_are_torchs():
    """The reference itself, against torch.nn."""
    tensors = conv_tensors(2, 3, 9, 10, 5, 3)
    for activation in reference.ACTIVATIONS:
        for pool in ("max", "avg", "none"):
            options = {"activation": activation, "pool": pool}
            y, expected = reference.conv_pool2d(**tensors, **options), stock_conv_pool2d(**tensors, **options)
            assert torch.equal(y, expected)
