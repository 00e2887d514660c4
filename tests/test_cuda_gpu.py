"""The CUDA operators on a GPU, against plain PyTorch in float64 on the CPU. Skipped where there is no GPU."""

import _cuda_cases as cases
import pytest
import torch

from cnnrnn_ext import _library

pytestmark = pytest.mark.cuda

# Sizes of real networks, which the emulation is too slow for.
LARGE_CONVS = {
    "first_layer": cases.Conv((4, 3, 112, 112), 32),
    "deep": cases.Conv((2, 64, 57, 57), 64, channels_last=True),
    "many_channels": cases.Conv((2, 128, 28, 28), 130, padding=(0, 0)),
}
LARGE_RNNS = {
    "h128": cases.Rnn(16, 33, 100, 128, d=2),
    "h512": cases.Rnn(20, 17, 64, 512, d=2),
    "h650": cases.Rnn(5, 3, 70, 650),
    "lengths": cases.Rnn(40, 19, 30, 200, d=2, rows="lengths, reset"),
    "packed": cases.Rnn(40, 19, 30, 200, d=2, rows="packed, reset"),
}
CELLS = tuple(cases.GATES)


@pytest.fixture(scope="module")
def ops():
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible to torch")
    library = _library.libraries()["cuda"]
    if not library.loaded:
        pytest.skip(f"no CUDA library: {library.reason}")
    return torch.ops.cnnrnn_ext


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.CONVS.values(), ids=cases.CONVS)
def test_conv_pool_exact_on_integers(ops, case, dtype):
    cases.check_conv_exact(ops, "cuda", case, dtype)


@pytest.mark.parametrize("case", LARGE_CONVS.values(), ids=LARGE_CONVS)
def test_conv_pool_large(ops, case):
    """Integers whose every sum is exact in float32: equal at any summation order."""
    cases.check_conv_exact(ops, "cuda", case, torch.float32)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("pool", [(2, 2), (3, 3)], ids=["3x3 kernel", "general kernel"])
def test_conv_pool_nan_and_infinity(ops, activation, pool):
    cases.check_conv_nan(ops, "cuda", cases.Conv((2, 2, 13, 12), 3, activation=activation, pool=pool))


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", (cases.RNNS | LARGE_RNNS).values(), ids=cases.RNNS | LARGE_RNNS)
def test_rnn(ops, case, cell, dtype):
    cases.check_rnn(ops, "cuda", cell, case, dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", ["odd", "few_rows", "lengths"])
def test_rnn_missing_gradients(ops, case, cell):
    cases.check_rnn_parts(ops, "cuda", cell, cases.RNNS[case])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", ["odd", "few_rows", "many_rows"])
def test_rnn_without_states(ops, case, cell):
    cases.check_rnn_without_states(ops, "cuda", cell, cases.RNNS[case])


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", [cases.Rnn(1, 5, 4, 33), cases.Rnn(1, 300, 64, 256)], ids=["odd", "large"])
def test_cell(ops, case, cell, dtype):
    cases.check_cell(ops, "cuda", cell, case, dtype)


def _train_everything(ops):
    torch.manual_seed(0)
    conv, rnn = LARGE_CONVS["first_layer"], LARGE_RNNS["h512"]
    results = [*cases.run_conv(ops, "cuda", conv, torch.float32, *conv.draw(cases.normal))]
    for cell in CELLS:
        operands = cases._convert(rnn.draw(cell), "cuda", torch.float32)
        results += cases.rnn_train_and_backward(ops, cell, cases.WHOLE, operands)
    return results


def test_same_input_same_bits(ops):
    for a, b in zip(_train_everything(ops), _train_everything(ops), strict=True):
        assert torch.equal(a, b)


def test_current_stream(ops):
    """Kernels follow torch's current stream, and wait for what is enqueued on it before them."""
    case = cases.RNNS["odd"]
    x, *rest = cases._convert(case.draw("lstm"), "cuda", torch.float32)
    want = ops.rnn("lstm", x, *rest, *cases.WHOLE)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = ops.rnn("lstm", late, *rest, *cases.WHOLE)[0]
    stream.synchronize()
    assert torch.equal(got, want)


def test_no_host_synchronisation(ops):
    """Forward and backward can be captured in a graph, which a synchronisation would forbid."""
    case, conv = cases.RNNS["few_rows"], cases.CONVS["odd"]
    operands = cases._convert(case.draw("lstm"), "cuda", torch.float32)
    image, weight, bias, _ = (t.float().cuda() for t in conv.draw(cases.normal))

    def step():
        *results, reserve = ops.rnn_train("lstm", *operands, *cases.WHOLE)
        grads = cases.rnn_backward(ops, "lstm", cases.WHOLE, results, operands, results, reserve)
        y, code, _ = ops.conv_pool2d_train(image, weight, bias, *conv.arguments)
        return [results[0], grads[0], y, *ops.conv_pool2d_backward(
            y, image, weight, bias, code, None, *conv.arguments, True, True, True)]  # fmt: skip

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
