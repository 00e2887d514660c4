"""What the GPU benchmarks share: times of calls by CUDA events, contenders in turn, peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


class EventTimer:
    """Seconds of calls on the GPU: all are enqueued, then the host waits once."""

    def time(self, calls: list[Call]) -> list[float]:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        for call, (start, end) in zip(calls, marks, strict=True):
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]

    def peak_bytes(self, call: Call) -> int:
        """The most memory that the call held at a time beside what was there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


class HostTimer:
    """The same by the host's clock, to try a program without a GPU; its figures mean nothing."""

    def time(self, calls: list[Call]) -> list[float]:
        seconds = []
        for call in calls:
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    def peak_bytes(self, call: Call) -> int:
        call()
        return 0


def rounds_of(
    timer: EventTimer | HostTimer,
    calls: Mapping[str, Callable[[int], object]],
    rounds: int | Callable[[float], int],
) -> dict[str, list[float]]:
    """Seconds of every contender in every round. They take turns, and the first one changes.

    A call is told which round it is in, so that it may read another copy of its input. ``rounds`` may be a
    function of the seconds that a round takes, by the uncounted one before.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # uncounted: what is done once only
        calls[name](0)
    if callable(rounds):
        rounds = rounds(sum(timer.time([lambda name=name: calls[name](1) for name in names])))
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        bound = [lambda name=name, turn=turn: calls[name](turn + 2) for name in order]
        for name, took in zip(order, timer.time(bound), strict=True):
            seconds[name].append(took)
    return seconds


def median_ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios: what both shared in a round cancels out."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
