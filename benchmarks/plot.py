"""The plot: how many times faster than the best peer, one bar per case, losses in their own colour."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .report import QUOTED, verdict

COLOURS = {"win": "#2a7f62", "loss": "#c0392b", "even": "#8a8f98", "void": "#d9d9d9"}


def draw(result: dict, path: Path) -> None:
    """One panel per family, phase and thread count; a bar from 1 is the median, its whisker p25–p75."""
    panels: dict[tuple, list[dict]] = {}
    for r in result["records"]:
        if r["allocator"] == QUOTED and r["status"] in COLOURS | {"ok": ""}:
            panels.setdefault((r["family"], r["phase"], r["threads"]), []).append(r)
    if not panels:
        return
    rows = [len(records) for records in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 1.0 * len(panels) + 0.34 * sum(rows) + 1.2),
        squeeze=False,
        gridspec_kw={"height_ratios": [n + 1.2 for n in rows]},
        layout="constrained",
    )
    for ax, ((family, phase, threads), records) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(ax, records)
        ax.set_title(f"{family}, {phase}, {threads} thread(s)", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("time of the best peer / time of ours: right of the line ours is faster")
    c = result["conditions"]
    title = f"cnnrnn_ext against the best peer of each case, float32, tuned allocator\n{c['cpu']}, "
    title += f"{c['cores']} cores, {c['isa']}, torch {c['torch']}, {c['date']}"
    figure.suptitle(("VOID: the control failed\n" if result["void"] else "") + title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(ax: plt.Axes, records: list[dict]) -> None:
    records = records[::-1]  # barh counts from below
    ratios = [r["ratios"][r["best_peer"]] for r in records]
    medians = [q["median"] for q in ratios]
    spread = [[q["median"] - q["p25"] for q in ratios], [q["p75"] - q["median"] for q in ratios]]
    colours = [COLOURS[verdict(r)] for r in records]
    ax.barh(range(len(records)), [m - 1 for m in medians], left=1, xerr=spread, color=colours, height=0.65)
    ax.axvline(1, color="black", linewidth=1)
    low, high = min(0.5, *medians), max(1.5, *medians)
    ax.set_xlim(max(0, low - 0.1), high * 1.25)
    ax.set_yticks(range(len(records)), [r["case"] for r in records], fontsize=8)
    for i, (r, q) in enumerate(zip(records, ratios, strict=True)):
        ax.annotate(
            f"{q['median']:.2f}× {r['best_peer']}" + (" (void)" if r["status"] == "void" else ""),
            (max(1, q["p75"], q["median"]), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    ax.spines[["top", "right"]].set_visible(False)
