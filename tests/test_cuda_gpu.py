"""The CUDA operators on a GPU, against plain PyTorch in float64 on the CPU. Skipped where there is no GPU."""

import copy
from dataclasses import replace

import _cuda_cases as cases
import pytest
import torch

import cnnrnn_ext as cx

pytestmark = pytest.mark.cuda

# Sizes of real networks, which the emulation is too slow for.
LARGE_CONVS = {
    "first_layer": cases.Conv((4, 3, 112, 112), 32),
    "deep": cases.Conv((2, 64, 57, 57), 64, channels_last=True),
    "many_channels": cases.Conv((2, 128, 28, 28), 130, padding=(0, 0)),
    "two_channels": cases.Conv((3, 2, 61, 70), 70, channels_last=True),
}
# Convolutions that the tensor cores gather.
LARGE_GATHERED = {
    "resnet_stem": cases.Conv((4, 3, 112, 112), 64, (7, 7), (2, 2), (3, 3), pool=(3, 3), pool_padding=(1, 1)),
    "strided": cases.Conv((2, 64, 57, 56), 130, (3, 3), (2, 2), channels_last=True),
    "pointwise": cases.Conv((2, 128, 28, 28), 96, (1, 1), padding=(0, 0), pool=(1, 1), pool_stride=(1, 1)),
    "sequences": cases.Conv((16, 60, 1, 500), 60, (1, 5), padding=(0, 0), pool=(1, 3), pool_stride=(1, 3)),
    "groups": cases.Conv((2, 96, 30, 31), 64, (5, 5), padding=(2, 2), groups=4, pool=(3, 3)),
}


@pytest.fixture
def ops(on_gpu):
    return on_gpu


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CONVS.values(), ids=cases.CONVS)
def test_conv_pool_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cuda", case, dtype)


@pytest.mark.parametrize("case", LARGE_CONVS.values(), ids=LARGE_CONVS)
def test_conv_pool_large(ops, case):
    """Integers whose every sum is exact in float32: equal at any summation order."""
    cases.check_conv_exact(ops, "cuda", case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "case", (cases.GATHERED_CONVS | LARGE_GATHERED).values(), ids=cases.GATHERED_CONVS | LARGE_GATHERED
)
def test_conv_pool_direct_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cuda", case, dtype)


TENSOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # the last as TF32


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", (cases.TENSOR_CONVS | LARGE_CONVS).values(), ids=cases.TENSOR_CONVS | LARGE_CONVS
)
def test_conv_pool_tensor_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cuda", case, dtype, "high")


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", (cases.GATHERED_CONVS | LARGE_GATHERED).values(), ids=cases.GATHERED_CONVS | LARGE_GATHERED
)
def test_conv_pool_gathered_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cuda", case, dtype, "high")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [cases.TENSOR_CONVS["chunks"], LARGE_CONVS["deep"]], ids=["chunks", "deep"])
def test_sparse_weight_gradient_is_exact_on_integers(ops, monkeypatch, case, dtype):
    monkeypatch.setenv("CNNRNN_SPARSE_GRAD_WEIGHT", "1")
    cases.check_conv_exact(ops, "cuda", case, dtype)


@pytest.mark.parametrize("dtype", TENSOR_DTYPES, ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("channels", [3, 9])
def test_conv_pool_tensor_activations(ops, channels, activation, dtype):
    case = cases.Conv((2, channels, 19, 22), 40, activation=activation)
    cases.check_conv_activation(ops, "cuda", case, dtype, "high")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_conv_pool_tensor_nan_and_infinity(ops, channels):
    cases.check_conv_nan(ops, "cuda", cases.Conv((2, channels, 13, 12), 3), torch.float16)


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("case", cases.ACTIVATED.values(), ids=cases.ACTIVATED)
def test_conv_pool_activations(ops, case, activation, dtype):
    cases.check_conv_activation(ops, "cuda", replace(case, activation=activation), dtype)


@pytest.mark.parametrize("activation", ["none", "relu", *cases.ACTIVATIONS])
@pytest.mark.parametrize("case", [n for n, case in cases.ACTIVATED.items() if case.kind == "max"])
def test_conv_pool_indices(ops, case, activation):
    cases.check_conv_indices(ops, "cuda", replace(cases.ACTIVATED[case], activation=activation))


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("pool", [(2, 2), (3, 3)], ids=["3x3 kernel", "general kernel"])
def test_conv_pool_nan_and_infinity(ops, activation, pool):
    cases.check_conv_nan(ops, "cuda", cases.Conv((2, 2, 13, 12), 3, activation=activation, pool=pool))


def _train_everything(ops):
    torch.manual_seed(0)
    results = []
    for dtype in (torch.float32, torch.float16):
        for which in (*LARGE_CONVS.values(), *LARGE_GATHERED.values()):
            for precision in ("highest", "high"):
                results += cases.run_conv(ops, "cuda", which, dtype, *which.draw(cases.normal), precision)
    return results


def test_same_input_same_bits(ops):
    for a, b in zip(_train_everything(ops), _train_everything(ops), strict=True):
        assert torch.equal(a, b)


# (case, dtype, precision): the direct kernels, tensor cores on 3x3, gathered, few channels, several classes.
CONVOLVED = {
    "direct, any kernel": (cases.GATHERED_CONVS["stem"], torch.float32, "highest"),
    "direct": (cases.CONVS["odd"], torch.float32, "highest"),
    "tensor": (cases.CONVS["odd"], torch.float16, "highest"),
    "tf32": (cases.CONVS["odd"], torch.float32, "high"),
    "gathered": (cases.GATHERED_CONVS["overlapping"], torch.bfloat16, "highest"),
    "few": (cases.GATHERED_CONVS["stem"], torch.float16, "highest"),
    "strided": (cases.GATHERED_CONVS["five_strided"], torch.float32, "high"),
    "average": (cases.GATHERED_CONVS["average"], torch.float16, "highest"),
}


@pytest.mark.parametrize(("case", "dtype", "precision"), CONVOLVED.values(), ids=CONVOLVED)
def test_graph_capture_of_conv_pool(ops, case, dtype, precision):
    drawn = [None if t is None else t.to("cuda", dtype) for t in case.draw(cases.normal)]

    def step():
        return list(cases.run_conv(ops, "cuda", case, dtype, *drawn, precision, check=False))

    for a, b in zip(*cases.captured(step), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("case", "dtype", "precision"), CONVOLVED.values(), ids=CONVOLVED)
def test_current_stream_of_conv_pool(ops, case, dtype, precision):
    """Forward and backward follow torch's current stream: what is enqueued before them is waited for."""
    drawn = [None if t is None else t.to("cuda", dtype) for t in case.draw(cases.normal)]
    want = cases.run_conv(ops, "cuda", case, dtype, *drawn, precision, check=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(drawn[0])
        torch.cuda._sleep(50_000_000)
        late.copy_(drawn[0])
        got = cases.run_conv(ops, "cuda", case, dtype, late, *drawn[1:], precision, check=False)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("case", "dtype", "precision"), CONVOLVED.values(), ids=CONVOLVED)
def test_several_streams_at_once_of_conv_pool(ops, case, dtype, precision):
    calls = [[None if t is None else t.to("cuda", dtype) for t in case.draw(cases.normal)] for _ in range(4)]

    def run(drawn):
        return cases.run_conv(ops, "cuda", case, dtype, *drawn, precision, check=False)

    cases.check_several_streams(run, calls)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize(("kernel", "pool"), [(3, "max"), (3, "avg"), (5, "max")])
def test_cpu_gpu_parity_of_conv_pool(ops, kernel, pool, layout):
    """A module of float64: the output and every gradient, to rounding."""
    torch.manual_seed(0)
    module = cx.ConvPool2d(5, 9, kernel, padding=1, activation="silu", pool=pool, dtype=torch.float64)
    x = torch.randn(3, 5, 17, 14, dtype=torch.float64).to(memory_format=layout)

    def run(device):
        here, on = copy.deepcopy(module).to(device), x.to(device).requires_grad_()
        with cx.trace() as log:
            output = here(on)
        output.square().sum().backward()
        return [t.cpu() for t in (output, on.grad, *(p.grad for p in here.parameters()))], log[0].backend

    (on_cpu, _), (on_gpu, backend) = run("cpu"), run("cuda")
    assert backend == "compiled"
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
