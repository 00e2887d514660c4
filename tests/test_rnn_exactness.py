"""Recurrent layers where numbers or circumstances are extreme: long sequences, NaN and infinities, denormals,
threads, forks; and ONNX Runtime as a second oracle."""

import io
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _oracle import (
    CELLS,
    FUNCTION,
    as_states,
    check_error,
    compare,
    error,
    expected_kernel,
    flat,
    nonlinearity,
    our_rnn,
    outputs_and_gradients,
    rnn_tensors,
    running_on,
    sequence_class,
    stock_rnn,
)

import cnnrnn_ext as cx

INF, NAN = float("inf"), float("nan")
KERNELS = ["vectors", "direct", "tile registers"]  # what serves a shape, the last where the machine has them


# ---- long sequences ----


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_ten_thousand_steps(compiled, cell, rows):
    """Outputs, last states and (of three rows) gradients: errors do not pile up beyond twice torch's own."""
    tensors = rnn_tensors(cell, 10_000, rows, 4, 9)
    if cell == "rnn_relu":  # keeps a ReLU from growing or dying out over so many steps
        tensors["weight_hh_l0"] = torch.eye(9) * 0.9
    wanted = [] if rows == 1 else None
    compare(our_rnn(cell), stock_rnn(cell), tensors, compiled, [FUNCTION[cell]], wanted=wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_ten_thousand_steps_both_ways_by_lengths(compiled, cell):
    """Rows of 10,000, 1 and 5,000 steps, each as torch computes it alone."""
    lengths = torch.tensor([10_000, 1, 5_000])
    tensors = rnn_tensors(cell, 10_000, 3, 3, 5, bidirectional=True)
    with running_on(compiled, FUNCTION[cell]):
        output, *finals = our_rnn(cell, bidirectional=True, lengths=lengths)(**tensors)
    for row, length in enumerate(lengths.tolist()):
        alone = {k: v for k, v in tensors.items() if k not in ("input", "h_0", "c_0")}
        alone |= {k: tensors[k][:, row : row + 1] for k in ("h_0", "c_0") if k in tensors}
        alone["input"] = tensors["input"][:length, row : row + 1]
        wanted = stock_rnn(cell, bidirectional=True)(**{k: v.double() for k, v in alone.items()})
        theirs = stock_rnn(cell, bidirectional=True)(**alone)
        ours = (output[:length, row : row + 1], *(s[:, row : row + 1] for s in finals))
        for index, triple in enumerate(zip(ours, theirs, wanted, strict=True)):
            check_error(f"row {row}, output {index}", *triple)


# ---- extreme numbers ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude", [1e4, 1e30])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(6, 5, 7, 19), (20, 1, 7, 19), (6, 14, 7, 19)], ids=KERNELS)
def test_huge_inputs(mode, cell, magnitude, dtype, shape):
    """Every gate at one of its ends, whatever the sign, and back: no overflow, as torch to rounding.

    A pre-activation of 1e4 is only known to 1e4 units of the last place, and so is its gate's gradient.
    """
    tensors = rnn_tensors(cell, *shape, dtype=dtype)
    signs = torch.where(torch.rand_like(tensors["input"]) < 0.5, -1.0, 1.0)
    # One feature of a row alone: huge products that cancel would leave a matter of luck between the ends.
    alone = torch.nn.functional.one_hot(torch.randint(shape[2], shape[:2]), shape[2])
    tensors["input"] = (signs * alone * magnitude).to(dtype)
    tensors["input"][3:5] = torch.randn_like(tensors["input"][3:5])
    compare(our_rnn(cell), stock_rnn(cell), tensors, mode, [FUNCTION[cell]], wanted=[])
    _, expected, outer = outputs_and_gradients(stock_rnn(cell), {k: v.double() for k, v in tensors.items()})
    with running_on(mode, FUNCTION[cell]):
        _, gradients, _ = outputs_and_gradients(our_rnn(cell), tensors, outer)
    tolerance = 2e4 * torch.finfo(dtype).eps
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        scale = max(1, expected[name].abs().max().item())
        torch.testing.assert_close(
            gradient.double(),
            expected[name],
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("where", ["input", "h_0", "weights"])
@pytest.mark.parametrize("rows", [5, 14])
def test_denormals(mode, cell, where, rows):
    """Numbers below the smallest normal one neither trap nor turn into something else."""
    tensors = rnn_tensors(cell, 6, rows, 7, 19)
    for name in tensors:
        if name.startswith({"weights": "weight"}.get(where, where)):
            tensors[name] = tensors[name] * 1e-40
            assert (tensors[name].abs() < torch.finfo(torch.float32).tiny).all()
            assert tensors[name].any()
    if mode == "reference" or expected_kernel() != "cpu/amx":
        compare(our_rnn(cell), stock_rnn(cell), tensors, mode, [FUNCTION[cell]])
        return
    # Tile registers take them for zeros: no more is lost than what they stand for.
    theirs, their_grads, outer = outputs_and_gradients(stock_rnn(cell), tensors)
    with running_on(mode, FUNCTION[cell]):
        ours, our_grads, _ = outputs_and_gradients(our_rnn(cell), tensors, outer)
    smallest = torch.finfo(torch.float32).smallest_normal
    pairs = [*zip(ours, theirs, strict=True), *((our_grads[name], their_grads[name]) for name in their_grads)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=max(smallest, 1e-6 * b.abs().max().item()))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_denormal_states_are_kept(mode, cell):
    """Every number below the smallest normal one: h of a GRU and c of an LSTM are halved at each step, and
    fade as gradually as torch's."""
    tensors = {k: v * 1e-39 for k, v in rnn_tensors(cell, 4, 3, 5, 6, bias=False).items()}
    with running_on(mode, FUNCTION[cell]):
        ours = our_rnn(cell, bias=False)(**tensors)
    for a, b in zip(ours, stock_rnn(cell, bias=False)(**tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=torch.finfo(torch.float32).smallest_normal * 1e-6)
    assert ours[-1].any()


@pytest.mark.isa
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(
    ("cell", "where"),
    [
        (cell, where)
        for cell in CELLS
        for where in ("input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
        if cell == "lstm" or where != "c_0"
    ],
)
@pytest.mark.parametrize("shape", [(5, 4, 7, 19), (20, 1, 7, 19), (5, 14, 7, 19)], ids=KERNELS)
def test_special_values(mode, cell, where, value, shape):
    """One NaN or infinity, anywhere: outputs, states and gradients as torch propagates it, and no further."""
    tensors = rnn_tensors(cell, *shape)
    tensors[where].view(-1)[tensors[where].numel() // 2] = value
    theirs, their_grads, outer = outputs_and_gradients(stock_rnn(cell), tensors)
    with running_on(mode, FUNCTION[cell]):
        ours, our_grads, _ = outputs_and_gradients(our_rnn(cell), tensors, outer)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, equal_nan=True, msg=lambda m, i=index: f"output {i}: {m}")
    for name, b in their_grads.items():
        torch.testing.assert_close(
            our_grads[name],
            b,
            equal_nan=True,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda m, n=name: f"grad of {n}: {m}",
        )


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [5, 19])
@pytest.mark.parametrize("rows", [9, 14])
def test_nan_stays_in_its_row(mode, cell, hidden, rows):
    tensors = rnn_tensors(cell, 5, rows, 6, hidden)
    tensors["input"][2, 4, 3] = NAN
    with running_on(mode, FUNCTION[cell]):
        results = our_rnn(cell)(**tensors)
    for a, b in zip(results, stock_rnn(cell)(**tensors), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert results[0][2:, 4].isnan().all()
    others = [row for row in range(rows) if row != 4]
    assert not results[0][:, others].isnan().any()


# ---- threads ----

MORE_THAN_CORES = 2 * (os.cpu_count() or 1) + 1
SHAPES = {"one row": (30, 1, 24, 96), "few rows": (8, 5, 24, 96), "many rows": (6, 64, 24, 48)}


def train_once(cell, tensors, **options):
    """Outputs and all gradients of the sum of the outputs."""
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    outputs = our_rnn(cell, **options)(**leaves)
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), list(leaves.values()))
    return [*(y.detach() for y in outputs), *gradients]


@pytest.mark.parametrize("threads", [1, 2, MORE_THAN_CORES])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_bitwise_at_each_number_of_threads(compiled, cell, name, threads):
    """Forward and backward repeat bit by bit, and are right, on one thread or on more than cores."""
    torch.set_num_threads(threads)
    tensors = rnn_tensors(cell, *SHAPES[name], bidirectional=True)
    first = train_once(cell, tensors, bidirectional=True)
    for _ in range(4):
        for a, b in zip(first, train_once(cell, tensors, bidirectional=True), strict=True):
            assert torch.equal(a, b)
    compare(
        our_rnn(cell, bidirectional=True),
        stock_rnn(cell, bidirectional=True),
        tensors,
        compiled,
        [FUNCTION[cell]],
    )


@pytest.mark.parametrize("cell", CELLS)
def test_several_python_threads(compiled, cell):
    """One module called from four threads at once, each with inputs of its own, gives what it gives alone."""
    module = sequence_class(cx, cell)(24, 96, num_layers=2, **nonlinearity(cell))
    inputs = [torch.randn(shape[0], shape[1], 24) for shape in (*SHAPES.values(), (1, 1, 24))] * 3

    def call(x):
        x = x.clone().requires_grad_()
        outputs = flat(module(x))
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs[0].sum(), [x])]

    expected = [call(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for result, wanted in zip(pool.map(call, inputs), expected, strict=True):
                for a, b in zip(result, wanted, strict=True):
                    torch.testing.assert_close(a, b)


def test_while_torchs_threads_are_busy(compiled):
    """torch's pool at work for another Python thread: nobody waits for a worker that does not come."""
    stop, errors = threading.Event(), []
    a = torch.randn(400, 400)

    def busy():
        try:
            while not stop.is_set():
                torch.mm(a, a)
                torch.nn.functional.conv2d(a[None, None], a[None, None, :3, :3])
        except RuntimeError as failure:
            errors.append(failure)

    torch.set_num_threads(4)
    tensors = {cell: rnn_tensors(cell, 40, 1, 24, 96) for cell in CELLS}
    expected = {cell: train_once(cell, tensors[cell]) for cell in CELLS}
    workers = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    results, done = [], threading.Event()

    def ours():
        for _ in range(5):
            results.extend((cell, train_once(cell, tensors[cell])) for cell in CELLS)
        done.set()

    caller = threading.Thread(target=ours, daemon=True)
    caller.start()
    assert done.wait(120), "a call did not come back"
    stop.set()
    for worker in workers:
        worker.join()
    assert errors == []
    for cell, result in results:
        for a, b in zip(result, expected[cell], strict=True):
            torch.testing.assert_close(a, b)


ONE_THREAD = """
import torch, cnnrnn_ext as cx
before = cx.LSTM(24, 96)
x = torch.randn(30, 1, 24)
with cx.backend("compiled"):
    many = before(x)[0]
    torch.set_num_threads(1)
    one = before(x)[0]
    one.sum().backward()
    with torch.autograd.set_multithreading_enabled(False):
        before(x)[0].sum().backward()
torch.testing.assert_close(one, many)
print("done")
"""


@pytest.mark.parametrize("threads", ["1", "2", "64"])
def test_a_process_of_one_thread(compiled, threads):
    """OMP_NUM_THREADS of any size, then torch.set_num_threads(1): nothing waits for ever."""
    root = Path(cx.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", ONE_THREAD],
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


# ---- processes ----


def in_child(cell, tensors, connection):
    try:
        connection.send([t.numpy() for t in train_once(cell, tensors)])
    except BaseException as failure:  # the parent reports it: a child's traceback is lost
        connection.send(repr(failure))
        raise


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_fork_after_use(compiled, cell, threads):
    """As a DataLoader's workers are made: the parent has used the kernels and torch's threads, the child has
    one thread of torch. It computes the same, and comes back."""
    torch.set_num_threads(threads)
    tensors = rnn_tensors(cell, *SHAPES["few rows"])
    expected = train_once(cell, tensors)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=forked, args=(cell, tensors, theirs))
    child.start()
    try:
        assert ours.poll(60), "the child did not come back"
        result = ours.recv()
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()
    assert not isinstance(result, str), result
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b)
    for a, b in zip(train_once(cell, tensors), expected, strict=True):
        assert torch.equal(a, b)


def forked(cell, tensors, connection):
    torch.set_num_threads(1)  # as DataLoader does in each worker
    in_child(cell, tensors, connection)


class Batches(torch.utils.data.Dataset):
    """Items that are made by a layer in the worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 6

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad(), cx.backend("compiled"):
            return self.module(torch.randn(12, 5, generator=generator))[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("cell", CELLS)
def test_in_the_workers_of_a_data_loader(compiled, cell):
    data = Batches(sequence_class(cx, cell)(5, 40, **nonlinearity(cell)))
    expected = torch.stack([data[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(
        data, batch_size=6, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    torch.testing.assert_close(next(iter(loader)), expected)


# ---- ONNX Runtime: a second oracle ----


class WithStates(torch.nn.Module):
    def __init__(self, module, cell):
        super().__init__()
        self.module, self.cell = module, cell

    def forward(self, x, h_0, c_0):
        return flat(self.module(x, as_states(self.cell, h_0, c_0)))


@pytest.mark.isa
@pytest.mark.parametrize("shape", [(7, 5, 9, 20), (30, 1, 12, 33)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_against_onnx_runtime(compiled, cell, bidirectional, layers, shape):
    """Stock's parameters, exported, in an implementation that shares nothing with torch's."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    t, n, i, h = shape
    options = {"num_layers": layers, "bidirectional": bidirectional, **nonlinearity(cell)}
    stock, ours = (sequence_class(package, cell)(i, h, **options) for package in (torch.nn, cx))
    ours.load_state_dict(stock.state_dict())
    rows = layers * (2 if bidirectional else 1)
    operands = torch.randn(t, n, i), torch.randn(rows, n, h), torch.randn(rows, n, h)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the exporter without dynamo is deprecated; it keeps one node a layer
        names = ["x", "h_0", "c_0"]
        torch.onnx.export(WithStates(stock.eval(), cell), operands, buffer, dynamo=False, input_names=names)
    assert {b"lstm": b"LSTM", b"gru": b"GRU", b"rnn": b"RNN"}[FUNCTION[cell].encode()] in buffer.getvalue()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(buffer.getvalue(), settings, ["CPUExecutionProvider"])
    given = {x.name for x in session.get_inputs()}
    feed = {k: v.numpy() for k, v in zip(names, operands, strict=True) if k in given}
    theirs = [torch.from_numpy(y) for y in session.run(None, feed)]
    with torch.no_grad(), running_on(compiled, FUNCTION[cell]):
        results = flat(ours(operands[0], as_states(cell, *operands[1:])))
    for a, b in zip(results, theirs, strict=True):
        assert error(a, b)[0] < 2e-6
        assert b.any()
