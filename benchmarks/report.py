"""What was measured, for people: JSON with every figure, Markdown tables with their conditions, and plots.

Losses are shown like wins. A report of which a part's control left its bounds says VOID in its first line.
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cnnrnn_ext._timing import CONTROL_TOLERANCE, tuned_allocator_env

from . import limits
from .peers import OURS, PEERS, STOCK

QUOTED = "tuned"  # the allocator setting whose figures are quoted

HOW_TO_READ = """\
Every cell is the median time of one call in ms; in brackets that time over ours, median of the paired ratios:
above 1 ours is faster, below 1 it is slower. The best peer's ratio has its middle half (p25–p75) beside it.
Control: stock torch over itself. FMA and read: what ours reached of the machine's limits; FMA counts the
operations of the dense direct algorithm against the float32 peak, so one that needs fewer, or bfloat16, can
exceed 100 %; read counts the bytes that must be read at least. Error: largest error against float64 over
torch's own, worst tensor; right is up to 2 and the rounding of the largest value, so small results may show
more. With narrow weights it is the largest error over the largest value, and the limit. torch eager is NCHW.
Training is forward and backward of every parameter and, unless the input is an image of at most 3 channels,
of the input; forward runs under no_grad. ONNX Runtime and OpenVINO have their operands bound once. Sizes are
steps T, batch N, input I, hidden H. Memory: the most that a training step takes at a time beside parameters
and input, ours, and ours over torch eager's. Beside ours: ours on the padded sequence of which a variable one
needs fewer steps (padded steps over needed ones in brackets), or ours in float32; its time over ours, no
peer."""


def assemble(records: list[dict], machine: dict, cores: int, quick: bool) -> dict:
    """The whole report as one JSON-able dictionary; ``machine`` is what limits.measure returned."""
    for record in records:
        record["limit_fractions"] = limit_fractions(record, machine)
    return {
        "conditions": conditions(cores),
        "quick": quick,
        "limits": machine,
        "missing_peers": {p.name: reason for p in PEERS if (reason := p.missing())},
        "void": void_parts(records),
        "wrong": [label(r) for r in records if r["status"] == "wrong"],
        "records": records,
    }


def void_parts(records: list[dict]) -> dict[str, list[str]]:
    """{part: its records whose control failed}. A part is void as a whole."""
    noisy: dict[str, list[str]] = {}
    for record in records:
        if record["status"] == "void":
            noisy.setdefault(part(record), []).append(label(record))
    return noisy


def part(record: dict) -> str:
    """What is void together: the records of a family that one process measured one after another."""
    return f"{record['family']}, {record['allocator']} allocator, {record['threads']} thread(s)"


def conditions(cores: int) -> dict:
    """Under which conditions the figures hold. No host names."""
    import torch

    from cnnrnn_ext._library import build_module

    built = build_module()
    return {
        "cpu": limits.cpu_model(),
        "cores": cores,
        "caches": limits.cache_sizes(),
        "isa": built.active_isa() if built else "none compiled",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "compiler": built.build_info()["compiler"] if built else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()}, {' '.join(platform.libc_ver())}".strip(", "),
        "peers": {k: v for p in PEERS for k, v in p.versions().items()},
        "tuned_allocator": tuned_allocator_env(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def limit_fractions(record: dict, machine: dict) -> dict:
    """Share of the FMA peak and of the read bandwidth that ours reached; empty if either is unknown."""
    threads = str(record["threads"])
    if "contenders" not in record or threads not in machine.get("fma_gflops", {}):
        return {}
    seconds = 1e-3 * record["contenders"][OURS]["median_ms"]
    fractions = {"fma": record["flop"] / seconds / 1e9 / machine["fma_gflops"][threads]}
    level = _level(record["reads"]["from_bytes"], record["threads"])
    bandwidth = machine["read_gbs"].get(level, {}).get(threads)
    if bandwidth:
        fractions |= {"read": record["reads"]["bytes"] / seconds / 1e9 / bandwidth, "read_level": level}
    return fractions


def _level(size: int, threads: int) -> str:
    caches = limits.cache_sizes()
    if size / threads <= caches.get("L2", 0):
        return "L2"
    return "L3" if size <= caches.get("L3", 0) else "DRAM"


def label(record: dict) -> str:
    return (
        f"{record['family']} {record['case']} {record['phase']}, "
        f"{record['threads']} thread(s), {record['allocator']} allocator"
    )


def one_line(record: dict) -> str:
    """Progress and pytest output: one record in one line."""
    if record["status"] == "wrong":
        return f"{label(record)}: WRONG {worst_error(record)}"
    ours, best = record["contenders"][OURS]["median_ms"], record["best_peer"]
    void = " VOID" if record["status"] == "void" else ""
    return (
        f"{label(record)}: {time_text(ours)} ms, {best} / ours {_spread(record['ratios'][best])}, "
        f"control {record['control']['median']:.3f}{void}"
    )


def worst_error(record: dict) -> str:
    """Where ours errs most in terms of what is allowed, or how it failed."""
    if "failure" in record:
        return record["failure"]
    name, error = max(record["errors"].items(), key=lambda kv: kv[1]["ours"] / max(kv[1]["limit"], 1e-300))
    return f"{name}: {error['ours']:.1e}, torch {error['torch']:.1e}, limit {error['limit']:.1e}"


def time_text(milliseconds: float) -> str:
    """Two decimals, or three significant digits below 1 ms."""
    return f"{milliseconds:.2f}" if milliseconds >= 1 else f"{milliseconds:#.3g}"


def verdict(record: dict) -> str:
    """win or loss only beyond what the control may err, and if the middle half of the ratios agrees."""
    if record["status"] != "ok":
        return record["status"]
    ratio = record["ratios"][record["best_peer"]]
    if ratio["median"] > 1 + CONTROL_TOLERANCE and ratio["p25"] > 1:
        return "win"
    return "loss" if ratio["median"] < 1 - CONTROL_TOLERANCE and ratio["p75"] < 1 else "even"


@dataclass(frozen=True)
class Mean:
    """Geometric mean and smallest of the ratios of a group's records; ``worst`` names the smallest's case."""

    group: str
    phase: str
    threads: int
    records: int
    eager: float
    eager_least: float
    best: float
    best_least: float
    worst: str


def means(records: Iterable[dict]) -> list[Mean]:
    """One row per group, phase and thread count, of the quoted records that are neither wrong nor void."""
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        if r["allocator"] == QUOTED and r["status"] == "ok":
            groups.setdefault((r["group"], r["phase"], r["threads"]), []).append(r)
    rows = []
    for key, members in groups.items():
        eager = [r["ratios"][STOCK]["median"] for r in members]
        best = [r["ratios"][r["best_peer"]]["median"] for r in members]
        worst = members[best.index(min(best))]["case"]
        mean = statistics.geometric_mean
        rows.append(Mean(*key, len(members), mean(eager), min(eager), mean(best), min(best), worst))
    return rows


def headline(result: dict) -> str:
    """The report in a few lines: void or not, wins and losses of the quoted figures, who is missing."""
    lines = [f"CRASHED, {text}: what comes after is missing." for text in result.get("crashes", [])]
    for name, noisy in result["void"].items():
        lines.append(
            f"VOID, {name}: stock against stock left 1.00 ± {CONTROL_TOLERANCE:.2f}, so no figure of that "
            f"part counts. Noisy: {'; '.join(noisy)}."
        )
    if result["wrong"]:
        lines.append(f"WRONG, not timed: {'; '.join(result['wrong'])}.")
    verdicts = [verdict(r) for r in result["records"] if r["allocator"] == QUOTED]
    lines.append(
        "Against the best peer of each record: "
        + ", ".join(f"{verdicts.count(v)} {name}" for v, name in _VERDICTS.items())
        + f" of {len(verdicts)} ({QUOTED} allocator)."
    )
    if result["missing_peers"]:
        missing = "; ".join(f"{name} ({why})" for name, why in result["missing_peers"].items())
        lines.append(f"Peers missing here: {missing}.")
    return "\n".join(lines)


_VERDICTS = {"win": "wins", "loss": "losses", "even": "undecided", "void": "void", "wrong": "wrong"}


def markdown(result: dict) -> str:
    """The whole report as Markdown."""
    c, parts = result["conditions"], ["# Benchmarks", headline(result).replace("\n", "\n\n")]
    peers = ", ".join(f"{package} {version}" for package, version in c["peers"].items() if package != "torch")
    tuned = " ".join(f"{key}={value}" for key, value in c["tuned_allocator"].items())
    parts.append(
        f"Conditions: {c['cpu']}, {c['cores']} cores, {c['system']}; kernels {c['isa']} "
        f"(torch's own: {c['torch_isa']}); torch {c['torch']}; {peers or 'no other peer installed'}; Python "
        f"{c['python']}; {c['date']}; float32 but for the narrower types that a case names; "
        f"{'a quick selection of cases and peers' if result['quick'] else 'all cases and peers'}. "
        f"Tuned allocator: `{tuned}`."
    )
    parts += [limits_table(result["limits"]), HOW_TO_READ, "## Means", _means_table(result)]
    parts.append(f"![geometric means]({slug(result)}.png)")
    shown = set()
    for title, records in _groups(result["records"]):
        void = " (VOID)" if part(records[0]) in result["void"] else ""
        parts += [f"## {title}{void}", _table(records)]
        family = records[0]["family"]
        if family not in shown:
            parts.append(f"![time of the best peer over time of ours]({slug(result)}-{family}.png)")
        shown.add(family)
    if lines := _left_out(result):
        parts += ["## Peers left out", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _means_table(result: dict) -> str:
    head = ["group", "phase", "threads", "records", "eager / ours, mean", "least", "best peer / ours, mean"]
    head += ["least", "case of the least"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    for m in means(result["records"]):
        figures = [f"{value:.2f}" for value in (m.eager, m.eager_least, m.best, m.best_least)]
        row = [m.group, m.phase, str(m.threads), str(m.records), *figures, m.worst]
        lines.append("| " + " | ".join(row) + " |")
    wrong = [r for r in result["records"] if r["allocator"] == QUOTED and r["status"] != "ok"]
    note = f"Geometric means, {QUOTED} allocator; {len(wrong)} wrong or void records are left out."
    return note + "\n\n" + "\n".join(lines)


def _left_out(result: dict) -> list[str]:
    """One line per reason: the peer, why, and of which records; of many, their families."""
    reasons: dict[tuple[str, str], list[dict]] = {}
    for r in result["records"]:
        for name, why in r["skipped"].items():
            if name not in result["missing_peers"]:
                reasons.setdefault((name, why), []).append(r)
    lines = []
    for (name, why), records in sorted(reasons.items()):
        few = len(records) <= 4
        named = [f"{r['family']} {r['case']}, {r['phase']}" if few else r["family"] for r in records]
        lines.append(f"- {name}: {why} ({len(records)} records: {'; '.join(dict.fromkeys(named))})")
    return lines


def limits_table(machine: dict) -> str:
    if "not_measured" in machine:
        return f"Limits of the machine: not measured ({machine['not_measured']})."
    rows = {"fp32 FMA, GFLOP/s": machine["fma_gflops"]}
    rows |= {f"{level} read, GB/s": values for level, values in machine["read_gbs"].items()}
    threads = list(machine["fma_gflops"])
    lines = [
        "| limit, measured in this run | " + " | ".join(f"{n} thread(s)" for n in threads) + " |",
        "|---|" + "---:|" * len(threads),
    ]
    lines += [f"| {k} | " + " | ".join(f"{v[n]:.0f}" for n in threads) + " |" for k, v in rows.items()]
    return "\n".join(lines)


def _groups(records: Iterable[dict]) -> list[tuple[str, list[dict]]]:
    groups: dict[str, list[dict]] = {}
    for r in sorted(records, key=lambda r: r["allocator"] != QUOTED):  # stable: the quoted ones come first
        title = f"{r['family']}, {r['phase']}, {r['threads']} thread(s), {r['allocator']} allocator"
        groups.setdefault(title, []).append(r)
    return list(groups.items())


def _table(records: list[dict]) -> str:
    peers = [p.name for p in PEERS if any(p.name in r.get("ratios", {}) for r in records)]
    beside = ["beside ours"] if any("variant" in r for r in records) else []
    memory = ["memory"] if any("peak_bytes" in r for r in records) else []
    head = [
        "case",
        OURS,
        *peers,
        "best peer / ours",
        "",
        *beside,
        *memory,
        "control",
        "FMA",
        "read",
        "error",
        "kernels",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    lines += ["| " + " | ".join(_row(record, peers, beside, memory)) + " |" for record in records]
    return "\n".join(lines)


def _row(record: dict, peers: list[str], beside: list[str], memory: list[str]) -> list[str]:
    ran = ", ".join(record["kernels"]) or "not traced"
    if record["status"] == "wrong":
        none, empty = ["–"] * (len(peers) + 1), ["–"] * (len(beside) + len(memory) + 3)
        return [record["case"], "not timed", *none, "**wrong**", *empty, worst_error(record), ran]
    times = record["contenders"]
    cells = [
        f"{time_text(times[p]['median_ms'])} ({record['ratios'][p]['median']:.2f})" if p in times else "–"
        for p in peers
    ]
    fractions = record.get("limit_fractions", {})
    return [
        record["case"],
        time_text(times[OURS]["median_ms"]),
        *cells,
        f"{record['best_peer']} {_spread(record['ratios'][record['best_peer']])}",
        f"**{verdict(record)}**",
        *([_beside(record)] if beside else []),
        *([_memory(record)] if memory else []),
        f"{record['control']['median']:.3f}",
        f"{100 * fractions['fma']:.0f} %" if "fma" in fractions else "–",
        f"{100 * fractions['read']:.0f} % {fractions['read_level']}" if "read" in fractions else "–",
        _error_cell(record),
        ran,
    ]


def _beside(record: dict) -> str:
    """Ours in another form, its time over ours: ``padded 1.45 (steps 1.60)``."""
    if "variant" not in record:
        return "–"
    name, cost = record["variant"]["name"], record["variant"]["cost"]
    text = f"{name} {record['ratios'][f'{OURS} {name}']['median']:.2f}"
    return text + (f" (steps {cost:.2f})" if cost else "")


def _memory(record: dict) -> str:
    """Peak of the step, ours, and ours over stock's: ``12.3 MB (0.21)``."""
    if "peak_bytes" not in record:
        return "–"
    ours, stock = record["peak_bytes"][OURS], record["peak_bytes"][STOCK]
    return f"{ours / 1e6:.1f} MB ({ours / stock:.2f})"


def _error_cell(record: dict) -> str:
    if record["tolerance"] is None:
        return f"{error_ratio(record):.2f}"
    worst = max(e["ours"] / e["scale"] for e in record["errors"].values())
    return f"{worst:.1e} (limit {record['tolerance']:.0e})"


def error_ratio(record: dict) -> float:
    """Largest of ours over torch's error; 0 where both are exact."""
    pairs = [(e["ours"], e["torch"]) for e in record["errors"].values()]
    return max(0.0 if a == 0 else a / b if b else float("inf") for a, b in pairs)


def _spread(ratio: dict) -> str:
    return f"{ratio['median']:.2f} ({ratio['p25']:.2f}–{ratio['p75']:.2f})"


def slug(result: dict) -> str:
    """File name of a report: processor, cores and what was selected, nothing that names a host."""
    c = result["conditions"]
    text = f"{c['cpu']} {c['cores']} cores {'quick' if result['quick'] else ''} {result.get('selection', '')}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(result: dict, folder: Path) -> list[Path]:
    """Writes ``<slug>.json`` and ``.md``, which shows the plots; returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table = (folder / f"{slug(result)}{ending}" for ending in (".json", ".md"))
    data.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    table.write_text(markdown(result), encoding="utf-8")
    return [data, table]
