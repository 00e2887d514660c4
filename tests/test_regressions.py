"""Cases that once gave a wrong result, by what was special about them."""

import pytest
import torch

import cnnrnn_ext as cx

PARAMETERS = ("x", "weight", "bias")


def _compare(x_size, weight_size, **options):
    """Outputs and all gradients against torch in float64; asserts that the compiled kernel ran."""
    generator = torch.Generator().manual_seed(0)
    operands = [
        torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in (x_size, weight_size, weight_size[:1])
    ]
    with cx.trace() as log, cx.backend("compiled"):
        y = cx.functional.conv_pool2d(*operands, **options)
    assert [call.backend for call in log] == ["compiled"]
    expected = cx.reference.conv_pool2d(*operands, **options)
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad(y, operands, grad_y)
    for name, grad, wanted in zip(
        PARAMETERS, grads, torch.autograd.grad(expected, operands, grad_y), strict=True
    ):
        torch.testing.assert_close(grad, wanted, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.isa
@pytest.mark.parametrize("width", [700, 2100])
def test_several_strips_begin_in_the_pools_padding(compiled, width):
    """A map so wide that a strip is one pooled row: the first strips all start at convolution row 0."""
    torch.set_num_threads(1)  # one thread meets them one after another
    _compare((1, 2, 12, width), (3, 2, 3, 3), pool_size=7, pool_stride=1, pool_padding=3)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_stride": 2**31 - 1},
        {"pool_stride": 2**31 - 1, "stride": 2**31 - 1, "pool_size": 1},
        {"stride": 2**31 - 1, "pool_padding": 1},
    ],
)
def test_strides_that_nothing_depends_on_may_be_huge(compiled, options):
    _compare((1, 4, 8, 8), (4, 4, 3, 3), **options)


@pytest.mark.parametrize(
    ("stride", "padding", "pool_size"), [(2**31 - 1, 2**31 - 1, 2), (2**30, 2**30, 1), (1, 2**31 - 1, 2)]
)
def test_sizes_beyond_the_kernels_raise(compiled, stride, padding, pool_size):
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)
    for operator in (torch.ops.cnnrnn_ext.conv_pool2d, torch.ops.cnnrnn_ext.conv_pool2d_train):
        with pytest.raises(RuntimeError, match="too large for the CPU kernels"):
            operator(
                x, weight, None, [stride] * 2, [padding] * 2, [1, 1], 1, "relu", "max",
                [pool_size] * 2, [pool_size] * 2, [0, 0], False,
            )  # fmt: skip


@pytest.mark.parametrize("module", [cx.ConvPool2d(1, 2, 3), cx.LSTM(8, 3), cx.LSTMCell(8, 3)], ids=repr)
def test_function_transforms_run_on_the_reference(module):
    """torch.func's gradient of each sample against plain autograd of each sample."""
    sizes = {"ConvPool2d": (1, 1, 8, 8), "LSTM": (4, 1, 8), "LSTMCell": (1, 8)}
    samples = torch.randn(3, *sizes[type(module).__name__])
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, sample):
        out = torch.func.functional_call(module, parameters, (sample,))
        return (out if isinstance(out, torch.Tensor) else out[0]).square().sum()

    with cx.trace() as log:
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    assert [(call.backend, call.reason) for call in log] == [
        ("reference", "no kernel for the transforms of torch.func")
    ]
    for index, sample in enumerate(samples):
        wanted = torch.autograd.grad(loss(dict(module.named_parameters()), sample), module.parameters())
        for name, expected in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(grads[name][index], expected)


def test_a_padding_larger_than_the_input_runs_on_the_reference():
    """The kernels copy x with its padding: this one would take gigabytes."""
    x, weight = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
    options = {"padding": 2000, "dilation": 2000}
    with cx.trace() as log:
        y = cx.functional.conv_pool2d(x, weight, **options)
    assert [(call.backend, call.reason) for call in log] == [
        ("reference", "no kernel for a padding of 256 more than the input")
    ]
    torch.testing.assert_close(y, cx.reference.conv_pool2d(x, weight, **options))


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_an_image_without_pixels_raises_as_in_torch(mode):
    x, weight = torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, 3, 3)
    with pytest.raises(RuntimeError):
        torch.nn.functional.conv2d(x, weight, padding=2)
    with cx.backend(mode), pytest.raises(RuntimeError, match="input: expected a non-zero height and width"):
        cx.functional.conv_pool2d(x, weight, padding=2)
    with pytest.raises(RuntimeError, match="non-zero"):
        torch.ops.cnnrnn_ext.conv_pool2d(
            x, weight, None, [1, 1], [2, 2], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False
        )


def test_a_state_of_three_tensors_is_refused():
    x, state = torch.zeros(2, 3, 4), torch.zeros(1, 3, 5)
    with pytest.raises(RuntimeError, match="hx: expected two states"):
        cx.LSTM(4, 5)(x, (state, state, state))
