"""The contenders: one row per way of computing a case. A new peer is one function and one row.

A row builds, for one case and phase, a callable that computes the case once and returns its results: the
outputs in forward, the output and the gradients in training. Whatever a peer needs beyond torch is imported
in its own function, so that a missing package only loses that peer.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
from torch import Tensor, nn

from .cases import FORWARD, PHASES, Case

Results = Sequence[Tensor | np.ndarray]
Run = Callable[[], Results]

OURS = "cnnrnn_ext"
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


@dataclass(frozen=True)
class Peer:
    """``packages`` names the distributions it needs, its own first; without one of them it is skipped."""

    name: str
    build: Callable[[Problem], Run]
    packages: tuple[str, ...] = ("torch",)
    phases: tuple[str, ...] = PHASES
    images_only: bool = False
    quick: bool = True

    def takes(self, case: Case, phase: str, quick: bool) -> bool:
        return (
            phase in self.phases and (case.image_layout or not self.images_only) and (self.quick or not quick)
        )

    def missing(self) -> str | None:
        """Why this peer cannot run here, or None."""
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


def outputs(value: object) -> list[Tensor]:
    """``y`` → ``[y]``; ``(output, (h_n, c_n))`` → ``[output, h_n, c_n]``."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in outputs(part)]


def torch_run(module: nn.Module, problem: Problem, x: Tensor, upstream: Tensor) -> Run:
    """Forward: all outputs. Training: the output, then the gradients of every parameter and of the input."""
    if problem.phase == FORWARD:
        module.eval()

        def forward() -> Results:
            with torch.inference_mode():
                return outputs(module(x))

        return forward

    module.train()
    wrt = list(module.parameters())
    if problem.case.input_grad:
        x = x.detach().requires_grad_()
        wrt.append(x)

    def step() -> Results:
        y = outputs(module(x))[0]
        return [y.detach(), *torch.autograd.grad(y, wrt, upstream)]

    return step


def _ours(problem: Problem) -> Run:
    return torch_run(problem.case.ours(problem.stock), problem, problem.x, problem.upstream)


def _clone(problem: Problem) -> nn.Module:
    module = problem.case.stock()
    module.load_state_dict(problem.stock.state_dict())
    return module


def _eager(problem: Problem) -> Run:
    return torch_run(_clone(problem), problem, problem.x, problem.upstream)


def _eager_channels_last(problem: Problem) -> Run:
    layout = torch.channels_last
    module = _clone(problem).to(memory_format=layout)
    x, upstream = (t.contiguous(memory_format=layout) for t in (problem.x, problem.upstream))
    return torch_run(module, problem, x, upstream)


def _compiled(problem: Problem) -> Run:
    torch.compiler.reset()  # one case at a time: no recompilation limit, no guard of another case
    module = _clone(problem)
    module = module.eval() if problem.phase == FORWARD else module.train()
    compiled = torch.compile(module, dynamic=False)
    return torch_run(compiled, problem, problem.x, problem.upstream)


def _onnx(problem: Problem) -> bytes:
    """The stock module as ONNX. The exporter without dynamo is quick and keeps nn.LSTM one node."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecation, and a note on batch sizes: the size is fixed here
        torch.onnx.export(_clone(problem).eval(), (problem.x,), buffer, dynamo=False, input_names=["x"])
    return buffer.getvalue()


def _onnxruntime(problem: Problem) -> Run:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = _onnx(problem)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (state.Fail, state.InvalidGraph, state.NotImplemented) as failure:  # none is a RuntimeError
        raise RuntimeError(f"ONNX Runtime: {failure}") from failure
    feed = {"x": problem.x.numpy()}
    return lambda: session.run(None, feed)


def _openvino(problem: Problem) -> Run:
    import openvino

    core = openvino.Core()
    # Its default precision on this kind of machine can be bfloat16; every contender here computes in float32.
    settings = {
        "INFERENCE_NUM_THREADS": problem.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(_onnx(problem)), "CPU", settings)
    request = model.create_infer_request()
    feed = {"x": problem.x.numpy()}

    def run() -> Results:
        results = request.infer(feed, share_inputs=True, share_outputs=True)
        return [results[output] for output in model.outputs]

    return run


PEERS: tuple[Peer, ...] = (
    Peer(STOCK, _eager),
    Peer("torch channels_last", _eager_channels_last, images_only=True),
    Peer("torch.compile", _compiled, quick=False),
    Peer("ONNX Runtime", _onnxruntime, packages=("onnxruntime", "onnx"), phases=(FORWARD,)),
    Peer("OpenVINO", _openvino, packages=("openvino", "onnx"), phases=(FORWARD,), quick=False),
)
CONTENDERS: tuple[Peer, ...] = (Peer(OURS, _ours), *PEERS)
