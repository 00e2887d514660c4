"""The same cases under pytest-benchmark, to compare one commit with another: ``make bench`` compares peers.

    pytest benchmarks --benchmark-only --benchmark-save=before
    pytest benchmarks --benchmark-only --benchmark-compare

Ours and stock torch stand side by side in each group, so that a slower machine shows in both.
"""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, TRAINING, Case
from .measure import errors, kernels_of, limits_of, problem_of
from .peers import CONTENDERS, OURS, STOCK, Problem

BUILD = {peer.name: peer.build for peer in CONTENDERS if peer.name in (OURS, STOCK)}


@pytest.fixture(scope="module")
def checked(request: pytest.FixtureRequest) -> Problem:
    """The problem, after the results of ours were compared with float64; gradients are on in training."""
    case, phase = request.param
    with torch.set_grad_enabled(phase == TRAINING):
        problem, truth = problem_of(case, phase, torch.get_num_threads())
        found = {name: errors(build(problem).results(), truth) for name, build in BUILD.items()}
        for error, limit in zip(found[OURS], limits_of(case, found[STOCK], truth), strict=True):
            assert error <= limit
        yield problem


def _name(value: tuple[Case, str]) -> str:
    return f"{value[0].family}-{value[0].name}-{value[1]}".replace(" ", "")


@pytest.mark.parametrize("checked", [(c, p) for c in CASES for p in c.phases], indirect=True, ids=_name)
@pytest.mark.parametrize("contender", BUILD)
def test_speed(benchmark, checked: Problem, contender: str) -> None:
    run = BUILD[contender](checked)
    benchmark.group = f"{checked.case.family} {checked.case.name} {checked.phase}"
    benchmark.extra_info["threads"] = checked.threads
    if contender == OURS:
        benchmark.extra_info["kernels"] = kernels_of(run)
    benchmark.pedantic(run.call, rounds=7, warmup_rounds=3)
