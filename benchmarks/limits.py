"""The machine's limits: fp32 FMA peak, and read bandwidth of L2, L3 and DRAM, per number of threads.

They are measured in the same run as the figures they stand beside, by a few lines of C (limits.c) that the
machine's own compiler builds. Without a C compiler they are reported as not measured.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_name("limits.c")
BUILD = Path(__file__).parents[1] / "build" / "benchmarks"
REPEATS = 5  # the best one counts: a limit is what the machine can do, not what it does on average
TARGET_S = 0.03  # length of one measurement


class NotMeasuredError(Exception):
    """Why the limits of this machine could not be measured."""


def measure(threads: Iterable[int]) -> dict:
    """``{"fma_gflops": {"1": …}, "read_gbs": {"L2": {"1": …}, …}, "bytes_per_thread": {"L2": {"1": …}, …}}``.

    GFLOP/s and GB/s are sums over the threads. Raises NotMeasuredError.
    """
    library = _load()
    caches = cache_sizes()
    result: dict = {"fma_gflops": {}, "read_gbs": {}, "bytes_per_thread": {}}
    for n in sorted(set(threads)):
        flop = library.flop_per_iteration()
        fma_jobs = [library.fma_loop] * n
        result["fma_gflops"][str(n)] = _best_rate(fma_jobs, flop) / 1e9
        for level, size in _buffer_sizes(caches, n).items():
            buffers = [_aligned_ones(size) for _ in range(n)]
            read_jobs = [_reader(library, buffer) for buffer in buffers]
            result["read_gbs"].setdefault(level, {})[str(n)] = _best_rate(read_jobs, size) / 1e9
            result["bytes_per_thread"].setdefault(level, {})[str(n)] = size
    return result


def cache_sizes() -> dict[str, int]:
    """Bytes of L1d, L2 and L3 as Linux reports them for the first core; absent levels are left out."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = (index / "type").read_text().strip(), (index / "level").read_text().strip()
        if kind != "Instruction":
            text = (index / "size").read_text().strip()
            sizes[f"L{level}" + ("d" if level == "1" else "")] = int(text.rstrip("K")) * 1024
    return sizes


def _buffer_sizes(caches: dict[str, int], threads: int) -> dict[str, int]:
    """Bytes each thread reads so that the data lies in the named level and not in the one above."""
    sizes = {}
    if "L2" in caches:
        sizes["L2"] = caches["L2"] // 2
    if "L3" in caches:
        # Shared by the threads, and a virtual machine may share it with neighbours: stay well inside.
        sizes["L3"] = max(caches["L3"] // (3 * threads), 2 * caches.get("L2", 0))
    sizes["DRAM"] = max(4 * caches.get("L3", 0), 256 << 20) // threads
    return {level: size // 1024 * 1024 for level, size in sizes.items()}


def _load() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NotMeasuredError("no C compiler found")
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = ["-O3", "-march=native" if x86 else "-mcpu=native", "-ffp-contract=fast", "-shared", "-fPIC"]
    # A build folder can be shared between machines: the name carries the processor it was built for.
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([compiler, *flags, cpu_model()]).encode()).hexdigest()
    path = BUILD / f"limits-{key[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [compiler, *flags, "-o", str(fresh), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NotMeasuredError(f"{compiler} failed: {done.stderr.strip()[-200:]}")
        fresh.replace(path)
    library = ctypes.CDLL(str(path))
    library.fma_loop.argtypes = [ctypes.c_long]
    library.fma_loop.restype = ctypes.c_float
    library.read_loop.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    library.read_loop.restype = ctypes.c_float
    return library


def cpu_model() -> str:
    """The processor's name, with family and model number where the name alone says little ("AMD EPYC")."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if not any(c.isdigit() for c in name) and "cpu family" in fields:
        name += f" family {fields['cpu family']} model {fields.get('model', '?')}"
    return name


def _aligned_ones(size: int) -> np.ndarray:
    raw = np.ones(size // 4 + 16, np.float32)
    skip = (-raw.ctypes.data % 64) // 4
    return raw[skip : skip + size // 4]


def _reader(library: ctypes.CDLL, buffer: np.ndarray) -> Callable[[int], object]:
    return lambda repeats: library.read_loop(buffer.ctypes.data, buffer.size, repeats)


def _best_rate(jobs: list[Callable[[int], object]], unit: float) -> float:
    """Units per second when all ``jobs`` run at once, one thread each; ``job(n)`` does ``n * unit``."""
    iterations = 1
    while (seconds := _together(jobs, iterations)) < TARGET_S:
        iterations *= 2 if seconds > TARGET_S / 8 else 8
    return len(jobs) * iterations * unit / min(_together(jobs, iterations) for _ in range(REPEATS))


def _together(jobs: list[Callable[[int], object]], iterations: int) -> float:
    """Seconds from the first start to the last end. ctypes releases the interpreter lock during a call."""
    barrier = threading.Barrier(len(jobs))
    spans: list[tuple[float, float]] = []

    def work(job: Callable[[int], object]) -> None:
        barrier.wait()
        start = time.perf_counter()
        job(iterations)
        spans.append((start, time.perf_counter()))

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)
