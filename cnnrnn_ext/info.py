"""What is built, what this machine runs, and why anything is missing: ``python -m cnnrnn_ext info``."""

import os
import platform
from pathlib import Path

import torch

from cnnrnn_ext import _library, ops
from cnnrnn_ext._conditions import cpu_name
from cnnrnn_ext._version import __version__

ENVIRONMENT = ("CNNRNN_CPU_ISA", "CNNRNN_REQUIRE_EXT", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
NO_BUILD_MODULE = "_C, which tells it, was not built or does not load"


def collect():
    """Everything ``info`` shows, as plain dictionaries, lists, strings and numbers."""
    module = _library.build_module()
    libraries = {
        library.name: {"device": library.device, "loaded": library.loaded, "reason": library.reason}
        for library in _library.libraries().values()
    }
    libraries["_C"] = {
        "device": None,
        "loaded": module is not None,
        "reason": None if module else "not built (no compiler, or Python's headers are missing)",
    }
    return {
        "version": __version__,
        "package": str(Path(__file__).parent),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build": module.build_info() if module else None,
        "cpu": {
            "model": cpu_name(),
            "isa": module.active_isa() if module else None,
            "best_isa": module.best_isa() if module else None,
            "threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "libraries": libraries,
        "kernels": [
            _kernel(function, device, dtype)
            for function in _library.COVERAGE
            for device in _library.DEVICES
            for dtype in _library.DTYPES
        ],
    }


def _kernel(function, device, dtype):
    kernel, reason = _library.kernel_for(function, device, dtype)
    # The table says what a loaded library covers; the dispatcher says what is there.
    operator = _library.COVERAGE[function][0]
    name = f"{ops.NAMESPACE}::{operator}"
    if kernel and not torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()):
        kernel, reason = None, f"the library registers no {device} kernel of {operator}"
    return {
        "function": function,
        "operator": operator,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": "compiled" if kernel else "reference",
        "kernel": kernel,
        "reason": reason,
    }


def describe(info):
    """The dictionary of ``collect`` as a page of text."""
    return "\n".join([*_describe_machine(info), "", *_describe_libraries(info), "", *_describe_kernels(info)])


def _describe_machine(info):
    build, cpu = info["build"], info["cpu"]
    versions = (
        f"cnnrnn_ext {info['version']}",
        f"torch {info['torch']}",
        f"Python {info['python']}",
        info["system"],
    )
    yield "  ·  ".join(versions)
    yield ""
    if build:
        yield f"  compiler      {build['compiler']}"
        oldest = build["torch_minimum"]
        yield f"  built with    torch {build['torch_built_with']}; loads under torch >= {oldest}"
    else:
        yield f"  built with    unknown: {NO_BUILD_MODULE}"
    yield f"  processor     {cpu['model']}, {cpu['threads']} threads"
    known = f"{cpu['isa']} (best here: {cpu['best_isa']})" if build else f"unknown: {NO_BUILD_MODULE}"
    yield f"  instructions  {known}"
    yield f"  GPU           {', '.join(info['gpus']) or 'none visible to torch'}"
    for name, value in info["environment"].items():
        yield f"  environment   {name}={value}"


def _describe_libraries(info):
    yield "Libraries"
    for name, library in info["libraries"].items():
        yield f"  {name:<14}" + ("loaded" if library["loaded"] else f"missing: {library['reason']}")


def _describe_kernels(info):
    yield "Kernels (reference = plain PyTorch)"
    rows = info["kernels"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    table = {}
    for row in rows:
        table.setdefault((row["function"], row["device"]), []).append(row["kernel"] or "reference")
    for cells in (("function", "device", *dtypes), *((*key, *kernels) for key, kernels in table.items())):
        yield "  " + "".join(f"{cell:<14}" for cell in cells).rstrip()

    reasons = {}
    for row in rows:
        if row["reason"]:
            reasons.setdefault(row["reason"], {})[f"{row['device']} {row['dtype']}"] = row["device"]
    if reasons:
        yield ""
        yield "Why the reference"
    for reason, places in reasons.items():
        devices = set(places.values())
        whole = len(places) == len(devices) * len(dtypes)
        yield f"  {', '.join(sorted(devices) if whole else places)}: {reason}"
