"""The picture of the scaling curves: a column per sweep; of each subject a row for time, one for GFLOP/s."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .peers import OURS
from .report import slug
from .scaling import CLIFF, SUBJECTS, curves

QUANTITIES = {"us_per_step": "µs a {}", "gflops": "GFLOP/s"}
COLOURS = ("#2a7f62", "#8a8f98")  # ours, torch
STYLES = ("-", "--", ":", "-.")  # by number of threads


def draw(result: dict, folder: Path) -> list[Path]:
    lines = curves(result["points"])
    subjects = [name for name in SUBJECTS if any(name == key[0] for key in lines)]
    rows = [(name, quantity) for name in subjects for quantity in QUANTITIES]
    columns = max(len(subject.sweeps) for subject in SUBJECTS.values())
    threads = sorted({key[2] for key in lines})
    figure, axes = plt.subplots(
        max(1, len(rows)),
        columns,
        figsize=(4.2 * columns, 0.9 + 2.3 * max(1, len(rows))),
        squeeze=False,
        layout="constrained",
    )
    for row, (name, quantity) in zip(axes, rows, strict=False):
        for ax, sweep in zip(row, SUBJECTS[name].sweeps, strict=True):
            for key, line in lines.items():
                if key[:2] == (name, sweep):
                    _line(ax, line, quantity, key, threads)
            for cliff in result["cliffs"]:
                if (cliff["subject"], cliff["sweep"], cliff["contender"]) == (name, sweep, OURS):
                    ax.axvline(cliff["value"], color="#c0392b", linewidth=0.8)
            _axis(ax, sweep, quantity, name)
    handles = {h.get_label(): h for ax in axes.flat for h in ax.get_lines() if h.get_label()[0] != "_"}
    figure.legend(
        handles=list(handles.values()), loc="outside lower right", ncols=4, fontsize=8, frameon=False
    )
    c = result["conditions"]
    title = (
        f"Forward, float32; a red line is a point {CLIFF}× as slow per operation as both neighbours\n"
        f"{c['cpu']}, {c['cores']} cores, kernels {c['isa']}, torch {c['torch']}, {c['date']}"
    )
    figure.suptitle(title, fontsize=10)
    path = folder / f"{slug(result)}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return [path]


def _line(ax: plt.Axes, line: list[dict], quantity: str, key: tuple, threads: list[int]) -> None:
    _, _, n, name = key
    ax.plot(
        [point["value"] for point in line],
        [point[quantity] for point in line],
        STYLES[threads.index(n) % len(STYLES)],
        color=COLOURS[name != OURS],
        marker=".",
        markersize=4,
        linewidth=1.2,
        label=f"{name}, {n} thread(s)",
    )


def _axis(ax: plt.Axes, sweep: str, quantity: str, subject: str) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    if quantity == "us_per_step":
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.set_title(f"{SUBJECTS[subject].title}, {sweep}", loc="left", fontsize=9)
    ax.set_ylabel(QUANTITIES[quantity].format(SUBJECTS[subject].unit), fontsize=8)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
