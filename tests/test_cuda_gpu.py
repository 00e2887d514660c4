"""The CUDA operators on a GPU, against plain PyTorch in float64 on the CPU. Skipped where there is no GPU."""

from dataclasses import replace

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
LARGE_LSTMS = {
    "h128": cases.Lstm(16, 33, 100, 128, d=2),
    "h512": cases.Lstm(20, 17, 64, 512, d=2),
    "h650": cases.Lstm(5, 3, 70, 650),
}


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


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", (cases.LSTMS | LARGE_LSTMS).values(), ids=cases.LSTMS | LARGE_LSTMS)
def test_lstm(ops, case, dtype):
    cases.check_lstm(ops, "cuda", case, dtype)


@pytest.mark.parametrize("case", ["odd", "few_rows"])
def test_lstm_missing_gradients(ops, case):
    cases.check_lstm_parts(ops, "cuda", cases.LSTMS[case])


@pytest.mark.parametrize("case", ["odd", "few_rows", "h330"])
def test_lstm_without_states(ops, case):
    cases.check_lstm_without_states(ops, "cuda", cases.LSTMS[case])


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=str)
@pytest.mark.parametrize("case", [cases.Lstm(1, 5, 4, 33), cases.Lstm(1, 300, 64, 256)], ids=["odd", "large"])
def test_lstm_cell(ops, case, dtype):
    cases.check_lstm_cell(ops, "cuda", case, dtype)


def _train_everything(ops):
    torch.manual_seed(0)
    conv, lstm = LARGE_CONVS["first_layer"], LARGE_LSTMS["h512"]
    results = [*cases.run_conv(ops, "cuda", conv, torch.float32, *conv.draw(cases.normal))]
    operands = cases._convert(lstm.draw(), "cuda", torch.float32)
    return [*results, *cases.lstm_train_and_backward(ops, operands)]


def test_same_input_same_bits(ops):
    for a, b in zip(_train_everything(ops), _train_everything(ops), strict=True):
        assert torch.equal(a, b)


def test_current_stream(ops):
    """Kernels follow torch's current stream, and wait for what is enqueued on it before them."""
    case = cases.LSTMS["odd"]
    x, *rest = cases._convert(case.draw(), "cuda", torch.float32)
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
    case, conv = cases.LSTMS["few_rows"], cases.CONVS["odd"]
    operands = cases._convert(case.draw(), "cuda", torch.float32)
    image, weight, bias, _ = (t.float().cuda() for t in conv.draw(cases.normal))

    def step():
        *results, reserve = ops.rnn_train("lstm", *operands, *cases.WHOLE)
        grads = cases.lstm_backward(ops, results, operands, results, reserve)
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
