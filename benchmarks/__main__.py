"""``python -m benchmarks``: measures everything, writes JSON, a Markdown table and plots.

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

from . import cases, limits, report, scaling
from .peers import CONTENDERS, RESTRICTIONS

ALLOCATORS = ("tuned", "default")  # tuned first: it is the quoted one, and the one of the whole grid
ROUNDS = {"tuned": 5, "default": 4}
QUICK_ROUNDS = {"tuned": 4, "default": 3}


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few cases, fewer peers: under 2 minutes")
    parser.add_argument("--family", choices=cases.FAMILIES, help="default: all")
    parser.add_argument(
        "--case", default="", metavar="SUBSTRING", help='of "family name", as tables show them'
    )
    parser.add_argument("--threads", type=_numbers, default=[cores()], help="e.g. 1,2; default: all cores")
    parser.add_argument("--scaling", action="store_true", help="only the curves over sizes and threads")
    parser.add_argument(
        "--isa", choices=RESTRICTIONS, help="hold ours, and the peers that can be, to this instruction set"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder; %(default)s")
    parser.add_argument("--worker", choices=ALLOCATORS, help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.scaling and not cases.select(args.family, args.quick, args.case):
        parser.error(f"no case of this selection contains {args.case!r}")
    return args


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
    if args.scaling:
        scaling.measure(threads, args.quick, args.family, lambda point: _append(args.records, point))
        return
    rounds = (QUICK_ROUNDS if args.quick else ROUNDS)[args.worker]
    for case in cases.select(args.family, args.quick, args.case, args.worker):
        for phase in case.phases:
            start = time.perf_counter()
            contenders = [peer for peer in CONTENDERS if peer.takes(case, phase, args.quick)]
            result = record(case, phase, threads, args.worker, contenders, rounds)
            _append(args.records, result)
            print(f"{report.one_line(result)}  [{time.perf_counter() - start:.0f} s]", flush=True)


def _append(path: Path, record: dict) -> None:
    with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def spawn(args: argparse.Namespace, allocator: str, threads: int) -> tuple[list[dict], str | None]:
    """The records of one child process, and how it died if it did: what it had measured still counts."""
    settings = tuned_allocator_env()
    environment = {key: value for key, value in os.environ.items() if key not in settings}
    environment |= settings if allocator == "tuned" else {}
    # The pool of compiler processes would stay alive beside the measurement. Torch's log: the ONNX exporter
    # warns of its own shape inference. Kineto's: the profiler tells of its start and end.
    environment |= {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99"}
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records.jsonl"
        command = [sys.executable, "-m", "benchmarks", "--worker", allocator, "--threads", str(threads)]
        command += ["--records", str(records), "--case", args.case]
        command += ["--quick"] if args.quick else []
        command += ["--scaling"] if args.scaling else []
        command += ["--family", args.family] if args.family else []
        status = subprocess.run(command, check=False, env=environment).returncode
        lines = records.read_text().splitlines() if records.exists() else []
    died = f"{allocator} allocator, {threads} thread(s): exit status {status} after {len(lines)} records"
    return [json.loads(line) for line in lines], died if status else None


def draw(result: dict, folder: Path) -> list[Path]:
    """The plots beside the report, where matplotlib is installed."""
    try:
        from . import plot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return []
    return plot.draw(result, folder)


def machine_limits(threads: list[int]) -> dict:
    try:
        return limits.measure({1, *threads})
    except limits.NotMeasuredError as reason:
        return {"not_measured": str(reason)}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    if args.isa and not RESTRICTIONS[args.isa].items() <= os.environ.items():
        # Each of these is read once, when a library is loaded.
        command = [sys.executable, "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, check=False, env=os.environ | RESTRICTIONS[args.isa]).returncode
    start = time.perf_counter()
    machine = machine_limits(args.threads)
    records, crashes = [], []
    for threads in args.threads:
        for allocator in ALLOCATORS[:1] if args.scaling else ALLOCATORS:
            if not args.scaling and not cases.select(args.family, args.quick, args.case, allocator):
                continue
            print(f"{allocator} allocator, {threads} thread(s)", flush=True)
            found, died = spawn(args, allocator, threads)
            records += found
            crashes += [died] if died else []
    if args.scaling:
        return _scaling(args, records, machine, crashes)
    result = report.assemble(records, machine, cores(), quick=args.quick)
    result |= {"crashes": crashes, "wall_seconds": round(time.perf_counter() - start, 1)}
    result["selection"] = "-".join(filter(None, (args.family, args.case, args.isa)))
    written = report.write(result, args.out) + draw(result, args.out)
    print(report.headline(result))
    print("\n".join(f"wrote {path}" for path in written))
    return 1 if result["void"] or result["wrong"] or crashes else 0


def _scaling(args: argparse.Namespace, points: list[dict], machine: dict, crashes: list[str]) -> int:
    result = scaling.assemble(points, report.conditions(cores()), machine, quick=args.quick)
    result["selection"] = "-".join(filter(None, ("scaling", args.family, args.isa)))
    written = scaling.write(result, args.out)
    try:
        from . import plot_scaling
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        written += plot_scaling.draw(result, args.out)
    print(scaling.headline(result))
    print("\n".join([*crashes, *(f"wrote {path}" for path in written)]))
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
