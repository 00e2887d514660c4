"""``python -m benchmarks.gpu``: recurrent layers on a GPU against torch.nn (cuDNN) and torch.compile.

Times are of CUDA events around calls that are already enqueued, medians of rounds in which the contenders
take turns; each round reads another copy of the input, so that the second-level cache holds none of them.
Every case is checked before it is timed. A point that does not come in time is left out, and counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import cnnrnn_ext as cx

from .gpu_timing import EventTimer, HostTimer

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CELLS = {"LSTM": (cx.LSTM, torch.nn.LSTM), "GRU": (cx.GRU, torch.nn.GRU)}
BATCHES, HIDDEN, STEPS = (1, 8, 16, 64, 128), (64, 128, 256, 512, 768, 1024, 2048), (64, 1024)
OURS, STOCK, COMPILED, SELF = "ours", "torch.nn", "torch.compile", "torch.nn again"
PHASES = ("forward", "forward+backward")
ROTATED_BYTES = 128 << 20  # of inputs that take turns: more than a second-level cache holds


@dataclass(frozen=True)
class Point:
    """One layer and one input [T, N, H]."""

    cell: str
    dtype: str
    t: int
    n: int
    h: int
    layers: int = 1
    bidirectional: bool = False
    lengths: bool = False

    @property
    def name(self) -> str:
        parts = [self.cell, self.dtype, f"T{self.t}", f"N{self.n}", f"H{self.h}"]
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        parts += ["both ways"] if self.bidirectional else []
        return " ".join([*parts, "lengths"] if self.lengths else parts)


def grid(quick: bool = False) -> Iterator[Point]:
    """The most telling first, so that a time limit cuts the least of them."""
    bar = Point("LSTM", "fp16", 1024, 16, 768)
    yield bar
    dtypes, cells = ("bf16", "fp16", "fp32", "tf32"), tuple(CELLS)
    for dtype in dtypes:
        for cell in cells:
            yield Point(cell, dtype, 64, 16, 256, layers=2, bidirectional=True)
            yield Point(cell, dtype, 64, 64, 256, lengths=True)
    sizes = [(t, n, h) for t in STEPS for h in HIDDEN for n in BATCHES]
    for t, n, h in sizes[:: 9 if quick else 1]:
        for dtype in dtypes:
            for cell in cells:
                if Point(cell, dtype, t, n, h) != bar:
                    yield Point(cell, dtype, t, n, h)


class Workload:
    """The contenders of a point on a device, each a function of (phase, which input)."""

    def __init__(self, point: Point, device: str, compiled: bool):
        dtype = DTYPES[point.dtype]
        options = {"num_layers": point.layers, "bidirectional": point.bidirectional}
        ours, stock = (
            kind(point.h, point.h, **options, device=device, dtype=dtype) for kind in CELLS[point.cell]
        )
        ours.load_state_dict(stock.state_dict())
        self.point, self.modules = point, {OURS: ours, STOCK: stock, SELF: stock}
        if compiled:
            self.modules[COMPILED] = torch.compile(stock)
        shape = (point.t, point.n, point.h)
        copies = max(2, min(16, ROTATED_BYTES // (torch.Size(shape).numel() * dtype.itemsize)))
        if device == "cpu":
            copies = 2
        self.inputs = [
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(copies)
        ]
        self.lengths = None
        if point.lengths:
            self.lengths = torch.arange(point.n, 0, -1, device=device) * point.t // point.n
            self.lengths.clamp_(min=1)
            self.on_host = self.lengths.cpu()

    def output(self, contender: str, x: torch.Tensor) -> torch.Tensor:
        module = self.modules[contender]
        if self.lengths is None:
            return module(x)[0]
        if contender == OURS:
            return module(x, lengths=self.lengths)[0]
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, self.on_host)
        return torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], total_length=self.point.t)[0]

    def run(self, contender: str, phase: str, turn: int) -> None:
        x = self.inputs[turn % len(self.inputs)]
        if phase == "forward":
            with torch.no_grad():
                self.output(contender, x)
        else:
            x.grad = None
            for parameter in self.modules[contender].parameters():
                parameter.grad = None
            output = self.output(contender, x)
            output.backward(output)

    def error(self) -> float:
        """The largest difference between ours and torch.nn's outputs."""
        with torch.no_grad():
            return (self.output(OURS, self.inputs[0]) - self.output(STOCK, self.inputs[0])).abs().max().item()


def measure(point: Point, phase: str, device: str, compiled: bool, rounds: int, timer) -> dict:
    """The record of one point and phase: medians of seconds, their ratios to ours, and the control."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = point.dtype == "tf32"
    torch.manual_seed(0)
    work = Workload(point, device, compiled)
    error = work.error()
    allowed = 0.05 if DTYPES[point.dtype].itemsize == 2 else 2e-3 if point.dtype == "tf32" else 1e-4
    record = {**asdict(point), "name": point.name, "phase": phase, "error": error}
    if not error <= allowed:
        return record | {"status": f"differs from torch.nn by {error:.1e}"}
    with cx.trace() as log:
        work.output(OURS, work.inputs[0])
    contenders = list(work.modules)
    for contender in contenders:
        work.run(contender, phase, 0)
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for turn in range(rounds):
        order = contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]
        calls = [lambda c=c: work.run(c, phase, turn) for c in order]  # noqa: B023, called in this round
        for contender, took in zip(order, timer.time(calls), strict=True):
            seconds[contender].append(took)
    medians = {contender: statistics.median(took) for contender, took in seconds.items()}
    ratios = {
        contender: statistics.median(theirs / ours for theirs, ours in zip(took, seconds[OURS], strict=True))
        for contender, took in seconds.items()
        if contender != OURS
    }
    control = statistics.median(a / b for a, b in zip(seconds[STOCK], seconds[SELF], strict=True))
    status = "ok" if abs(control - 1) <= 0.05 else "void"
    return record | {
        "kernel": log[0].kernel, "reason": log[0].reason, "seconds": medians, "ratios": ratios,
        "control": control, "status": status,
    }  # fmt: skip


def best_peer(record: dict) -> tuple[str, float]:
    peers = {name: ratio for name, ratio in record["ratios"].items() if name != SELF}
    return min(peers.items(), key=lambda item: item[1])


def table(result: dict) -> str:
    """The records as Markdown; losses and void points stand there like the others."""
    made, cut = len(result["records"]), result["left_out"]
    lines = [
        f"# Recurrent layers on {result['device']}",
        "",
        f"torch {result['torch']}, cuDNN {result['cudnn']}, {result['date']}; {made} records in "
        f"{result['seconds']:.0f} s, {cut} left out by the time limit. Times in ms; the ratio is the peer's "
        "time over ours.",
        "",
        "| case | phase | ours | torch.nn | best peer | ratio | control | schedule |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in result["records"]:
        if "seconds" not in record:
            lines.append(f"| {record['name']} | {record['phase']} | {record['status']} | | | | | |")
            continue
        name, ratio = best_peer(record)
        ours, stock = (1e3 * record["seconds"][who] for who in (OURS, STOCK))
        void = " (void)" if record["status"] == "void" else ""
        lines.append(
            f"| {record['name']} | {record['phase']} | {ours:.3f} | {stock:.3f} | {name} | {ratio:.2f}{void} "
            f"| {record['control']:.2f} | {record['kernel'] or record['reason']} |"
        )
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """For each dtype and phase the ratio to the best peer over H, a line per (cell, T, N)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [r for r in result["records"] if r["status"] == "ok" and r["layers"] == 1 and not r["lengths"]]
    dtypes = list(dict.fromkeys(r["dtype"] for r in records)) or ["none"]
    figure, axes = plt.subplots(
        len(PHASES), len(dtypes), figsize=(5 * len(dtypes), 8), squeeze=False, layout="constrained"
    )
    for row, phase in zip(axes, PHASES, strict=True):
        for ax, dtype in zip(row, dtypes, strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            for r in records:
                if (r["dtype"], r["phase"]) == (dtype, phase):
                    key = f"{r['cell']} T{r['t']} N{r['n']}"
                    lines.setdefault(key, []).append((r["h"], best_peer(r)[1]))
            for label, points in lines.items():
                ax.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
            ax.axhline(1, color="black", linewidth=1)
            ax.set(xscale="log", yscale="log", xlabel="H", ylabel="best peer's time over ours")
            ax.set_title(f"{dtype}, {phase}", loc="left", fontsize=10)
            if lines:
                ax.legend(fontsize=5, ncols=2, frameon=False)
    figure.suptitle(f"cnnrnn_ext on {result['device']}, torch {result['torch']}, {result['date']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every ninth size")
    parser.add_argument(
        "--limit", type=float, default=330, help="seconds after which no point begins; %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes longest"
    )
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="of the names that the table shows")
    parser.add_argument("--device", default="cuda", help="cpu tries this program; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; %(default)s")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch")
    on_gpu = args.device == "cuda"
    timer = EventTimer() if on_gpu else HostTimer()
    begun, records, left_out = time.perf_counter(), [], 0
    # A layer is compiled for its cell and dtype once, at one size.
    compiled_once = set()
    for point in grid(args.quick):
        if args.case not in point.name:
            continue
        for phase in PHASES:
            if time.perf_counter() - begun > args.limit:
                left_out += 1
                continue
            key = (point.cell, point.dtype, phase)
            compiled = not args.no_compile and not point.lengths and key not in compiled_once
            compiled_once.add(key)
            records.append(measure(point, phase, args.device, compiled, args.rounds, timer))
            told = records[-1]
            verdict = "{} {:.2f}".format(*best_peer(told)) if "ratios" in told else ""
            print(f"{point.name}, {phase}: {told['status']} {verdict}", flush=True)
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, a trial of the program",
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "date": time.strftime("%Y-%m-%d"), "seconds": time.perf_counter() - begun, "left_out": left_out,
        "records": records,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / ("gpu-" + "-".join(result["device"].lower().replace(",", "").split()))
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result))
    draw(result, stem.with_suffix(".png"))
    print(stem.with_suffix(".md"))


if __name__ == "__main__":
    main()
