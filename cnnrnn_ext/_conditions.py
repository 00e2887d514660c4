"""What a measured figure depends on, in words: processor, threads, allocator, kernels."""

import os
import platform
from pathlib import Path

import torch

from cnnrnn_ext import _timing
from cnnrnn_ext._version import __version__


def cpu_name():
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def allocator():
    """Whether glibc's allocator was tuned (:func:`_timing.tuned_allocator_env`) when the process began."""
    wanted = _timing.tuned_allocator_env().items()
    tuned = platform.libc_ver()[0] == "glibc" and all(os.environ.get(key) == value for key, value in wanted)
    return "glibc, tuned" if tuned else "default"


def kernels(log):
    """What the calls of a trace ran on: sorted lines, each operator and kernel once."""
    return sorted({f"{call.op}: {call.kernel or f'plain torch ({call.reason})'}" for call in log})


def conditions():
    """{"cpu", "threads", "torch", "cnnrnn_ext", "allocator"} of this process."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cnnrnn_ext": __version__,
        "allocator": allocator(),
    }
