"""Paired timing: contenders take turns in one process, so that whatever slows the machine slows them alike.

A figure that leaves this file is a ratio of two times taken in the same round. Four rules keep it honest:

- A turn begins with a pause and one uncounted call. Thread pools (libgomp, ONNX Runtime, OpenVINO) spin for
  a while after their work and steal a core from the next contender; the pause outlasts them, and the
  uncounted call wakes the contender's own pool and warms its caches.
- The order rotates and turns round, so that nobody always runs first or always behind the same neighbour.
- A virtual core shares its physical one with strangers, who halve its speed for parts of a second. A probe, a
  fixed bit of work, runs between the samples of a turn: samples beside a slow probe do not count, as long as
  others come within a while.
- The control: one contender takes a second turn in each round. Its ratio to itself must read 1; when it does
  not, the machine was too noisy and the whole measurement is void, good figures and bad ones alike.

Standard library only; it knows nothing of torch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

CONTROL = "control"  # name of the second turn of the contender that is compared with itself
CONTROL_TOLERANCE = 0.05  # the control's median ratio must lie within 1 ± this
MIN_PAUSE_S = 0.1  # thread pools spin for up to this long after their work
PROBE_STEPS = 800  # about 20 µs
PROBE_TOLERANCE = 1.15  # a core shared with a stranger takes 1.5 to 2 times as long


def tuned_allocator_env() -> dict[str, str]:
    """Environment variables that make glibc keep and reuse big buffers; set them before the process starts.

    With glibc's defaults a buffer of some megabytes is returned to the kernel when freed and page-faulted
    afresh at the next call, which costs more than many kernels do. No effect outside glibc.
    """
    kept = str(1 << 32)  # bytes; above any buffer of the benchmarks
    return {"MALLOC_MMAP_THRESHOLD_": kept, "MALLOC_TRIM_THRESHOLD_": kept, "MALLOC_TOP_PAD_": str(1 << 26)}


def run_tuned(module, *arguments) -> int:
    """Exit status of ``python -m module arguments`` in a process of its own, under the tuned allocator.

    Of its own because a process reads those variables once, at its start, and because no earlier work should
    weigh on a timing.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **tuned_allocator_env()}, check=False).returncode


@dataclass(frozen=True)
class Ratio:
    """Distribution of the paired ratios over the rounds."""

    median: float
    p25: float
    p75: float


@dataclass(frozen=True)
class Timings:
    """What :func:`paired` measured: ``seconds[name][i]`` is the time of a call of ``name`` in round ``i``."""

    seconds: dict[str, list[float]]
    control_of: str | None = None

    def median_ms(self, name: str) -> float:
        return 1e3 * statistics.median(self.seconds[name])

    def min_ms(self, name: str) -> float:
        return 1e3 * min(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """Time of ``name`` over time of ``base``, paired by round: above 1, ``base`` is the faster one."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        p25, median, p75 = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, p25, p75)

    @property
    def control(self) -> Ratio | None:
        """The contender named ``control`` over itself; None when no control was asked for."""
        return self.ratio(CONTROL, self.control_of) if self.control_of else None

    @property
    def valid(self) -> bool:
        """True if there was a control and its median is within 1 ± ``CONTROL_TOLERANCE``."""
        return self.control is not None and abs(self.control.median - 1) <= CONTROL_TOLERANCE


def paired(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    control: str | None = None,
    pause_s: float = MIN_PAUSE_S,
    turn_s: float = 0.05,
    max_samples: int = 50,
    sample_s: float = 2e-4,
    patience_s: float = 0.3,
    warmup: int = 5,
    warmup_s: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Timings:
    """Times ``contenders`` in turns, ``rounds`` times over.

    A contender is a callable that does all of its work before it returns. One turn is a pause of ``pause_s``
    seconds, one uncounted call, then samples until they add up to ``turn_s`` seconds or are ``max_samples``;
    the turn's time is their median. A sample is one call, or as many as take ``sample_s`` seconds: the clock
    is read around them all, and reading it costs as much as the shortest kernels. Samples taken while the
    probe was slow count only if ``patience_s`` seconds of sampling brought no other. ``control`` names the
    contender that is also compared with itself. Before the first round each contender makes ``warmup``
    uncounted calls, or fewer, at least two, that take ``warmup_s`` seconds: lazy initialisation, and an
    allocator that needs a few calls until it reuses the same buffers.

    Raises ValueError for fewer than two rounds, a pause below ``MIN_PAUSE_S`` or an unknown control.
    """
    if rounds < 2:
        raise ValueError(f"rounds: a spread needs at least 2, got {rounds}")
    if pause_s < MIN_PAUSE_S:
        raise ValueError(f"pause_s: thread pools spin for up to {MIN_PAUSE_S} s, got {pause_s}")
    if CONTROL in contenders:
        raise ValueError(f"contenders: the name {CONTROL!r} is taken by the control")
    if control is not None and control not in contenders:
        raise ValueError(f"control: {control!r} is not one of {sorted(contenders)}")

    runs = dict(contenders)
    if control is not None:
        runs[CONTROL] = runs[control]

    def warm(run: Callable[[], object]) -> int:
        """Warms up; how many calls make a sample."""
        calls: list[float] = []
        while len(calls) < warmup and (len(calls) < 2 or sum(calls) < warmup_s):
            start = clock()
            run()
            calls.append(clock() - start)
        fastest = min(calls, default=sample_s)
        return max(1, round(sample_s / fastest)) if fastest > 0 else 1

    def probe() -> float:
        """The better of two: the first finds the caches full of the contender's data."""
        both = []
        for _ in range(2):
            start = clock()
            for _ in range(PROBE_STEPS):
                pass
            both.append(clock() - start)
        return min(both)

    undisturbed = min(probe() for _ in range(50))

    def turn(run: Callable[[], object], calls: int) -> float:
        nonlocal undisturbed
        sleep(pause_s)
        run()
        samples: list[float] = []
        disturbed: list[float] = []
        before = probe()
        while not (samples or disturbed) or (
            sum(samples) < turn_s and len(samples) < max_samples and sum(disturbed) < patience_s
        ):
            start = clock()
            for _ in range(calls):
                run()
            seconds = clock() - start
            after = probe()
            undisturbed = min(undisturbed, before, after)
            slow = max(before, after) > PROBE_TOLERANCE * undisturbed
            (disturbed if slow else samples).append(seconds)
            before = after
        return statistics.median(samples or disturbed) / calls

    calls = {name: warm(run) for name, run in contenders.items()}
    if control is not None:
        calls[CONTROL] = calls[control]
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i // 2 % len(names)
        order = names[first:] + names[:first]
        for name in order if i % 2 == 0 else reversed(order):
            seconds[name].append(turn(runs[name], calls[name]))
    return Timings(seconds, control)


def paired_until_valid(contenders, rounds, attempts, **options) -> Timings:
    """:func:`paired`, repeated until its control is right, at most ``attempts`` times; the last timings."""
    for _ in range(attempts):
        timings = paired(contenders, rounds, **options)
        if timings.valid:
            break
    return timings
