"""The curves over sizes: which are measured, what counts as a cliff, and what is drawn."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[1]))  # at the end: an installed cnnrnn_ext keeps its place

from benchmarks import plot_scaling, report, scaling
from benchmarks.peers import OURS, STOCK


def scaling_point(value, ms, threads=2, **changes):
    ours, stock = ({"median_ms": factor * ms} for factor in (1.0, 2.0))
    place = {"subject": "gru", "sweep": "N at T32 H256", "value": value, "threads": threads, "steps": 32}
    return {"status": "ok", **place, "flop": 1e6 * value, "contenders": {OURS: ours, STOCK: stock}, **changes}


def test_a_cliff_is_slower_per_operation_than_both_neighbours():
    bend = [scaling_point(n, n) for n in (1, 2, 3)] + [scaling_point(n, 2 * n) for n in (4, 8)]
    assert scaling.cliffs(bend) == []
    hole = [scaling_point(1, 1), scaling_point(2, 4), scaling_point(4, 5)]
    found = scaling.cliffs(hole)
    assert [(c["value"], c["contender"], c["slower"]) for c in found] == [
        (2, OURS, pytest.approx(1.6)),
        (2, STOCK, pytest.approx(1.6)),
    ]
    elsewhere = [*hole[:1], scaling_point(2, 4, threads=1), *hole[2:]]
    assert scaling.cliffs(elsewhere) == []
    assert scaling.cliffs([hole[0], hole[1] | {"status": "void"}, hole[2]]) == []


@pytest.mark.parametrize("family", [None, "conv_pool", "lstm"])
def test_scaling_covers_every_sweep_of_a_family(family):
    found = {(subject, sweep) for subject, sweep, *_ in scaling.points(quick=False, family=family)}
    assert found == {
        (name, sweep)
        for name, subject in scaling.SUBJECTS.items()
        for sweep in subject.sweeps
        if family in (None, subject.family)
    }
    for _, sweep, value, case, steps in scaling.points(quick=False, family=family):
        assert value in dataclasses.astuple(case), sweep
        assert steps in dataclasses.astuple(case), sweep


def test_scaling_draws_what_it_measured(tmp_path):
    point = scaling_point(2, 1.0, subject="conv_pool", sweep="N at 64 → 64, 56²")
    result = scaling.assemble([point], report.conditions(2), {"not_measured": "here"}, quick=True)
    assert "![" in scaling.write(result, tmp_path)[1].read_text()
    (picture,) = plot_scaling.draw(result, tmp_path)
    assert picture.stat().st_size > 5000
