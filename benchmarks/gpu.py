"""``python -m benchmarks.gpu``: recurrent layers on a GPU against torch.nn (cuDNN) and torch.compile.

Times are of CUDA events around calls that are already enqueued, medians of rounds in which the contenders
take turns; each round reads another part of a buffer that is larger than the second-level cache. Every point
is checked before it is timed. Each gets a share of the time limit by its arithmetic, and as many rounds as
that allows; one that does not come in time is left out, and counted. ``--plan`` lists the points, and
``--report FILE`` draws a recorded run anew; neither needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import cnnrnn_ext as cx

from .gpu_timing import EventTimer, HostTimer, median_ratio, rounds_of

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CELLS = {"LSTM": (cx.LSTM, torch.nn.LSTM), "GRU": (cx.GRU, torch.nn.GRU)}
BATCHES, HIDDEN, STEPS = (1, 8, 16, 64, 128), (64, 128, 256, 512, 768, 1024, 2048), (64, 1024)
OURS, STOCK, COMPILED, SELF = "ours", "torch.nn", "torch.compile", "torch.nn again"
PHASES = ("forward", "forward+backward")
ROTATED_BYTES = 128 << 20  # of inputs that take turns: more than a second-level cache holds
CONTROLLED = 8  # every so many points the stock module runs twice, which must give a ratio of 1
FEWEST_ROUNDS = 3


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

    @property
    def weight(self) -> float:
        """What its time is about proportional to: the steps, and the arithmetic, in units of such a step."""
        slower = {"fp32": 8, "tf32": 2}.get(self.dtype, 1)
        steps = self.t * self.layers * (1 + self.bidirectional)
        return steps * (1 + slower * self.n * self.h**2 / 2e8) + 300


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

    def __init__(self, point: Point, device: str, extra: tuple[str, ...] = ()):
        dtype = DTYPES[point.dtype]
        options = {"num_layers": point.layers, "bidirectional": point.bidirectional}
        ours, stock = (
            kind(point.h, point.h, **options, device=device, dtype=dtype) for kind in CELLS[point.cell]
        )
        ours.load_state_dict(stock.state_dict())
        self.point, self.modules = point, {OURS: ours, STOCK: stock}
        if SELF in extra:
            self.modules[SELF] = stock
        if COMPILED in extra:
            self.modules[COMPILED] = torch.compile(stock)
        shape = (point.t, point.n, point.h)
        size = torch.Size(shape).numel() * dtype.itemsize
        copies = 3 if device == "cpu" else max(3, ROTATED_BYTES // size)
        self.inputs = torch.randn((copies, *shape), device=device, dtype=dtype)
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
        x = self.inputs[turn % len(self.inputs)].detach()
        if phase == "forward":
            with torch.no_grad():
                self.output(contender, x)
            return
        for parameter in self.modules[contender].parameters():
            parameter.grad = None
        output = self.output(contender, x.requires_grad_())
        output.backward(output)

    def error(self) -> float:
        """The largest difference between ours and torch.nn's outputs."""
        with torch.no_grad():
            ours, stock = (self.output(contender, self.inputs[0]) for contender in (OURS, STOCK))
        return (ours - stock).abs().max().item()


class Pace:
    """Shares a limit of seconds among points by their weights; what one leaves over, the others get."""

    def __init__(self, points: list[Point], limit: float, clock: Callable[[], float] = time.perf_counter):
        self.clock, self.end = clock, clock() + limit
        self.weight = sum(point.weight for point in points)

    @property
    def left(self) -> float:
        return self.end - self.clock()

    def begin(self, point: Point) -> float:
        """Seconds for this point, whose turn it is."""
        share = self.left * point.weight / self.weight
        self.weight -= point.weight
        return share


def rounds_within(seconds: float, most: int) -> Callable[[float], int]:
    """How many rounds of so many seconds each fit, at least FEWEST_ROUNDS."""
    return lambda each: int(max(FEWEST_ROUNDS, min(most, seconds / max(each, 1e-9))))


def measure(
    point: Point, device: str, timer, rounds: int, seconds: float = float("inf"), extra: tuple[str, ...] = ()
) -> list[dict]:
    """The records of one point, one of each phase: medians of seconds, their ratios to ours, and the control.

    extra: which of COMPILED and SELF run beside ours and torch.nn.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = point.dtype == "tf32"
    torch.manual_seed(0)
    work = Workload(point, device, extra)
    error = work.error()
    allowed = 0.05 if DTYPES[point.dtype].itemsize == 2 else 2e-3 if point.dtype == "tf32" else 1e-4
    records = [{**asdict(point), "name": point.name, "phase": phase, "error": error} for phase in PHASES]
    if not error <= allowed:
        return [record | {"status": f"differs from torch.nn by {error:.1e}"} for record in records]
    for record, share in zip(records, (0.3, 0.7), strict=True):
        phase = record["phase"]
        calls = {who: lambda turn, who=who: work.run(who, phase, turn) for who in work.modules}  # noqa: B023
        with cx.trace() as log:
            work.run(OURS, phase, 0)
        took = rounds_of(timer, calls, rounds_within(share * seconds, rounds))
        control = median_ratio(took[STOCK], took[SELF]) if SELF in took else None
        record |= {
            "kernel": log[0].kernel,
            "reason": log[0].reason,
            "rounds": len(took[OURS]),
            "seconds": {who: statistics.median(each) for who, each in took.items()},
            "ratios": {who: median_ratio(each, took[OURS]) for who, each in took.items() if who != OURS},
            "control": control,
            "status": "ok" if control is None or abs(control - 1) <= 0.05 else "void",
        }
    return records


def best_peer(record: dict) -> tuple[str, float]:
    peers = {name: ratio for name, ratio in record["ratios"].items() if name != SELF}
    return min(peers.items(), key=lambda item: item[1])


def table(result: dict) -> str:
    """The records as Markdown; losses and void points stand there like the others."""
    made, cut = len(result["records"]), result["left_out"]
    controls = [r["control"] for r in result["records"] if r.get("control") is not None]
    told = f"{min(controls):.2f} to {max(controls):.2f}" if controls else "none"
    losses = sum(best_peer(r)[1] < 1 for r in result["records"] if "ratios" in r)
    lines = [
        f"# Recurrent layers on {result['device']}",
        "",
        f"torch {result['torch']}, cuDNN {result['cudnn']}, {result['date']}; {made} records in "
        f"{result['seconds']:.0f} s, {cut} left out by the time limit. Times in ms; the ratio is the peer's "
        f"time over ours, below 1 in {losses} records. Control, stock over stock: {told}.",
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
        control = "" if record["control"] is None else f"{record['control']:.2f}"
        lines.append(
            f"| {record['name']} | {record['phase']} | {ours:.3f} | {stock:.3f} | {name} | {ratio:.2f}{void} "
            f"| {control} | {record['kernel'] or record['reason']} |"
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


def plan(points: list[Point], limit: float) -> str:
    """The points in their order, with the seconds that each would get."""
    pace = Pace(points, limit, clock=lambda: 0.0)
    lines = [f"{point.name:44} {limit * point.weight / pace.weight:7.2f} s" for point in points]
    return "\n".join([*lines, f"{len(points)} points, each forward and forward+backward, in {limit:.0f} s"])


def run(points: list[Point], args: argparse.Namespace) -> dict:
    """Measures the points; the result as it is recorded."""
    on_gpu = args.device == "cuda"
    timer = EventTimer() if on_gpu else HostTimer()
    begun, records, left_out = time.perf_counter(), [], 0
    pace, compiled_once = Pace(points, args.limit), set()
    for index, point in enumerate(points):
        seconds = pace.begin(point)
        if pace.left <= 0:
            left_out += len(PHASES)
            continue
        extra = (SELF,) if index % CONTROLLED == 0 else ()
        # A layer is compiled for its cell and dtype once, at one size: that takes longest.
        key = (point.cell, point.dtype)
        if not (args.no_compile or point.lengths or key in compiled_once):
            compiled_once.add(key)
            extra += (COMPILED,)
        records += measure(point, args.device, timer, args.rounds, seconds, extra)
        for told in records[-len(PHASES) :]:
            verdict = "{} {:.2f}".format(*best_peer(told)) if "ratios" in told else ""
            print(f"{told['name']}, {told['phase']}: {told['status']} {verdict}", flush=True)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, a trial of the program",
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "date": time.strftime("%Y-%m-%d"), "seconds": time.perf_counter() - begun, "left_out": left_out,
        "records": records,
    }  # fmt: skip


def report(result: dict, stem: Path) -> None:
    """Writes the table and the plot beside the record."""
    stem.with_suffix(".md").write_text(table(result))
    draw(result, stem.with_suffix(".png"))
    print(stem.with_suffix(".md"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every ninth size")
    parser.add_argument(
        "--limit", type=float, default=330, help="seconds after which no point begins; %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=11, help="at most so many for a point; %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="of the names that the table shows")
    parser.add_argument("--device", default="cuda", help="cpu tries this program; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; %(default)s")
    parser.add_argument("--plan", action="store_true", help="list the points and measure nothing")
    parser.add_argument("--report", type=Path, metavar="FILE", help="a recorded run, to draw anew")
    args = parser.parse_args(argv)
    if args.report:
        return report(json.loads(args.report.read_text()), args.report.with_suffix(""))
    points = [point for point in grid(args.quick) if args.case in point.name]
    if args.plan:
        return print(plan(points, args.limit))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch")
    result = run(points, args)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / ("gpu-" + "-".join(result["device"].lower().replace(",", "").split()))
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    report(result, stem)


if __name__ == "__main__":
    main()
