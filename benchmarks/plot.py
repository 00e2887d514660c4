"""The plot: how many times faster than the best peer, one bar per case, losses in their own colour."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from .report import QUOTED, part, verdict

COLOURS = {"win": "#2a7f62", "loss": "#c0392b", "even": "#8a8f98", "void": "#d9d9d9"}
LEGEND = {"win": "ours is faster", "loss": "ours is slower", "even": "undecided", "void": "void"}


def draw(result: dict, path: Path) -> None:
    """One panel per family, phase and thread count; a bar from 1 is the median, its whisker p25–p75."""
    panels: dict[tuple, list[dict]] = {}
    for record in result["records"]:
        if record["allocator"] == QUOTED and record["status"] in ("ok", "void"):
            panels.setdefault((record["family"], record["phase"], record["threads"]), []).append(record)
    rows = [len(records) for records in panels.values()]
    figure, axes = plt.subplots(
        max(1, len(panels)),
        1,
        figsize=(9, 2.0 + 0.7 * len(panels) + 0.3 * sum(rows)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [n + 0.6 for n in rows] or [1]},
        layout="constrained",
    )
    for ax, ((family, phase, threads), records) in zip(axes[:, 0], panels.items(), strict=False):
        _panel(ax, records)
        ax.set_title(f"{family}, {phase}, {threads} thread(s)", loc="left", fontsize=10)
    bottom = axes[-1, 0]
    bottom.set_xscale("log", base=2)
    bottom.xaxis.set_major_formatter("{x:g}×")
    low, high = bottom.get_xlim()
    bottom.set_xlim(min(low, 0.5), max(high, 2) * 1.6)  # room for the names of the peers
    bottom.set_xlabel("time of the best peer over time of ours (right of the line ours is faster)")
    shown = {verdict(record) for records in panels.values() for record in records}
    patches = [Patch(color=COLOURS[v], label=text) for v, text in LEGEND.items() if v in shown]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(LEGEND), fontsize=8, frameon=False)
    c = result["conditions"]
    title = f"cnnrnn_ext against the best peer of each case, float32, {QUOTED} allocator\n{c['cpu']}, "
    title += f"{c['cores']} cores, kernels {c['isa']}, torch {c['torch']}, {c['date']}"
    quoted = {part(record) for records in panels.values() for record in records}
    void = "VOID: the control failed, no figure counts\n" if quoted & set(result["void"]) else ""
    figure.suptitle(void + title, fontsize=10, color=COLOURS["loss"] if void else "black")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(ax: plt.Axes, records: list[dict]) -> None:
    records = records[::-1]  # barh counts from below
    for i, record in enumerate(records):
        ratio = record["ratios"][record["best_peer"]]
        median = ratio["median"]
        ax.barh(i, abs(median - 1), left=min(1, median), color=COLOURS[verdict(record)], height=0.65)
        ax.plot([ratio["p25"], ratio["p75"]], [i, i], color="black", linewidth=1.2)
        ax.annotate(
            f"{median:.2f}× {record['best_peer']}",
            (max(1, ratio["p75"]), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(range(len(records)), [record["case"] for record in records], fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
