"""``python -m benchmarks``: measures everything, writes JSON, a Markdown table and a plot.

The measuring is done by child processes, one per allocator setting and number of threads, because glibc reads
its settings when a process starts. Each child hands over its records line by line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cnnrnn_ext._timing import tuned_allocator_env

from . import cases, limits, report
from .peers import CONTENDERS

ALLOCATORS = ("tuned", "default")  # tuned first: it is the quoted one
ROUNDS = {"tuned": 7, "default": 4}
QUICK_ROUNDS = {"tuned": 5, "default": 3}


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases, fewer peers: under 2 minutes")
    parser.add_argument("--family", choices=cases.FAMILIES, help="default: all")
    parser.add_argument("--threads", type=_numbers, default=[cores()], help="e.g. 1,2; default: all cores")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; %(default)s")
    parser.add_argument("--worker", choices=ALLOCATORS, help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"threads must be at least 1, got {text}")
    return values


def work(args: argparse.Namespace) -> None:
    """The child: measures every case under this process's allocator and appends one JSON line per record."""
    import torch

    from .measure import record

    (threads,) = args.threads
    torch.set_num_threads(threads)
    rounds = (QUICK_ROUNDS if args.quick else ROUNDS)[args.worker]
    for case in cases.select(args.family, args.quick):
        for phase in cases.PHASES:
            start = time.perf_counter()
            contenders = [peer for peer in CONTENDERS if peer.takes(case, phase, args.quick)]
            result = record(case, phase, threads, args.worker, contenders, rounds)
            with args.records.open("a") as lines:
                lines.write(json.dumps(result) + "\n")
            print(f"{report.one_line(result)}  [{time.perf_counter() - start:.0f} s]", flush=True)


def spawn(args: argparse.Namespace, allocator: str, threads: int) -> list[dict]:
    """The records of one child process; raises CalledProcessError if it fails."""
    settings = tuned_allocator_env()
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    environment |= settings if allocator == "tuned" else {}
    # The pool of compiler processes would stay alive beside the measurement.
    environment |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        command = [sys.executable, "-m", "benchmarks", "--worker", allocator, "--threads", str(threads)]
        command += ["--records", str(records)]
        command += ["--quick"] if args.quick else []
        command += ["--family", args.family] if args.family else []
        subprocess.run(command, check=True, env=environment)
        return [json.loads(line) for line in records.read_text().splitlines()]


def draw(result: dict, folder: Path) -> list[Path]:
    """The plot beside the report, where matplotlib is installed."""
    try:
        from . import plot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return []
    image = folder / f"{report.slug(result)}.png"
    plot.draw(result, image)
    return [image]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    start = time.perf_counter()
    try:
        machine = limits.measure({1, *args.threads})
    except limits.NotMeasuredError as reason:
        machine = {"not_measured": str(reason)}
    records = []
    for threads in args.threads:
        for allocator in ALLOCATORS:
            print(f"{allocator} allocator, {threads} thread(s)", flush=True)
            records += spawn(args, allocator, threads)
    result = report.assemble(records, machine, cores(), quick=args.quick)
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    written = report.write(result, args.out) + draw(result, args.out)
    print(report.headline(result))
    print("\n".join(f"wrote {path}" for path in written))
    return 1 if result["void"] or result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
