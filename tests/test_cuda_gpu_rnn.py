"""The recurrent CUDA operators on a GPU, as test_cuda_gpu.py has those of conv_pool."""

import copy

import _cuda_rnn_cases as cases
import pytest
import torch
from _cuda_cases import ALL_DTYPES, captured, check_several_streams

import cnnrnn_ext as cx

pytestmark = pytest.mark.cuda

# Sizes of real networks, which the emulation is too slow for.
LARGE_RNNS = {
    "h128": cases.Rnn(16, 33, 100, 128, d=2),
    "h512": cases.Rnn(20, 17, 64, 512, d=2),
    "h650": cases.Rnn(5, 3, 70, 650),
    "lengths": cases.Rnn(40, 19, 30, 200, d=2, rows="lengths, reset"),
    "packed": cases.Rnn(40, 19, 30, 200, d=2, rows="packed, reset"),
}
CELLS = tuple(cases.GATES)


@pytest.fixture
def ops(on_gpu):
    return on_gpu


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
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


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("case", [cases.Rnn(1, 5, 4, 33), cases.Rnn(1, 300, 64, 256)], ids=["odd", "large"])
def test_cell(ops, case, cell, dtype):
    cases.check_cell(ops, "cuda", cell, case, dtype)


def test_same_input_same_bits(ops):
    for cell in CELLS:
        operands = cases.convert(LARGE_RNNS["h512"].draw(cell), "cuda", torch.float32)
        runs = [cases.rnn_train_and_backward(ops, cell, cases.WHOLE, operands) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_current_stream(ops):
    """Kernels follow torch's current stream, and wait for what is enqueued on it before them."""
    case = cases.RNNS["odd"]
    x, *rest = cases.convert(case.draw("lstm"), "cuda", torch.float32)
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

# (dtype, TF32, T, N, H), and the forward's schedule on an H200
SCHEDULES = {
    "a block": (torch.bfloat16, False, 40, 19, 32),
    "a block, the device being full": (torch.bfloat16, False, 10, 700, 128),
    "a cluster of 4": (torch.float16, False, 40, 19, 128),
    "a cluster of 16": (torch.bfloat16, False, 40, 19, 512),
    "the grid": (torch.bfloat16, False, 20, 16, 1024),
    "a launch a step": (torch.bfloat16, False, 10, 16, 2048),
    "a launch a step, many rows": (torch.float16, False, 3, 130, 2048),
    "TF32, a launch a step": (torch.float32, True, 3, 70, 1024),
    "fp32, a launch a step, three products": (torch.float32, False, 3, 70, 1024),
    "TF32, a cluster of 4": (torch.float32, True, 40, 19, 128),
    "TF32, the grid": (torch.float32, True, 20, 16, 700),
    "fp32, a block": (torch.float32, False, 40, 19, 64),
    "fp32, a cluster of 8": (torch.float32, False, 40, 19, 200),
    "fp32, a cluster, three products": (torch.float32, False, 20, 128, 256),
    "fp32, the grid, three products": (torch.float32, False, 20, 16, 700),
    "fp64, a launch a step": (torch.float64, False, 20, 16, 700),
}


@pytest.mark.parametrize("rows", ["whole", "lengths, reset"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("dtype", "tf32", "t", "n", "h"), SCHEDULES.values(), ids=SCHEDULES)
def test_schedule(ops, dtype, tf32, t, n, h, cell, rows):
    cases.check_rnn(ops, "cuda", cell, cases.Rnn(t, n, 48, h, rows=rows), dtype, tf32)


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed, reset"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_recomputed_gates(ops, dtype, cell, rows):
    case = cases.Rnn(20, 19, 48, 200, d=2, rows=rows)
    cases.check_rnn(ops, "cuda", cell, case, dtype, recompute=True)


@pytest.mark.parametrize("rows", ["whole", "lengths, reset", "packed"])
@pytest.mark.parametrize(("dtype", "tf32", "t", "n", "h"), SCHEDULES.values(), ids=SCHEDULES)
def test_graph_capture(ops, dtype, tf32, t, n, h, rows):
    """Forward and backward can be captured, which a host synchronisation would forbid, and replayed."""
    case = cases.Rnn(t, n, 48, h, d=2, rows=rows)
    operands, steps = cases.convert(case.draw("lstm"), "cuda", dtype), case.steps("cuda")

    def step():
        *results, reserve = ops.rnn_train("lstm", *operands, *steps, tf32)
        grads = cases.rnn_backward(ops, "lstm", steps, results, operands, results, reserve, tf32=tf32)
        return [*results[:3], *cases.flat(grads)]

    for a, b in zip(*captured(step), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "tf32", "t", "n", "h"), SCHEDULES.values(), ids=SCHEDULES)
def test_several_streams_at_once(ops, dtype, tf32, t, n, h):
    case = cases.Rnn(t, n, 48, h)
    calls = [cases.convert(case.draw("gru"), "cuda", dtype) for _ in range(4)]

    def run(operands):
        return cases.rnn_train_and_backward(ops, "gru", cases.WHOLE, operands, tf32)

    check_several_streams(run, calls)


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


@pytest.mark.parametrize("allowed", [True, False])
def test_torchs_switch_for_tf32(ops, monkeypatch, allowed):
    """Float32 runs in TF32 where nn.LSTM may, and the trace tells."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    module = cx.LSTM(64, 512).cuda()
    with cx.trace() as log:
        module(torch.randn(11, 6, 64, device="cuda"))
    assert (", TF32" in log[0].kernel) == allowed
