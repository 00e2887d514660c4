"""Recurrent layers at every number of threads, beside other threads, after forks: the same bits."""

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _oracle import (
    CELLS,
    FUNCTION,
    compare,
    flat,
    nonlinearity,
    our_rnn,
    rnn_tensors,
    sequence_class,
    stock_rnn,
)

import cnnrnn_ext as cx

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
