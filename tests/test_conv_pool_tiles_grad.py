"""Gradients of convolutions without a pool on tile registers: error, special values, same bits.

The kernels' own source is tested on any machine; the operator where the processor has the registers.
"""

import sys
from pathlib import Path

import pytest
import torch
from _kernel_program import run_kernel_program
from _oracle import (
    NAN_OF_ONES,
    check_equal,
    compare,
    conv_pool2d_functions,
    conv_tensors,
    expected_kernel,
    outputs_and_gradients,
    running_on,
    whole,
)

sys.path.append(str(Path(__file__).parents[1]))  # at the end: an installed cnnrnn_ext keeps its place

from benchmarks.memory import peak_bytes

OPS = ["conv_pool2d"]

# (n, c, h, w, k, kernel), options
CONFIGS = {
    "stride 2": ((2, 64, 33, 30, 70, 3), {"stride": 2, "padding": 1}),
    "stride uneven": ((3, 64, 17, 33, 40, 3), {"stride": (2, 1), "padding": (0, 1)}),
    "1x1": ((2, 64, 15, 17, 128, 1), {}),
    "1x1, stride 2": ((3, 65, 15, 17, 33, 1), {"stride": 2}),
    "4x4, stride 2": ((3, 35, 22, 20, 48, 4), {"stride": 2, "padding": 1}),
    "dilated": ((2, 64, 20, 19, 64, 3), {"dilation": 2, "padding": 2}),
    "row of text": ((2, 64, 1, 120, 64, (1, 5)), {}),
    "most taps": ((2, 33, 40, 37, 24, 8), {"stride": 4, "padding": 3}),
    "small maps": ((16, 64, 7, 7, 96, 3), {"padding": 1}),
    "smaller maps": ((33, 64, 4, 4, 72, 3), {"padding": 1}),
    "maps of one pixel": ((33, 64, 3, 3, 40, 3), {}),
    "many outputs": ((5, 32, 6, 5, 300, 2), {}),
    "batch in parts": ((25, 64, 28, 28, 64, 5), {"padding": 2}),
}
FEW_CHANNELS = {  # whose convolutions come here with a pool of one position
    "one channel, 1x1": ((2, 1, 6, 5, 33, 1), {}),
    "stem": ((2, 3, 40, 41, 17, 7), {"stride": 2, "padding": 3}),
    "more padding than input": ((2, 3, 4, 6, 5, 3), {"stride": (5, 4), "padding": (9, 12), "dilation": 2}),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def on_tiles(compiled):
    if expected_kernel() != "cpu/amx":
        pytest.skip("no tile registers")
    return compiled


def functions(**options):
    """(ours, stock)"""
    return conv_pool2d_functions(**{"pool": "none"} | options)


def tensors_of(shape, layout="NCHW", dtype=torch.float32):
    """Sixteenths: the outputs are exact, so that rounding decides for no ReLU whether it is alive."""
    tensors = {k: (v * 16).round() / 16 for k, v in conv_tensors(*shape, dtype=dtype).items()}
    tensors["input"] = tensors["input"].contiguous(memory_format=LAYOUTS[layout])
    return tensors


def gradients(options, tensors, grad, wanted=None):
    ours, _ = functions(**options)
    with running_on("compiled", *OPS):
        _, found, _ = outputs_and_gradients(ours, tensors, [grad], wanted)
    return found


def random_gradient(options, tensors):
    _, stock = functions(**options)
    return torch.randn_like(stock(**tensors))


def test_emulated_registers(compiled, tmp_path):
    """The kernels' own source on any machine, against plain loops and at the edges of memory."""
    defines = ["-DCNNRNN_EMULATE_512", "-DCNNRNN_EMULATE_AMX"]
    vector, checks = run_kernel_program("conv_pool_tiles_grad", tmp_path, defines)
    assert vector == 64
    assert checks > 10**5


@layouts
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("name", CONFIGS)
def test_error(on_tiles, name, activation, layout):
    shape, options = CONFIGS[name]
    compare(*functions(activation=activation, **options), tensors_of(shape, layout), on_tiles, OPS)


@pytest.mark.parametrize("shape", [(128, 32, 56, 56, 32, 1), (1, 32, 700, 700, 32, 1)], ids=str)
def test_error_of_long_sums(on_tiles, shape):
    """Over 400,000 pixels: it does not grow as that of one long sum would."""
    compare(*functions(activation="none"), conv_tensors(*shape), on_tiles, OPS, wanted=["weight", "bias"])


@layouts
@pytest.mark.parametrize("name", CONFIGS | FEW_CHANNELS)
def test_whole_numbers_are_exact(on_tiles, name, layout):
    shape, options = (CONFIGS | FEW_CHANNELS)[name]
    ours, stock = functions(**options | {"pool": "max", "pool_size": 1})
    tensors = whole(tensors_of(shape, layout))
    tensors["input"] = tensors["input"].contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randint(-3, 4, stock(**tensors).shape).float()
    check_equal(ours, stock, tensors, on_tiles, OPS, grad_outputs=[grad])


@layouts
@pytest.mark.parametrize("activation", ["gelu", "tanh", "sigmoid"])
@pytest.mark.parametrize("name", ["stride 2", "small maps"])
def test_other_activations(on_tiles, name, activation, layout):
    """Their derivatives come from what the forward pass kept."""
    shape, options = CONFIGS[name]
    compare(*functions(activation=activation, **options), tensors_of(shape, layout), on_tiles, OPS)


@layouts
@pytest.mark.parametrize("activation", ["relu", "none", "gelu"])
@pytest.mark.parametrize("name", ["stride 2", "1x1", "small maps"])
def test_average_pools(on_tiles, name, activation, layout):
    shape, options = CONFIGS[name]
    options = options | {"pool": "avg", "pool_size": 3, "pool_stride": 2}
    compare(*functions(activation=activation, **options), tensors_of(shape, layout), on_tiles, OPS)


@pytest.mark.parametrize("wanted", [["input"], ["weight"], ["bias"], ["input", "bias"]], ids="-".join)
@pytest.mark.parametrize("name", ["stride 2", "batch in parts"])
def test_some_gradients_alone(on_tiles, name, wanted):
    """The same bits as with all of them."""
    shape, options = CONFIGS[name]
    tensors = tensors_of(shape)
    grad = random_gradient(options, tensors)
    every, some = gradients(options, tensors, grad), gradients(options, tensors, grad, wanted)
    for key in wanted:
        assert torch.equal(some[key], every[key])


def test_without_a_bias(on_tiles):
    shape, options = CONFIGS["stride 2"]
    tensors = tensors_of(shape)
    del tensors["bias"]
    compare(*functions(**options), tensors, on_tiles, OPS)


@pytest.mark.parametrize("name", ["stride 2", "small maps"])
def test_no_images(on_tiles, name):
    (_, *shape), options = CONFIGS[name]
    compare(*functions(**options), tensors_of((0, *shape)), on_tiles, OPS)


@pytest.mark.parametrize("where", ["input", "weight", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), NAN_OF_ONES, float("inf"), float("-inf"), 5e37])
@pytest.mark.parametrize("name", ["stride 2", "1x1", "small maps", "maps of one pixel"])
def test_what_has_no_parts(on_tiles, name, value, where):
    """Gradients that are not finite come from the direct kernels."""
    shape, options = CONFIGS[name]
    ours, stock = functions(**options | {"padding": 0, "activation": "none"})
    tensors = {k: v.abs() / 16 for k, v in tensors_of(shape).items()}
    grad = torch.rand_like(stock(**tensors)) / 64
    {**tensors, "gradient": grad}[where][1, 2, 0, 0] = value
    compare(ours, stock, tensors, on_tiles, OPS, grad_outputs=[grad])


def test_what_passes_no_gradient_may_be_anything(on_tiles):
    """The gradient of an output that ReLU has cut is not read as a number."""
    shape, options = CONFIGS["stride 2"]
    tensors = tensors_of(shape)
    grad = random_gradient(options, tensors)
    dead = functions(**options)[1](**tensors) == 0
    before = gradients(options, tensors, grad)
    after = gradients(options, tensors, grad.masked_fill(dead, float("nan")))
    for name, expected in before.items():
        assert torch.equal(after[name], expected)


@layouts
@pytest.mark.parametrize("name", CONFIGS)
def test_an_image_alone_has_the_same_gradient(on_tiles, name, layout):
    """To the bit, anywhere in the batch."""
    shape, options = CONFIGS[name]
    tensors = tensors_of(shape, layout)
    grad = random_gradient(options, tensors)
    together = gradients(options, tensors, grad)["input"]
    for i in {0, 1, shape[0] // 2, shape[0] - 1}:
        image = slice(i, i + 1)
        alone = gradients(options, tensors | {"input": tensors["input"][image]}, grad[image])["input"]
        assert torch.equal(alone, together[image])


@pytest.mark.parametrize("name", CONFIGS)
def test_threads_change_nothing(on_tiles, name):
    shape, options = CONFIGS[name]
    tensors = tensors_of(shape)
    grad = random_gradient(options, tensors)
    found = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        found.append(gradients(options, tensors, grad))
    for other in found[1:]:
        for key, expected in found[0].items():
            assert torch.equal(other[key], expected), key


def test_padding_larger_than_the_input_is_not_copied(on_tiles):
    """Not once for all channels; the direct kernels copy it for a few."""
    tensors = conv_tensors(1, 256, 8, 8, 8, 3)
    x, weight = tensors["input"], tensors["weight"].requires_grad_()
    ours, _ = functions(stride=16, padding=200)
    y = ours(x, weight)
    grad = torch.randn_like(y)
    assert peak_bytes(lambda: torch.autograd.grad(y, weight, grad, retain_graph=True)) < 2**23


def test_float64(on_tiles):
    """By the direct kernels."""
    shape, options = CONFIGS["stride 2"]
    options = options | {"pool": "max", "pool_size": 1}
    compare(*functions(**options), tensors_of(shape, dtype=torch.float64), on_tiles, OPS)
