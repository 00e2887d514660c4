"""One record: is the case computed correctly, by whom, and how long does everyone take.

Correctness comes first, on the very inputs that are timed. The truth is torch.nn in float64. Ours may err at
most twice as much as torch's own float32 kernel, tensor by tensor (outputs and, in training, every gradient);
a case that fails this is reported as wrong and not timed. A peer that computes something else is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from cnnrnn_ext._timing import CONTROL, Timings, paired

from .cases import FORWARD, Case
from .peers import OURS, STOCK, Peer, Problem, Results, Run, torch_run

ALLOWED_ERROR = 2.0  # times torch's own
PEER_TOLERANCE = 1e-3  # of the largest value: a peer beyond it computes something else
ATTEMPTS = (
    3  # a record whose control fails is measured again with more rounds; its first figures do not count
)

# What foreign packages raise when they cannot take a case.
PEER_FAILURES = (ImportError, OSError, RuntimeError, TypeError, ValueError)


def problem_of(case: Case, phase: str, threads: int) -> tuple[Problem, list[Tensor]]:
    """The problem and its true results, computed by torch.nn in float64."""
    stock, x = case.stock(), case.input()
    stock64, x64 = copy.deepcopy(stock).double(), x.double()
    upstream = case.upstream(stock64, x64)
    problem = Problem(case, phase, threads, stock, x, upstream)
    truth = list(torch_run(stock64, problem, x64, upstream.double())())
    return problem, [torch.as_tensor(t).clone() for t in truth]


def labels(problem: Problem) -> list[str]:
    """Names of a contender's results, in order."""
    if problem.phase == FORWARD:
        return ["output", "h_n", "c_n"] if problem.case.family == "lstm" else ["output"]
    names = ["output", *(f"grad {name}" for name, _ in problem.stock.named_parameters())]
    return [*names, "grad input"] if problem.case.input_grad else names


def errors(results: Results, truth: list[Tensor]) -> list[float]:
    """Largest absolute difference of each result from the truth; infinite if it is not even comparable."""
    if len(results) != len(truth):
        return [float("inf")] * len(truth)
    return [_error(torch.as_tensor(result), true) for result, true in zip(results, truth, strict=True)]


def _error(result: Tensor, truth: Tensor) -> float:
    if result.shape != truth.shape:
        return float("inf")
    worst = (result.detach().double() - truth).abs().max().item() if truth.numel() else 0.0
    return worst if worst == worst else float("inf")


def kernels_of(run: Run) -> list[str]:
    """Which operator ran on which kernel: ``["conv_pool2d: cpu/avx512", …]``; a fallback names its reason."""
    import cnnrnn_ext

    with cnnrnn_ext.trace() as log:
        run()
    return sorted(
        {
            f"{r.op}: {r.kernel}" if r.backend == "compiled" else f"{r.op}: {r.backend} ({r.reason})"
            for r in log
        }
    )


def record(
    case: Case, phase: str, threads: int, allocator: str, contenders: Iterable[Peer], rounds: int
) -> dict:
    """Checks and times one case. ``contenders`` are ours, stock and the peers that take this case."""
    problem, truth = problem_of(case, phase, threads)
    result: dict = {
        "family": case.family,
        "case": case.name,
        "phase": phase,
        "threads": threads,
        "allocator": allocator,
        "input_grad": case.input_grad,
        "flop": case.flop(phase),
        "reads": dict(zip(("bytes", "from_bytes"), case.reads(phase), strict=True)),
        "skipped": {},
    }
    runs: dict[str, Run] = {}
    found: dict[str, list[float]] = {}
    scale = [t.abs().max().item() for t in truth]
    for peer in contenders:
        if reason := peer.missing():
            result["skipped"][peer.name] = reason
            continue
        try:
            run = peer.build(problem)
            error = errors(run(), truth)
        except PEER_FAILURES as failure:
            if peer.name in (OURS, STOCK):
                raise
            result["skipped"][peer.name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            continue
        if peer.name not in (OURS, STOCK) and any(
            e > PEER_TOLERANCE * s for e, s in zip(error, scale, strict=True)
        ):
            result["skipped"][peer.name] = f"computes something else: largest error {max(error):.2g}"
            continue
        runs[peer.name], found[peer.name] = run, error
    del truth

    result["kernels"] = kernels_of(runs[OURS])
    result["errors"] = {
        label: {"ours": ours, "torch": stock}
        for label, ours, stock in zip(labels(problem), found[OURS], found[STOCK], strict=True)
    }
    if any(e["ours"] > ALLOWED_ERROR * e["torch"] for e in result["errors"].values()):
        return {**result, "status": "wrong"}
    return {**result, **_timed(runs, rounds)}


def _timed(runs: dict[str, Run], rounds: int) -> dict:
    attempts, timings = 1, paired(runs, rounds, control=STOCK)
    while not timings.valid and attempts < ATTEMPTS:
        attempts += 1
        timings = paired(runs, rounds * attempts, control=STOCK)
    return {"attempts": attempts, "rounds": rounds * attempts, **summary(timings)}


def summary(timings: Timings) -> dict:
    """Everything a report says about the timings of one record. Ratios are a peer's time over ours."""
    peers = [name for name in timings.seconds if name not in (OURS, CONTROL)]
    best = min(peers, key=timings.median_ms)
    control = timings.control
    return {
        "status": "ok" if timings.valid else "void",
        "control": vars(control) if control else None,
        "best_peer": best,
        "ratios": {peer: vars(timings.ratio(peer, OURS)) for peer in peers},
        "contenders": {
            name: {"median_ms": timings.median_ms(name), "min_ms": timings.min_ms(name), "seconds": values}
            for name, values in timings.seconds.items()
        },
    }
