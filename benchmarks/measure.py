"""One record: is the case computed correctly, by whom, and how long does everyone take.

Correctness comes first, on the very inputs that are timed. The truth is torch.nn in float64. Ours may err at
most twice as much as torch's own kernel of that dtype, tensor by tensor (outputs and, in training, every
gradient), give or take the rounding of the largest value; where torch has no such kernel, as for narrow
weights, the case has a tolerance. A case that fails this is reported as wrong and not timed. A peer that
computes something else is left out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from cnnrnn_ext._timing import CONTROL, Timings, paired

from .cases import FORWARD, TRAINING, Case
from .memory import peak_bytes
from .peers import OURS, STOCK, Peer, Problem, Results, Run, ours, torch_run

ALLOWED_ERROR = 2.0  # times torch's own
ROUNDING = {torch.float32: 4, torch.bfloat16: 1}  # units in the last place of the largest value: no error
PEER_TOLERANCE = 1e-3  # of the largest value: a peer beyond it computes something else
# A record whose control fails is measured again with more rounds; its first figures do not count.
ATTEMPTS = 3
# A call as long as this averages by itself: fewer rounds are enough, and fewer attempts can be afforded.
SLOW_ROUNDS = {2.0: 2, 0.4: 3}  # {seconds: rounds}, the longest first
SLOW_ATTEMPTS = 2

# What foreign packages raise when they cannot take a case.
PEER_FAILURES = (ImportError, OSError, RuntimeError, TypeError, ValueError)
# And what ours may raise, on top: the record is wrong, the others are measured all the same.
OUR_FAILURES = (*PEER_FAILURES, ArithmeticError, AssertionError, AttributeError, LookupError)


def problem_of(case: Case, phase: str, threads: int) -> tuple[Problem, list[Tensor]]:
    """The problem and its true results, computed by torch.nn in float64."""
    stock, x = case.stock(), case.input()
    stock64, x64 = copy.deepcopy(stock).double(), x.double()
    upstream = case.upstream(stock64, x64).to(x.dtype)
    problem = Problem(case, phase, threads, stock, x, upstream)
    truth = torch_run(stock64, problem, x64, upstream.double(), case.bind).results()
    return problem, [torch.as_tensor(t).detach().clone() for t in truth]


def labels(problem: Problem) -> list[str]:
    """Names of a contender's results, in order."""
    if problem.phase == FORWARD:
        return list(problem.case.output_names())
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


def limits_of(case: Case, stock: list[float], truth: list[Tensor]) -> list[float]:
    """The largest error that ours may have in each result, from torch's own."""
    scales = [t.abs().max().item() for t in truth]
    if case.tolerance is not None:
        return [case.tolerance * scale for scale in scales]
    unit = ROUNDING[case.dtype] * torch.finfo(case.dtype).eps
    return [ALLOWED_ERROR * error + unit * scale for error, scale in zip(stock, scales, strict=True)]


def kernels_of(run: Run) -> list[str]:
    """Which operator ran on which kernel: ``["conv_pool2d: cpu/avx512", …]``; a fallback names its reason."""
    import cnnrnn_ext

    with cnnrnn_ext.trace() as log:
        run.call()
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
    with torch.set_grad_enabled(phase == TRAINING):
        return _record(case, phase, threads, allocator, contenders, rounds)


def _record(
    case: Case, phase: str, threads: int, allocator: str, contenders: Iterable[Peer], rounds: int
) -> dict:
    problem, truth = problem_of(case, phase, threads)
    result: dict = {
        "family": case.family,
        "group": case.group,
        "case": case.name,
        "phase": phase,
        "threads": threads,
        "allocator": allocator,
        "dtype": str(case.dtype).removeprefix("torch."),
        "input_grad": case.input_grad,
        "flop": case.flop(phase),
        "reads": dict(zip(("bytes", "from_bytes"), case.reads(phase), strict=True)),
        "tolerance": case.tolerance,
        "skipped": {},
        "kernels": [],
        "errors": {},
    }
    runs: dict[str, Run] = {}
    found: dict[str, list[float]] = {}
    for peer in contenders:
        if reason := peer.missing() or peer.refuses(case):
            result["skipped"][peer.name] = reason
            continue
        expected = OUR_FAILURES if peer.name == OURS else PEER_FAILURES
        try:
            run = peer.build(problem)
            error = errors(run.results(), truth)
        except expected as failure:
            text = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            if peer.name == OURS:
                return {**result, "status": "wrong", "failure": text}
            if peer.name == STOCK:
                raise
            result["skipped"][peer.name] = text
            continue
        if peer.name not in (OURS, STOCK) and _something_else(error, truth):
            result["skipped"][peer.name] = f"computes something else: largest error {max(error):.2g}"
            continue
        runs[peer.name], found[peer.name] = run, error

    result["kernels"] = kernels_of(runs[OURS])
    result["errors"] = {
        label: {"ours": error, "torch": stock, "limit": limit, "scale": true.abs().max().item()}
        for label, error, stock, limit, true in zip(
            labels(problem),
            found[OURS],
            found[STOCK],
            limits_of(case, found[STOCK], truth),
            truth,
            strict=True,
        )
    }
    if any(e["ours"] > e["limit"] for e in result["errors"].values()):
        return {**result, "status": "wrong"}
    del truth
    if phase == TRAINING:
        result["peak_bytes"] = {name: peak_bytes(runs[name].call) for name in (OURS, STOCK)}
    variants = {}
    if case.variant:
        name, other = case.variant
        variants[f"{OURS} {name}"] = ours(_unchecked(other, phase, threads))
        result["variant"] = {"name": name, "cost": case.variant_cost}
    return {**result, **_timed(runs, variants, rounds)}


def _something_else(error: list[float], truth: list[Tensor]) -> bool:
    return any(e > PEER_TOLERANCE * t.abs().max().item() for e, t in zip(error, truth, strict=True))


def _unchecked(case: Case, phase: str, threads: int) -> Problem:
    """A problem without its truth: a variant is checked in the record that it has of its own."""
    stock, x = case.stock(), case.input()
    return Problem(case, phase, threads, stock, x, case.upstream(stock, x).to(x.dtype))


def _timed(runs: dict[str, Run], variants: dict[str, Run], rounds: int) -> dict:
    calls = {name: run.call for name, run in (runs | variants).items()}
    start = time.perf_counter()
    calls[STOCK]()
    seconds = time.perf_counter() - start
    slow = next((few for limit, few in SLOW_ROUNDS.items() if seconds > limit), None)
    rounds = min(rounds, slow or rounds)
    attempts, timings = 1, paired(calls, rounds, control=STOCK)
    while not timings.valid and attempts < (SLOW_ATTEMPTS if slow else ATTEMPTS):
        attempts += 1
        timings = paired(calls, rounds * attempts, control=STOCK)
    return {"attempts": attempts, "rounds": rounds * attempts, **summary(timings, variants)}


def summary(timings: Timings, variants: Iterable[str] = ()) -> dict:
    """Everything a report says about the timings of one record. Ratios are another's time over ours."""
    others = [name for name in timings.seconds if name not in (OURS, CONTROL)]
    peers = [name for name in others if name not in variants]
    best = min(peers, key=timings.median_ms)
    control = timings.control
    return {
        "status": "ok" if timings.valid else "void",
        "control": vars(control) if control else None,
        "best_peer": best,
        "ratios": {peer: vars(timings.ratio(peer, OURS)) for peer in others},
        "contenders": {
            name: {"median_ms": timings.median_ms(name), "min_ms": timings.min_ms(name), "seconds": values}
            for name, values in timings.seconds.items()
        },
    }
