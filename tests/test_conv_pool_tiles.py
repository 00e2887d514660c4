"""Convolutions of the sizes that tile registers are for, in float32 and bfloat16.

Where a machine has no tile registers they run on the other kernels.
"""

import itertools

import pytest
import torch
from _kernel_program import run_kernel_program
from _oracle import (
    NAN_OF_ONES,
    check_equal,
    check_error,
    compare,
    conv_pool2d_functions,
    conv_tensors,
    expected_kernel,
    stock_conv_pool2d,
    whole,
)

import cnnrnn_ext as cx
from cnnrnn_ext._operator_conv_pool import has_tiles

OPS = ["conv_pool2d"]

# (n, c, h, w, k, kernel), options
CONFIGS = {
    "5x5": ((2, 32, 20, 20, 64, 5), {"padding": 2}),
    "5x5, odd": ((3, 35, 13, 21, 33, 5), {"padding": 2, "pool_size": 3, "pool_stride": 2}),
    "1x1": ((2, 64, 15, 17, 128, 1), {}),
    "stride 2": ((2, 64, 33, 30, 64, 3), {"stride": 2, "padding": 1}),
    "stride uneven": ((2, 64, 17, 33, 40, 3), {"stride": (2, 1), "padding": (0, 1)}),
    "dilated": ((2, 64, 20, 19, 64, 3), {"dilation": 2, "padding": 2}),
    "pool 3/2/1": (
        (2, 64, 21, 22, 64, 3),
        {"padding": 1, "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    ),
    "pool 1x3, ceil": ((1, 64, 9, 40, 48, (3, 5)), {"pool_size": (1, 3), "ceil_mode": True}),
    "row of text": ((2, 64, 1, 120, 64, (1, 5)), {"pool_size": (1, 2)}),
    "many strips": ((1, 32, 150, 60, 48, 5), {"padding": 2}),
    "gelu": ((2, 32, 20, 20, 64, 5), {"padding": 2, "activation": "gelu"}),
    "tanh": ((2, 32, 20, 20, 64, 5), {"padding": 2, "activation": "tanh"}),
    "no activation": ((2, 32, 20, 20, 64, 5), {"padding": 2, "activation": "none"}),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def tensors_of(shape, layout="NCHW", dtype=torch.float32):
    tensors = {name: t.to(dtype) for name, t in conv_tensors(*shape).items()}
    tensors["input"] = tensors["input"].contiguous(memory_format=LAYOUTS[layout])
    return tensors


def test_emulated_registers(compiled, tmp_path):
    """The kernels' own source on any machine, against plain loops and at the edges of memory."""
    defines = ["-DCNNRNN_EMULATE_512", "-DCNNRNN_EMULATE_AMX"]
    vector, checks = run_kernel_program("conv_pool_tiles", tmp_path, defines)
    assert vector == 64
    assert checks > 10**5


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_against_torch(compiled, name, layout):
    shape, options = CONFIGS[name]
    (y,) = compare(*conv_pool2d_functions(**options), tensors_of(shape, layout), "compiled", OPS)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.isa
@pytest.mark.parametrize("name", ["5x5, odd", "stride 2", "row of text"])
def test_whole_numbers_are_exact(compiled, name):
    shape, options = CONFIGS[name]
    check_equal(*conv_pool2d_functions(**options), whole(tensors_of(shape)), "compiled", OPS, wanted=[])


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_inference_without_a_pool(compiled, name, layout):
    """Composes where there are no tile registers."""
    shape, options = CONFIGS[name]
    options = {k: v for k, v in options.items() if not k.startswith(("pool", "ceil"))} | {"pool": "none"}
    mode = "compiled" if expected_kernel() == "cpu/amx" else "reference"
    compare(*conv_pool2d_functions(**options), tensors_of(shape, layout), mode, OPS, wanted=[])


@pytest.mark.isa
@pytest.mark.parametrize("value", [float("nan"), NAN_OF_ONES, float("inf"), float("-inf"), 3.4e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["5x5", "stride 2", "1x1"])
def test_what_has_no_parts(compiled, name, dtype, value):
    """One such value shows where torch has it, and in no other image."""
    shape, options = CONFIGS[name]
    ours, stock = conv_pool2d_functions(**options)
    tensors = tensors_of(shape, dtype=dtype)
    tensors["weight"][0] = 0
    alone = ours(**tensors | {"input": tensors["input"][:1]})
    tensors["input"][1, 3, 5, 6] = value
    with cx.backend("compiled"):
        y = ours(**tensors)
    exact = stock(**{k: v.double() for k, v in tensors.items()})
    if abs(value) == float("inf") or value != value:
        assert torch.equal(y.isnan(), exact.isnan())
        assert torch.equal(y == float("inf"), exact == float("inf"))
    else:
        # Times the weights it stays finite or overflows as the product itself does.
        limit = torch.finfo(dtype).max
        assert torch.equal(y.isinf() | (y.abs() > 0.9 * limit), exact.abs() > 0.9 * limit)
    assert torch.equal(y[:1], alone)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_position_and_repetition_change_nothing(compiled, dtype):
    shape, options = CONFIGS["5x5"]
    ours, _ = conv_pool2d_functions(**options)
    tensors = tensors_of((9, *shape[1:]), dtype=dtype)
    with cx.backend("compiled"):
        together = ours(**tensors)
        assert torch.equal(together, ours(**tensors))
        for i in (0, 4, 8):
            assert torch.equal(together[i : i + 1], ours(**tensors | {"input": tensors["input"][i : i + 1]}))


# ---- many images of small maps ----

# (c, h, w, k, kernel), options
SMALL_MAPS = {
    "4x4": ((64, 4, 4, 48, 3), {"padding": 1, "pool": "none"}),
    "7x7, pool": ((96, 7, 7, 33, 3), {"padding": 1}),
    "7x7, gelu": ((32, 7, 7, 64, 3), {"padding": 1, "activation": "gelu"}),
    "9x9, unpadded": ((64, 9, 9, 64, 3), {"pool": "none", "activation": "none"}),
    "stride 2": ((64, 9, 8, 40, 3), {"stride": 2, "padding": 1, "pool": "none"}),
    "dilated": ((32, 5, 6, 20, 3), {"dilation": 2, "padding": 2, "pool_size": 2, "pool_stride": 1}),
    "2x2": ((256, 2, 2, 64, 3), {"padding": 1, "pool": "none"}),
    "1x1": ((256, 1, 1, 64, 3), {"padding": 1, "pool": "none"}),
    "more padding than kernel": ((64, 3, 3, 32, 2), {"padding": 3, "pool": "none"}),
}


def check_alone(ours, tensors):
    """By our kernels an image alone gives the bits that it has in the batch. Returns the batch's outputs."""
    with cx.trace() as log:
        together = ours(**tensors)
    if log[0].backend == "reference":  # torch's kernels promise no bits
        assert not has_tiles()
        return together
    integers = torch.int32 if together.dtype == torch.float32 else torch.int16
    for i, y in enumerate(together):
        alone = ours(**tensors | {"input": tensors["input"][i : i + 1]})
        assert torch.equal(alone[0].view(integers), y.view(integers))
    return together


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL_MAPS)
def test_small_maps_of_many_images(compiled, name, dtype, layout):
    """Where images share tiles, what meets padding is left out: no bit tells."""
    shape, options = SMALL_MAPS[name]
    ours, stock = conv_pool2d_functions(**options)
    tensors = tensors_of((35, *shape), layout, dtype)
    tensors["input"][3] = 0
    tensors["bias"][:2] = torch.tensor([-0.0, 0.0])
    y = check_alone(ours, tensors)
    check_error("output", y, stock(**tensors), stock(**{k: v.double() for k, v in tensors.items()}))


@pytest.mark.isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
@pytest.mark.parametrize("tap", [0, 1, -1])
@pytest.mark.parametrize("name", ["4x4", "2x2", "1x1", "more padding than kernel"])
def test_weights_without_parts_in_small_maps(compiled, name, tap, value):
    """A weight that some pixels, or all, would multiply by padding."""
    shape, options = SMALL_MAPS[name]
    ours, _ = conv_pool2d_functions(**options)
    tensors = tensors_of((16, *shape))
    tensors["weight"][1, 2].view(-1)[tap] = value
    check_alone(ours, tensors)


# ---- bfloat16 ----

FEW_CHANNELS = {
    "first layer": ((2, 3, 21, 20, 32, 3), {"padding": 1}),
    "stem": ((1, 3, 40, 41, 64, 7), {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2}),
    "one channel": ((2, 1, 28, 28, 32, 3), {}),
    "groups": ((2, 8, 12, 12, 12, 3), {"groups": 2}),
    "3x3": ((2, 64, 14, 14, 70, 3), {"padding": 1}),
}
BFLOAT16 = CONFIGS | FEW_CHANNELS


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_inference(compiled, name, layout):
    """Rounded once: the error is at most half a unit of the last place and what float32 adds."""
    shape, options = BFLOAT16[name]
    tensors = tensors_of(shape, layout, torch.bfloat16)
    if options.get("groups"):
        tensors["weight"] = tensors["weight"][:, : shape[1] // options["groups"]]
    ours, stock = conv_pool2d_functions(**options)
    with cx.backend("compiled"), cx.trace() as log:
        y = ours(**tensors)
    assert [call.kernel for call in log] == [expected_kernel()]
    exact = stock(**{k: v.double() for k, v in tensors.items()})
    assert y.dtype == torch.bfloat16
    # One channel lies the same way in both layouts.
    assert y.is_contiguous(memory_format=LAYOUTS["NCHW" if shape[1] == 1 else layout])
    check_error("output", y, stock(**tensors), exact)
    unit = torch.finfo(torch.bfloat16).eps
    assert ((y.double() - exact).abs() <= 0.51 * unit * exact.abs() + 1e-5 * exact.abs().max()).all()


@pytest.mark.isa
@pytest.mark.parametrize("name", ["first layer", "5x5", "gelu", "tanh"])
def test_bfloat16_gradients(compiled, name):
    """On tile registers torch's own; elsewhere the kernels', by way of float32."""
    shape, options = BFLOAT16[name]
    tensors = whole(tensors_of(shape, dtype=torch.bfloat16), -1, 2)
    mode = "reference" if expected_kernel() == "cpu/amx" else "compiled"
    compare(*conv_pool2d_functions(**options), tensors, mode, OPS)


@pytest.mark.parametrize(("train", "pool"), [*itertools.product([False, True], ["max", "none"])])
def test_autocast(mode, train, pool):
    """As torch's own convolution under autocast: bfloat16 out, gradients in float32."""
    shape, _ = CONFIGS["5x5"]
    tensors = conv_tensors(*shape)
    for t in tensors.values():
        t.requires_grad_(train)
    ours, _ = conv_pool2d_functions(padding=2, pool=pool)
    with cx.backend("auto" if mode == "compiled" else mode), torch.autocast("cpu", torch.bfloat16):
        y = ours(**tensors)
    assert y.dtype == torch.bfloat16
    exact = stock_conv_pool2d(**{k: v.double() for k, v in tensors.items()}, padding=2, pool=pool)
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item())
    if train:
        y.float().sum().backward()
        assert {t.grad.dtype for t in tensors.values()} == {torch.float32}
