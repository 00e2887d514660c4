"""The plots: one of all groups' means, and one a family with a bar per case; losses in their own colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from .report import QUOTED, Mean, means, part, slug, verdict

COLOURS = {"win": "#2a7f62", "loss": "#c0392b", "even": "#8a8f98", "void": "#d9d9d9"}
LEGEND = {"win": "ours is faster", "loss": "ours is slower", "even": "undecided", "void": "void"}
EAGER = "#9db8d2"


def draw(result: dict, folder: Path) -> list[Path]:
    """``<slug>.png``, the means, and ``<slug>-<family>.png``; returns the paths."""
    paths = [folder / f"{slug(result)}.png"]
    _draw_means(result, paths[0])
    families: dict[str, list[dict]] = {}
    for record in result["records"]:
        if record["allocator"] == QUOTED and record["status"] in ("ok", "void"):
            families.setdefault(record["family"], []).append(record)
    for family, records in families.items():
        paths.append(folder / f"{slug(result)}-{family}.png")
        _draw_family(result, family, records, paths[-1])
    return paths


def _draw_family(result: dict, family: str, records: list[dict], path: Path) -> None:
    """A column per phase, a row per number of threads; a bar from 1 is the median, its whisker p25–p75."""
    phases = tuple(dict.fromkeys(r["phase"] for r in records))
    threads = tuple(dict.fromkeys(r["threads"] for r in records))
    most = max(sum((r["phase"], r["threads"]) == (p, t) for r in records) for p in phases for t in threads)
    figure, axes = plt.subplots(
        len(threads),
        len(phases),
        figsize=(7.5 * len(phases), 1.4 + len(threads) * (0.8 + 0.28 * most)),
        squeeze=False,
        layout="constrained",
    )
    for row, n in zip(axes, threads, strict=True):
        for ax, phase in zip(row, phases, strict=True):
            _panel(ax, [r for r in records if (r["phase"], r["threads"]) == (phase, n)])
            ax.set_title(f"{family}, {phase}, {n} thread(s)", loc="left", fontsize=10)
    shown = {verdict(record) for record in records}
    patches = [Patch(color=COLOURS[v], label=text) for v, text in LEGEND.items() if v in shown]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(LEGEND), fontsize=8, frameon=False)
    void = any(part(r) in result["void"] for r in records)
    _finish(figure, result, "time of the best peer over time of ours", void, path)


def _panel(ax: plt.Axes, records: Sequence[dict]) -> None:
    records = records[::-1]  # barh counts from below
    for i, record in enumerate(records):
        ratio = record["ratios"][record["best_peer"]]
        median = ratio["median"]
        ax.barh(i, abs(median - 1), left=min(1, median), color=COLOURS[verdict(record)], height=0.65)
        ax.plot([ratio["p25"], ratio["p75"]], [i, i], color="black", linewidth=1.2)
        _annotate(ax, f"{median:.2f}× {record['best_peer']}", max(1, ratio["p75"]), i)
    _axis(ax, [record["case"] for record in records])


def _draw_means(result: dict, path: Path) -> None:
    """Of each group two bars, against torch eager and against the best peer; a whisker to the least."""
    rows = means(result["records"])[::-1]
    figure, ax = plt.subplots(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    for i, mean in enumerate(rows):
        _mean_bar(ax, i + 0.2, mean.eager, mean.eager_least, EAGER, "torch eager")
        colour = COLOURS["win" if mean.best > 1 else "loss"]
        _mean_bar(ax, i - 0.2, mean.best, mean.best_least, colour, f"best peer, {mean.records} record(s)")
    _axis(ax, [_title(mean) for mean in rows])
    void = bool(result["void"])
    _finish(figure, result, "geometric mean of the peer's time over ours; the dot is the least", void, path)


def _mean_bar(ax: plt.Axes, at: float, value: float, least: float, colour: str, text: str) -> None:
    ax.barh(at, abs(value - 1), left=min(1, value), color=colour, height=0.38)
    ax.plot([least], [at], "o", color="black", markersize=2.5)
    _annotate(ax, f"{value:.2f}× {text}", max(1, value), at)


def _title(mean: Mean) -> str:
    return f"{mean.group}, {mean.phase}, {mean.threads} thread(s)"


def _annotate(ax: plt.Axes, text: str, x: float, y: float) -> None:
    ax.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=7)


def _axis(ax: plt.Axes, names: Sequence[str]) -> None:
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}×")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.5), max(high, 2) * 4)  # room for the names of the peers
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(-0.6, max(len(names), 1) - 0.4)
    ax.spines[["top", "right"]].set_visible(False)


def _finish(figure: plt.Figure, result: dict, what: str, void: bool, path: Path) -> None:
    c = result["conditions"]
    title = f"cnnrnn_ext: {what}, {QUOTED} allocator\n{c['cpu']}, {c['cores']} cores, kernels {c['isa']}, "
    title += f"torch {c['torch']}, {c['date']}"
    warning = "VOID: a control failed, see the report\n" if void else ""
    figure.suptitle(warning + title, fontsize=9, color=COLOURS["loss"] if void else "black")
    figure.savefig(path, dpi=110)
    plt.close(figure)
