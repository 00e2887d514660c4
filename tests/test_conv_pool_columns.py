"""First layers: convolutions of few channels whose pixels are columns of tiles, on tile registers.

Elsewhere they run on the direct kernels.
"""

import pytest
import torch
from _kernel_program import run_kernel_program
from _oracle import check_equal, compare, conv_pool2d_functions, conv_tensors, whole

import cnnrnn_ext as cx

OPS = ["conv_pool2d"]

# (n, c, h, w, k, kernel), options; each large enough for csrc/conv_pool_tiles.h to choose them
CONFIGS = {
    "VGG": ((2, 3, 64, 64, 64, 3), {"padding": 1}),
    "ResNet": (
        (2, 3, 112, 124, 64, 7),
        {"stride": 2, "padding": 3, "pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    ),
    "one channel": ((2, 1, 66, 130, 32, 3), {}),
    "odd": (
        (3, 5, 61, 93, 47, 5),
        {"padding": 2, "pool_size": (3, 2), "pool_stride": (2, 3), "ceil_mode": True},
    ),
    "waveform": ((2, 1, 1, 30000, 80, (1, 251)), {"stride": (1, 10), "pool_size": (1, 3)}),
    "long and low": (
        (2, 2, 3, 9000, 33, (2, 9)),
        {"pool_size": (2, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)},
    ),
    "tanh": ((2, 3, 64, 64, 64, 3), {"padding": 1, "activation": "tanh"}),
    "no activation": ((2, 4, 60, 61, 40, (4, 3)), {"dilation": (1, 2), "activation": "none"}),
    "windows of one": ((2, 3, 40, 64, 32, 5), {"stride": (1, 2), "padding": 2, "pool_size": 1}),
}


def test_emulated_registers(compiled, tmp_path):
    """The kernels' own source on any machine, against plain loops and at the edges of memory."""
    defines = ["-DCNNRNN_EMULATE_512", "-DCNNRNN_EMULATE_AMX"]
    vector, checks = run_kernel_program("conv_pool_columns", tmp_path, defines)
    assert vector == 64
    assert checks > 10**6


@pytest.mark.isa
@pytest.mark.parametrize("name", CONFIGS)
def test_against_torch(compiled, name):
    shape, options = CONFIGS[name]
    compare(*conv_pool2d_functions(**options), conv_tensors(*shape), "compiled", OPS)


@pytest.mark.isa
@pytest.mark.parametrize("name", ["VGG", "ResNet", "odd", "waveform"])
def test_whole_numbers_are_exact(compiled, name):
    shape, options = CONFIGS[name]
    check_equal(*conv_pool2d_functions(**options), whole(conv_tensors(*shape)), "compiled", OPS, wanted=[])


@pytest.mark.isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["VGG", "ResNet", "waveform"])
def test_what_has_no_parts(compiled, name, value):
    """One such value shows where torch has it, and in no other image."""
    shape, options = CONFIGS[name]
    ours, stock = conv_pool2d_functions(**options)
    tensors = conv_tensors(*shape)
    alone = ours(**tensors | {"input": tensors["input"][:1]})
    tensors["input"][1, 0, 0, 21] = value
    with cx.backend("compiled"):
        y = ours(**tensors)
    exact = stock(**{k: v.double() for k, v in tensors.items()})
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y == float("inf"), exact == float("inf"))
    assert torch.equal(y[:1], alone)


@pytest.mark.isa
@pytest.mark.parametrize("name", ["VGG", "ResNet", "long and low"])
def test_batch_threads_and_training_change_nothing(compiled, name):
    shape, options = CONFIGS[name]
    ours, _ = conv_pool2d_functions(**options)
    tensors = conv_tensors(5, *shape[1:])
    threads = torch.get_num_threads()
    try:
        with cx.backend("compiled"):
            together = ours(**tensors)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(together, ours(**tensors))
                for i in (0, 4):
                    alone = ours(**tensors | {"input": tensors["input"][i : i + 1]})
                    assert torch.equal(together[i : i + 1], alone)
            trained = ours(**tensors | {"weight": tensors["weight"].clone().requires_grad_()})
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, trained.detach())
