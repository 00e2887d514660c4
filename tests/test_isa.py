"""Each instruction set of this machine, each number of threads, and bitwise repetition."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from _marked import files_marked
from _oracle import (
    CELLS,
    FUNCTION,
    check_error,
    compare,
    conv_tensors,
    our_rnn,
    rnn_tensors,
    stock_conv_pool2d,
    stock_rnn,
)

import cnnrnn_ext as cx
from cnnrnn_ext import _library

ISAS = ("baseline", "avx2", "avx512", "amx")  # narrow to wide
PACKAGE_ROOT = Path(cx.__file__).parent.parent
THREADS = (1, 2, 4)


def machine_isas():
    module = _library.build_module()
    return ISAS[: ISAS.index(module.best_isa()) + 1] if module else ()


def run_python(*arguments, isa):
    environment = {**os.environ, "CNNRNN_CPU_ISA": isa, "PYTHONPATH": str(PACKAGE_ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_suite_on_each_isa(compiled, isa):
    """The suite's own checks marked ``isa``, in a process of that set. They assert the kernel's name."""
    if isa not in machine_isas():
        pytest.skip(f"this machine has no {isa}")
    if isa == (os.environ.get("CNNRNN_CPU_ISA") or _library.build_module().best_isa()):
        pytest.skip(f"{isa} is what the rest of this run uses")
    result = run_python(
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-m",
        "isa",
        "-k",
        "not reference and not onnx",  # another package, which may be missing
        *files_marked("isa"),
        isa=isa,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


PROBE = """
import json, torch, cnnrnn_ext as cx
from cnnrnn_ext import _library
torch.manual_seed(0)
torch.set_num_threads(1)
modules = {"conv": (cx.ConvPool2d(3, 32, 3), (4, 3, 20, 21)),
           "lstm": (cx.LSTM(37, 50), (6, 13, 37)), "gru": (cx.GRU(37, 50), (6, 13, 37)),
           "rnn": (cx.RNN(37, 50), (6, 13, 37)), "lstm, one row": (cx.LSTM(37, 50), (30, 1, 37))}
values = {}
with cx.trace() as log:
    for name, (module, shape) in modules.items():
        y = module(torch.randn(shape))
        values[name] = (y[0] if isinstance(y, tuple) else y).double().flatten().tolist()
print(json.dumps({"active": _library.build_module().active_isa(), "kernels": [c.kernel for c in log],
                  "values": values}))
"""


def test_isas_agree_and_differ(compiled):
    """Every set computes the same networks within rounding. Where two sets give every bit alike in a
    convolution or in an LSTM, the override was not heeded: their vector widths sum in another order."""
    results = {}
    for isa in machine_isas():
        result = run_python("-c", PROBE, isa=isa)
        assert result.returncode == 0, result.stderr
        results[isa] = json.loads(result.stdout)
        assert results[isa]["active"] == isa
        assert results[isa]["kernels"] == [f"cpu/{isa}"] * len(results[isa]["values"])
    widest = results[machine_isas()[-1]]["values"]
    for isa in machine_isas():
        for name, values in results[isa]["values"].items():
            torch.testing.assert_close(torch.tensor(values), torch.tensor(widest[name]), rtol=1e-5, atol=1e-5)
    if len(results) > 1:
        assert any(widest[name] != results["baseline"]["values"][name] for name in widest)


@pytest.mark.parametrize("name", ["sse9", "AVX2", "1"])
def test_unknown_isa_raises(compiled, name):
    """A misspelt CNNRNN_CPU_ISA is a clear error that names the choices, never another set in silence."""
    code = "import torch, cnnrnn_ext as cx; print(cx.LSTM(2, 2)(torch.zeros(1, 1, 2))[0].sum().item())"
    result = run_python("-c", code, isa=name)
    assert result.returncode == 1, result.stdout
    assert f"CNNRNN_CPU_ISA={name}" in result.stderr
    assert all(isa in result.stderr for isa in ISAS)


def test_isa_the_machine_lacks_raises(compiled):
    missing = [isa for isa in ISAS if isa not in machine_isas()]
    if not missing:
        pytest.skip("this machine has every instruction set")
    result = run_python("-c", "import cnnrnn_ext", isa=missing[0])
    assert result.returncode == 1
    assert missing[0] in result.stderr


# ---- threads ----

CONV_SHAPE = (5, 3, 23, 21, 13, 3)
# Scans that threads share by hidden units, by rows and by directions.
RNN_CASES = {
    "by units": ((6, 7, 20, 33), {}),
    "by rows": ((5, 40, 16, 24), {}),
    "by directions": ((6, 3, 20, 33), {"bidirectional": True}),
    "one row": ((24, 1, 20, 80), {}),
}


def rnn_operands():
    return {
        f"{cell} {name}": rnn_tensors(cell, *shape, **options)
        for cell in CELLS
        for name, (shape, options) in RNN_CASES.items()
    }


def rnn_function(name):
    cell, case = name.split(" ", 1)
    return our_rnn(cell, **RNN_CASES[case][1])


@pytest.mark.parametrize("threads", THREADS)
def test_threads_against_torch(compiled, threads):
    torch.set_num_threads(threads)
    compare(
        cx.functional.conv_pool2d, stock_conv_pool2d, conv_tensors(*CONV_SHAPE), compiled, ["conv_pool2d"]
    )
    for cell in CELLS:
        for shape, options in RNN_CASES.values():
            tensors = rnn_tensors(cell, *shape, **options)
            compare(our_rnn(cell, **options), stock_rnn(cell, **options), tensors, compiled, [FUNCTION[cell]])


def run_once(operands):
    """Every output and gradient of each, training, in one list."""
    results = []
    for name, tensors in operands.items():
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        with cx.backend("compiled"):
            y = cx.functional.conv_pool2d(**leaves) if "conv" in name else rnn_function(name)(**leaves)
        outputs = [y] if isinstance(y, torch.Tensor) else list(y)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        results += [o.detach() for o in outputs] + [leaf.grad for leaf in leaves.values()]
    return results


@pytest.mark.parametrize("threads", THREADS)
def test_bitwise_repetition(compiled, threads):
    """Run after run, forward and backward, at a fixed number of threads."""
    torch.set_num_threads(threads)
    operands = {
        "conv": conv_tensors(16, 3, 28, 28, 32, 3),
        "deep conv": conv_tensors(3, 40, 13, 13, 64, 3),
        "lstm by units": rnn_tensors("lstm", 9, 13, 100, 40),
        "gru by units": rnn_tensors("gru", 9, 13, 100, 120),
        **rnn_operands(),
    }
    first = run_once(operands)
    for _ in range(5):
        for a, b in zip(first, run_once(operands), strict=True):
            assert torch.equal(a, b)


def test_threads_change_only_the_rounding(compiled):
    results = {}
    operands = {"conv": conv_tensors(*CONV_SHAPE), **rnn_operands()}
    exact = {name: {k: v.double() for k, v in tensors.items()} for name, tensors in operands.items()}
    for threads in THREADS:
        torch.set_num_threads(threads)
        results[threads] = run_once(operands)
    oracle = run_once(exact)
    for threads in THREADS[1:]:
        for a, b, c in zip(results[threads], results[1], oracle, strict=True):
            check_error(f"{threads} threads", a, b, c)


def test_concurrent_callers(compiled):
    """Several Python threads at once, each with its own operands: no shared scratch between calls."""
    operands = [{"conv": conv_tensors(*CONV_SHAPE), **rnn_operands()} for _ in range(6)]
    expected = [run_once(each) for each in operands]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            for result, wanted in zip(pool.map(run_once, operands), expected, strict=True):
                for a, b in zip(result, wanted, strict=True):
                    torch.testing.assert_close(a, b)
