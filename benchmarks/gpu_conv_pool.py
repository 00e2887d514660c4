"""``python -m benchmarks.gpu_conv_pool``: the convolution block on a GPU against torch.nn and torch.compile.

The CPU grid's shapes at 8 times the batch, in each precision. Before a case is timed its outputs are checked
on the first images against torch.nn in float64: ours may err at most twice as much as torch's own. Beside
each time stand the arithmetic that a dense convolution would have done in it, the fewest bytes that must pass
through memory, and what share of the time those take at the bandwidth of a plain copy, measured in the same
run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import cnnrnn_ext as cx

from .cases import FORWARD, PHASES, ConvPoolCase
from .cases.conv_pool import CASES
from .gpu_timing import EventTimer, HostTimer, median_ratio, rounds_of

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS, OURS_NHWC = "ours", "ours, channels_last"
STOCK, STOCK_NHWC, COMPILED = "eager", "eager, channels_last", "max-autotune"
CONTROL = "eager again"
BATCH_FACTOR = 8
CHECKED_IMAGES = 4
ROTATED_BYTES = 128 << 20  # of inputs that take turns: more than a second-level cache holds


def grid(quick: bool) -> list[ConvPoolCase]:
    return [replace(case, n=BATCH_FACTOR * case.n) for case in CASES if case.quick or not quick]


def copy_bandwidth(device: str, timer, rounds: int) -> float:
    """Bytes a second, read and written, of copies of a tensor that no cache holds."""
    source = torch.zeros((1 << 30) if device == "cuda" else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # uncounted
    return 2 * source.numel() / statistics.median(timer.time([lambda: target.copy_(source)] * rounds))


def least_bytes(case: ConvPoolCase, phase: str, size: int) -> int:
    """Bytes that pass through memory at least: operands and results once; in training also the codes twice, x
    and the gradient of y, and the gradients."""
    height, width = case.size
    _, weights, outputs = case.costs()
    x = case.n * case.c * height * width
    forward = size * (x + weights + outputs)
    if phase == FORWARD:
        return forward
    return forward + size * (x + 2 * weights + outputs + (x if case.input_grad else 0)) + 2 * outputs


class Workload:
    """The contenders of a case on a device."""

    def __init__(self, case: ConvPoolCase, precision: str, device: str, compiled: bool):
        dtype = DTYPES[precision]
        self.case = case
        stock = case.stock().to(device, dtype)
        ours = case.ours(case.stock()).to(device, dtype)
        ours.load_state_dict(stock[0].state_dict())
        ours.precision = "high" if precision == "tf32" else "highest"
        self.modules = {OURS: ours, STOCK: stock, CONTROL: stock}
        layout = {}
        if case.image_layout and case.c > 1:  # of one channel both layouts are the same
            self.modules |= {OURS_NHWC: ours, STOCK_NHWC: stock}
            layout = {OURS_NHWC: torch.channels_last, STOCK_NHWC: torch.channels_last}
        if compiled:
            self.modules[COMPILED] = torch.compile(stock, mode="max-autotune")
        shape = case.input().shape
        copies = max(1, min(8, ROTATED_BYTES // (shape.numel() * dtype.itemsize)))
        drawn = [torch.randn(shape, device=device, dtype=dtype) for _ in range(copies)]
        self.inputs = {
            name: [
                x.to(memory_format=layout.get(name, torch.contiguous_format))
                .detach()
                .requires_grad_(case.input_grad)
                for x in drawn
            ]
            for name in self.modules
        }
        with torch.no_grad():
            self.upstream = torch.randn_like(stock(drawn[0]))

    def run(self, name: str, phase: str, turn: int = 0) -> None:
        x, module = self.inputs[name][turn % len(self.inputs[name])], self.modules[name]
        if phase == FORWARD:
            with torch.no_grad():
                module(x)
            return
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        module(x).backward(self.upstream)

    def errors(self) -> tuple[float, float, float]:
        """(ours, torch's own, one unit in the last place) against float64, of the first images."""
        x = self.inputs[STOCK][0][:CHECKED_IMAGES].detach()
        with torch.no_grad():
            truth = copy.deepcopy(self.modules[STOCK]).double()(x.double())
            ours, stock = ((self.modules[name](x) - truth).abs().max().item() for name in (OURS, STOCK))
        return ours, stock, torch.finfo(x.dtype).eps * truth.abs().max().item()


def measure(case: ConvPoolCase, precision: str, phase: str, args: argparse.Namespace, timer) -> dict:
    """The record of one case: medians of seconds, their ratios to ours, memory, and the control."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.manual_seed(0)
    work = Workload(case, precision, args.device, not args.no_compile)
    ours, stock, unit = work.errors()
    record = {
        "case": case.name,
        "precision": precision,
        "phase": phase,
        "error": ours,
        "error_of_torch": stock,
        "flop": case.flop(phase),
        "least_bytes": least_bytes(case, phase, DTYPES[precision].itemsize),
    }
    if not ours <= 2 * stock + unit:
        return record | {"status": "wrong"}
    with cx.trace() as log:
        work.run(OURS, phase)
    calls: dict[str, Callable[[int], object]] = {
        name: lambda turn, name=name: work.run(name, phase, turn) for name in work.modules
    }
    seconds = rounds_of(timer, calls, args.rounds)
    control = median_ratio(seconds[CONTROL], seconds[STOCK])
    return record | {
        "kernel": log[0].kernel or log[0].reason,
        "seconds": {name: statistics.median(took) for name, took in seconds.items()},
        "ratios": {name: median_ratio(took, seconds[OURS]) for name, took in seconds.items() if name != OURS},
        "peak_bytes": {
            name: timer.peak_bytes(lambda name=name: work.run(name, phase))
            for name in work.modules
            if name != CONTROL
        },
        "control": control,
        "status": "ok" if abs(control - 1) <= 0.05 else "void",
    }


def best_peer(record: dict) -> str:
    return min(
        (n for n in (STOCK, STOCK_NHWC, COMPILED) if n in record["seconds"]), key=record["seconds"].get
    )


def table(result: dict) -> str:
    """The records as Markdown; losses and void records stand there like the others."""
    lines = [
        f"# conv_pool on {result['device']}",
        "",
        f"torch {result['torch']}, cuDNN {result['cudnn']}, {result['date']}; "
        f"{len(result['records'])} records in {result['seconds']:.0f} s, {result['left_out']} left out by "
        "the time limit. Times in ms; the ratio is the best peer's time over ours; TFLOP/s: of a dense "
        "convolution in our time; floor: the fewest bytes, and the share of our time that they take at the "
        f"{result['bandwidth'] / 1e12:.2f} TB/s of a plain copy.",
        "",
        "| case | precision | phase | ours | ours, channels_last | best peer | ratio | TFLOP/s | floor, MB "
        "| share | peak MB, ours / eager | control | kernel |",
        "|" + "---|" * 13,
    ]
    for r in result["records"]:
        head = f"| {r['case']} | {r['precision']} | {r['phase']} |"
        if "seconds" not in r:
            error = f"error {r['error']:.1e}, torch's {r['error_of_torch']:.1e}"
            lines.append(f"{head} {r['status']}: {error} |" + " |" * 9)
            continue
        peer, ours, peak = best_peer(r), r["seconds"][OURS], r["peak_bytes"]
        nhwc = f"{1e3 * r['seconds'][OURS_NHWC]:.3f}" if OURS_NHWC in r["seconds"] else ""
        void = " (void)" if r["status"] == "void" else ""
        lines.append(
            f"{head} {1e3 * ours:.3f} | {nhwc} | {peer} {1e3 * r['seconds'][peer]:.3f} "
            f"| {r['ratios'][peer]:.2f}{void} | {r['flop'] / ours / 1e12:.1f} "
            f"| {r['least_bytes'] / 1e6:.1f} | {r['least_bytes'] / result['bandwidth'] / ours:.2f} "
            f"| {peak[OURS] / 1e6:.0f} / {peak[STOCK] / 1e6:.0f} "
            f"| {r['control']:.2f} | {r['kernel']} |"
        )
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    """A panel per precision and phase, a bar per case: the best peer's time over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [r for r in result["records"] if "seconds" in r]
    precisions = list(dict.fromkeys(r["precision"] for r in records)) or ["none"]
    figure, axes = plt.subplots(
        len(PHASES), len(precisions), figsize=(5 * len(precisions), 9), squeeze=False, layout="constrained"
    )
    for row, phase in zip(axes, PHASES, strict=True):
        for ax, precision in zip(row, precisions, strict=True):
            shown = [r for r in records if (r["precision"], r["phase"]) == (precision, phase)]
            ratios = [r["ratios"][best_peer(r)] for r in shown]
            colours = ["#d9d9d9" if r["status"] == "void" else "#2a7f62" if ratio >= 1 else "#c0392b"
                       for r, ratio in zip(shown, ratios, strict=True)]  # fmt: skip
            ax.barh([r["case"] for r in shown], ratios, color=colours)
            ax.axvline(1, color="black", linewidth=1)
            ax.invert_yaxis()
            ax.tick_params(axis="y", labelsize=7)
            ax.set(xlabel="best peer's time over ours")
            ax.set_title(f"{precision}, {phase}", loc="left", fontsize=10)
    figure.suptitle(f"conv_pool on {result['device']}, torch {result['torch']}, {result['date']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_conv_pool", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="one case of each kind")
    parser.add_argument(
        "--limit", type=float, default=330, help="seconds after which no case begins; %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--precision", choices=DTYPES, action="append", help="repeatable; default all")
    parser.add_argument("--case", default="", metavar="SUBSTRING", help="of the names that the table shows")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes longest"
    )
    parser.add_argument("--device", default="cuda", help="cpu tries this program; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch")
    timer = EventTimer() if on_gpu else HostTimer()
    begun, records, left_out = time.perf_counter(), [], 0
    bandwidth = copy_bandwidth(args.device, timer, args.rounds)
    cases = [case for case in grid(args.quick) if args.case in case.name]
    for case in cases:
        for precision in args.precision or DTYPES:
            for phase in PHASES:
                if time.perf_counter() - begun > args.limit:
                    left_out += 1
                    continue
                records.append(measure(case, precision, phase, args, timer))
                r = records[-1]
                ratio = f"{r['ratios'][best_peer(r)]:.2f}" if "ratios" in r else ""
                print(f"{r['case']}, {precision}, {phase}: {r['status']} {ratio}", flush=True)
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU, a trial of the program",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": time.perf_counter() - begun,
        "left_out": left_out,
        "bandwidth": bandwidth,
        "records": records,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = "gpu-conv_pool-" + "-".join(result["device"].lower().replace(",", "").split())
    (args.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"{stem}.md").write_text(table(result))
    draw(result, args.out / f"{stem}.png")
    print(args.out / f"{stem}.md")


if __name__ == "__main__":
    main()
