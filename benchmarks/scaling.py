"""``python -m benchmarks --scaling``: forward time over sizes and threads, ours and torch's, and cliffs.

Recurrent layers over T, N and H; the convolution block over batch, channels and image size. A cliff is a
point that takes CLIFF times as long per operation as both of its neighbours: a size that falls off the fast
path, not a curve that bends.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import report
from .cases import FORWARD, Case, ConvPoolCase, RNNCase
from .cases.rnn import CELLS, TITLES
from .measure import record
from .peers import CONTENDERS, OURS, STOCK

CLIFF = 1.5
ROUNDS = 3
CURVES = (OURS, STOCK)

# What stands still, what is swept, and its values: sizes beside multiples of a vector are among them.
Sweeps = dict[str, tuple[dict[str, int], str, tuple[int, ...]]]
RECURRENT: Sweeps = {
    "T at N16 H256": ({"n": 16, "h": 256}, "t", (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)),
    "N at T32 H256": (
        {"t": 32, "h": 256},
        "n",
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24, 32, 48, 64, 96, 128),
    ),
    "H at T32 N1": (
        {"t": 32, "n": 1},
        "h",
        (16, 32, 48, 64, 96, 100, 128, 129, 160, 200, 256, 257, 320, 384, 512, 650, 768, 1024),
    ),
    "H at T32 N16": (
        {"t": 32, "n": 16},
        "h",
        (16, 32, 48, 64, 96, 100, 128, 129, 160, 200, 256, 257, 320, 384, 512, 650, 768),
    ),
}
CONVOLUTION: Sweeps = {
    "N at 64 → 64, 56²": ({"c": 64, "s": 56}, "n", (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)),
    "C at N8, 28²": (
        {"n": 8, "s": 28},
        "c",
        (4, 8, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 130, 192, 256, 384, 512),
    ),
    "S at N8, 64 → 64": (
        {"n": 8, "c": 64},
        "s",
        (6, 7, 8, 10, 13, 14, 15, 16, 20, 27, 28, 29, 32, 48, 56, 57, 64, 96, 112),
    ),
    "S at N16, 3 → 32": (
        {"n": 16, "c": 3, "k": 32},
        "s",
        (8, 12, 16, 20, 28, 31, 32, 33, 48, 56, 64, 96, 112, 113, 128, 224),
    ),
}


@dataclass(frozen=True)
class Subject:
    """What curves are of: its cases by size, and what their times are divided by."""

    title: str
    family: str
    sweeps: Sweeps
    case: Callable[[dict[str, int]], Case]
    unit: str
    units: str  # the size that is their number


def _recurrent(cell: str, size: dict[str, int]) -> RNNCase:
    return RNNCase(cell, size["t"], size["n"], size["h"], size["h"])


def _convolution(size: dict[str, int]) -> ConvPoolCase:
    return ConvPoolCase(size["n"], size["c"], size["s"], size.get("k", size["c"]), padding=1)


SUBJECTS = {
    cell: Subject(TITLES[cell], cell, RECURRENT, functools.partial(_recurrent, cell), "step", "t")
    for cell in CELLS
} | {
    "conv_pool": Subject("3×3 + pool 2", ConvPoolCase.family, CONVOLUTION, _convolution, "image", "n"),
}


def points(quick: bool, family: str | None = None) -> Iterator[tuple[str, str, int, Case, int]]:
    """(subject, sweep, value, case, steps or images).

    With --quick every third value, and of the cells the LSTM alone.
    """
    for name, subject in SUBJECTS.items():
        if family not in (None, subject.family) or (quick and name in CELLS[1:]):
            continue
        for sweep, (fixed, swept, values) in subject.sweeps.items():
            for value in values[:: 3 if quick else 1]:
                size = fixed | {swept: value}
                yield name, sweep, value, subject.case(size), size[subject.units]


def measure(threads: int, quick: bool, family: str | None, found: Callable[[dict], None]) -> None:
    """Measures every point in this process and hands each to ``found``."""
    contenders = [peer for peer in CONTENDERS if peer.name in CURVES]
    for name, sweep, value, case, steps in points(quick, family):
        result = record(case, FORWARD, threads, report.QUOTED, contenders, ROUNDS)
        found({**result, "sweep": sweep, "value": value, "subject": name, "steps": steps})
        print(report.one_line(result), flush=True)


def curves(measured: Iterable[dict]) -> dict[tuple[str, str, int, str], list[dict]]:
    """{(subject, sweep, threads, contender): its points in order}, wrong and void ones left out."""
    result: dict[tuple[str, str, int, str], list[dict]] = {}
    for point in measured:
        if point["status"] == "ok":
            for name in CURVES:
                ms = point["contenders"][name]["median_ms"]
                key = (point["subject"], point["sweep"], point["threads"], name)
                result.setdefault(key, []).append(
                    {
                        "value": point["value"],
                        "us_per_step": 1e3 * ms / point["steps"],
                        "gflops": 1e-6 * point["flop"] / ms,
                    }
                )
    return result


def cliffs(measured: Iterable[dict]) -> list[dict]:
    """Points of which the cost of an operation is CLIFF times that of both neighbours, ours and torch's."""
    found = []
    for (subject, sweep, threads, name), line in curves(measured).items():
        for before, here, after in zip(line, line[1:], line[2:], strict=False):
            slower = min(before["gflops"], after["gflops"]) / here["gflops"]
            if slower >= CLIFF:
                place = {"subject": subject, "sweep": sweep, "threads": threads, "contender": name}
                found.append({**place, "value": here["value"], "slower": slower})
    return found


def assemble(measured: list[dict], conditions: dict, machine: dict, quick: bool) -> dict:
    return {
        "conditions": conditions,
        "quick": quick,
        "selection": "scaling",
        "limits": machine,
        "wrong": [report.label(p) for p in measured if p["status"] == "wrong"],
        "void": [report.label(p) for p in measured if p["status"] == "void"],
        "cliffs": cliffs(measured),
        "points": measured,
    }


def headline(result: dict) -> str:
    """Wrong and void points, which no curve shows, and the cliffs of ours; torch's own are counted."""
    lines = [f"WRONG, not timed: {'; '.join(result['wrong'])}."] if result["wrong"] else []
    lines += [f"Void by their control: {'; '.join(result['void'])}."] if result["void"] else []
    ours = [c for c in result["cliffs"] if c["contender"] == OURS]
    lines.append(
        f"Points at least {CLIFF} times as slow per operation as both neighbours: {len(ours)} of ours, "
        f"{len(result['cliffs']) - len(ours)} of torch's."
    )
    lines += [
        f"CLIFF: {SUBJECTS[c['subject']].title}, {c['sweep']}, at {c['value']}, {c['threads']} thread(s): "
        f"{c['slower']:.2f}×"
        for c in ours
    ]
    return "\n".join(lines)


def write(result: dict, folder: Path) -> list[Path]:
    """Writes ``<slug>.json`` and ``.md``; returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    c, name = result["conditions"], report.slug(result)
    data, text = (folder / f"{name}{ending}" for ending in (".json", ".md"))
    data.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = [
        "# Scaling, forward",
        headline(result).replace("\n", "\n\n"),
        f"Conditions: {c['cpu']}, {c['cores']} cores, {c['system']}; kernels {c['isa']}; torch {c['torch']}; "
        f"{c['date']}; float32, tuned allocator; recurrent layers with I = H. Ours and torch "
        "eager are timed in turns and checked against float64 first, as everywhere in these benchmarks.",
        report.limits_table(result["limits"]),
        f"![time of a step or an image and GFLOP/s over sizes and threads]({name}.png)",
    ]
    text.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [data, text]
