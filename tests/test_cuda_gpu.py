"""The CUDA operators on a GPU, against plain PyTorch in float64 on the CPU. Skipped where there is no GPU."""

import copy
from dataclasses import replace

import _cuda_cases as cases
import pytest
import torch

import cnnrnn_ext as cx
from cnnrnn_ext import _library

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
    rnn, results = LARGE_RNNS["h512"], []
    for dtype in (torch.float32, torch.float16):
        for which in (*LARGE_CONVS.values(), *LARGE_GATHERED.values()):
            for precision in ("highest", "high"):
                results += cases.run_conv(ops, "cuda", which, dtype, *which.draw(cases.normal), precision)
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


# ---- schedules: what the emulation runs at small sizes, at real ones ----

# (dtype, T, N, H): a block, clusters of 4 and of 16, and of 8; groups of the grid; a launch a step.
SCHEDULES = {
    "block": (torch.bfloat16, 40, 19, 32),
    "cluster of 4": (torch.float16, 40, 19, 128),
    "cluster of 16": (torch.bfloat16, 40, 19, 512),
    "fp32 cluster": (torch.float32, 40, 19, 200),
    "grid": (torch.bfloat16, 20, 16, 1024),
    "step": (torch.float32, 20, 16, 700),
}


@pytest.mark.parametrize("rows", ["whole", "lengths, reset"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("dtype", "t", "n", "h"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(ops, dtype, t, n, h, cell, rows):
    cases.check_rnn(ops, "cuda", cell, cases.Rnn(t, n, 48, h, rows=rows), dtype)


def _captured(step):
    """What ``step`` makes outside of a graph, and a graph's replay of it."""
    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.fill_(float("nan"))
    for _ in range(2):  # counters and the like must be as new in the second
        graph.replay()
    torch.cuda.synchronize()
    return want, got


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed"])
@pytest.mark.parametrize(("dtype", "t", "n", "h"), SCHEDULES.values(), ids=SCHEDULES)
def test_graph_capture(ops, dtype, t, n, h, rows):
    """Forward and backward can be captured, which a host synchronisation would forbid, and replayed."""
    case = cases.Rnn(t, n, 48, h, d=2, rows=rows)
    operands, steps = cases._convert(case.draw("lstm"), "cuda", dtype), case.steps("cuda")

    def step():
        *results, reserve = ops.rnn_train("lstm", *operands, *steps)
        grads = cases.rnn_backward(ops, "lstm", steps, results, operands, results, reserve)
        return [*results[:3], *cases._flat(grads)]

    for a, b in zip(*_captured(step), strict=True):
        assert torch.equal(a, b)


# (case, dtype, precision): the direct kernels, tensor cores on 3x3, gathered, few channels, several classes.
CONVOLVED = {
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

    for a, b in zip(*_captured(step), strict=True):
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


@pytest.mark.parametrize(("dtype", "t", "n", "h"), SCHEDULES.values(), ids=SCHEDULES)
def test_several_streams_at_once(ops, dtype, t, n, h):
    """Calls on different streams share nothing: each gives what it gives alone."""
    case = cases.Rnn(t, n, 48, h)
    calls = [cases._convert(case.draw("gru"), "cuda", dtype) for _ in range(4)]
    want = [cases.rnn_train_and_backward(ops, "gru", cases.WHOLE, operands) for operands in calls]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in calls], []
    for stream, operands in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            got.append(cases.rnn_train_and_backward(ops, "gru", cases.WHOLE, operands))
    torch.cuda.synchronize()
    for ours, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- modules: the CPU and the GPU agree ----

MODULES = {"lstm": cx.LSTM, "gru": cx.GRU, "rnn": cx.RNN}


@pytest.mark.parametrize("name", MODULES)
def test_cpu_gpu_parity(ops, name):
    """Two bidirectional layers of float64 on lengths: outputs and every gradient, to rounding."""
    torch.manual_seed(0)
    module = MODULES[name](20, 70, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(15, 9, 20, dtype=torch.float64), torch.randint(0, 16, (9,))

    def run(device):
        here, on = copy.deepcopy(module).to(device), x.to(device).requires_grad_()
        with cx.trace() as log:
            output, _ = here(on, lengths=lengths.to(device))
        assert [call.backend for call in log] == ["compiled"]
        output.square().sum().backward()
        return [t.cpu() for t in (output, on.grad, *(p.grad for p in here.parameters()))], log[0].kernel

    (on_cpu, _), (on_gpu, kernel) = run("cpu"), run("cuda")
    assert kernel.startswith("cuda, forward: ")
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_autocast(ops, name, dtype):
    """Under autocast the kernels run in its dtype, as torch's own layers do."""
    module, stock = MODULES[name](30, 64).cuda(), getattr(torch.nn, name.upper())(30, 64).cuda()
    stock.load_state_dict(module.state_dict())
    x = torch.randn(11, 6, 30, device="cuda")
    with torch.autocast("cuda", dtype=dtype), cx.trace() as log:
        ours, theirs = module(x)[0], stock(x)[0]
    assert ours.dtype == theirs.dtype == dtype
    assert "tensor cores" in log[0].kernel
    torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * torch.finfo(dtype).eps)
