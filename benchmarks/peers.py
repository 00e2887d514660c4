"""The contenders: one row per way of computing a case. A new peer is one function and one row.

A row builds, for one case and phase, a Run: the call that is timed, and how to read its results, which are
the outputs in forward, the output and the gradients in training. Whatever a peer needs beyond torch is
imported in its own function, so that a missing package only loses that peer.

Each peer is called as fast as it can be: the timed call is the module's or the session's own, with operands
that are bound once where the peer has a way to do so.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .cases import FORWARD, PHASES, Case

Results = Sequence[Tensor | np.ndarray]

OURS = "cnnrnn_ext"
# Environment of a comparison on a narrower instruction set than the machine's: ours, oneDNN, torch's own
# kernels, MKL and torch.compile.
RESTRICTED = "ONEDNN_MAX_CPU_ISA"
RESTRICTIONS = {
    "avx2": {
        "CNNRNN_CPU_ISA": "avx2",
        RESTRICTED: "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CPP_SIMDLEN": "256",
    },
    "avx512": {
        "CNNRNN_CPU_ISA": "avx512",
        RESTRICTED: "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "TORCHINDUCTOR_CPP_SIMDLEN": "512",
    },
}

STOCK = "torch eager"  # NCHW; the one that is also compared with itself


@dataclass(frozen=True)
class Problem:
    """What every contender of one record computes."""

    case: Case
    phase: str
    threads: int
    stock: nn.Module
    x: Tensor
    upstream: Tensor


def outputs(value: object) -> list[Tensor | np.ndarray]:
    """``y`` → ``[y]``; ``(output, (h_n, c_n))`` → ``[output, h_n, c_n]``; a packed sequence is its data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (Tensor, np.ndarray)):
        return [value]
    return [tensor for part in value for tensor in outputs(part)]


@dataclass(frozen=True)
class Run:
    """One computation of a problem; ``read`` turns what ``call`` returned into results, and is not timed.

    ``operands`` are kept alive: a session reads the memory of the arrays that were bound to it.
    """

    call: Callable[[], object]
    read: Callable[[object], Results] = outputs
    operands: object = None

    def results(self) -> Results:
        return self.read(self.call())


@dataclass(frozen=True)
class Peer:
    """``packages`` names the distributions it needs, its own first; without one of them it is skipped.

    ``barred`` names the attribute of a case that says why this peer is not asked. ``restricted``: it keeps to
    an instruction set that RESTRICTIONS ask for.
    """

    name: str
    build: Callable[[Problem], Run]
    packages: tuple[str, ...] = ("torch",)
    phases: tuple[str, ...] = PHASES
    images_only: bool = False
    quick: bool = True
    barred: str | None = None
    restricted: bool = True

    def takes(self, case: Case, phase: str, quick: bool) -> bool:
        return (
            phase in self.phases and (case.image_layout or not self.images_only) and (self.quick or not quick)
        )

    def refuses(self, case: Case) -> str | None:
        """Why it is not asked to compute a case, or None."""
        return getattr(case, self.barred) if self.barred else None

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
        if not self.restricted and RESTRICTED in os.environ:
            return "cannot be held to an instruction set"
        absent = [package for package in self.packages if _version(package) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def versions(self) -> dict[str, str]:
        """Installed versions of its packages."""
        return {package: version for package in self.packages if (version := _version(package))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_run(module: nn.Module, problem: Problem, x: Tensor, upstream: Tensor, bind: Callable) -> Run:
    """Forward: all outputs. Training: the output, then the gradients of every parameter and of the input.

    ``bind(module, x)`` is the call. Whoever times it in forward switches gradients off around all calls.
    """
    if problem.phase == FORWARD:
        return Run(bind(module.eval(), x))

    module.train()
    wrt = list(module.parameters())
    if problem.case.input_grad:
        x = x.detach().requires_grad_()
        wrt.append(x)
    call = bind(module, x)

    def step() -> Results:
        y = call()
        while not isinstance(
            y, Tensor
        ):  # (output, states); a packed sequence is a tuple that begins with its data
            y = y[0]
        return [y.detach(), *torch.autograd.grad(y, wrt, upstream)]

    return Run(step)


def ours(problem: Problem) -> Run:
    case = problem.case
    return torch_run(case.ours(problem.stock), problem, problem.x, problem.upstream, case.bind_ours)


def _clone(problem: Problem) -> nn.Module:
    module = problem.case.stock()
    module.load_state_dict(problem.stock.state_dict())
    return module


def _eager(problem: Problem) -> Run:
    return torch_run(_clone(problem), problem, problem.x, problem.upstream, problem.case.bind)


def _eager_channels_last(problem: Problem) -> Run:
    layout = torch.channels_last
    module = _clone(problem).to(memory_format=layout)
    x, upstream = (t.contiguous(memory_format=layout) for t in (problem.x, problem.upstream))
    return torch_run(module, problem, x, upstream, problem.case.bind)


def _compiled(problem: Problem) -> Run:
    torch.compiler.reset()  # one case at a time: no recompilation limit, no guard of another case
    module = _clone(problem)
    module = module.eval() if problem.phase == FORWARD else module.train()
    compiled = torch.compile(module, dynamic=False)
    return torch_run(compiled, problem, problem.x, problem.upstream, problem.case.bind)


def _onnx(problem: Problem) -> tuple[bytes, dict[str, np.ndarray]]:
    """The stock module as ONNX, and its inputs.

    The exporter without dynamo is quick and keeps nn.LSTM one node.
    """
    buffer = io.BytesIO()
    arguments = problem.case.arguments(problem.x)
    feed = {f"input_{i}": tensor.numpy() for i, tensor in enumerate(outputs(arguments))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecation, and a note on batch sizes: the size is fixed here
        torch.onnx.export(_clone(problem).eval(), arguments, buffer, dynamo=False, input_names=list(feed))
    return buffer.getvalue(), feed


def _onnxruntime(problem: Problem) -> Run:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model, feed = _onnx(problem)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (state.Fail, state.InvalidGraph, state.NotImplemented) as failure:  # none is a RuntimeError
        raise RuntimeError(f"ONNX Runtime: {failure}") from failure
    # Bound once: session.run converts every input and output at each call, 25 µs of an LSTM step's 42.
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    call = functools.partial(session.run_with_iobinding, binding)
    return Run(call, lambda _: binding.copy_outputs_to_cpu(), feed)


def _openvino(problem: Problem) -> Run:
    import openvino

    core = openvino.Core()
    # Its default precision on this kind of machine can be bfloat16; every contender here computes in float32.
    settings = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model, feed = _onnx(problem)
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    request = compiled.create_infer_request()
    for name, value in feed.items():
        request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def read(_: object) -> Results:
        return [request.get_tensor(output).data.copy() for output in compiled.outputs]

    return Run(request.infer, read, feed)


PEERS: tuple[Peer, ...] = (
    Peer(STOCK, _eager),
    Peer("torch channels_last", _eager_channels_last, images_only=True),
    Peer("torch.compile", _compiled, quick=False, barred="no_compile"),
    Peer(
        "ONNX Runtime",
        _onnxruntime,
        packages=("onnxruntime", "onnx"),
        phases=(FORWARD,),
        barred="no_onnx",
        restricted=False,
    ),
    Peer(
        "OpenVINO",
        _openvino,
        packages=("openvino", "onnx"),
        phases=(FORWARD,),
        quick=False,
        barred="no_onnx",
        restricted=False,
    ),
)
CONTENDERS: tuple[Peer, ...] = (Peer(OURS, ours), *PEERS)
