"""Loads the compiled libraries once, and says what was built, what loaded, and why not.

Nothing else in the package touches a ``.so``; everyone asks ``kernel_for``.
"""

import functools
import importlib
import itertools
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FULL = (torch.float32, torch.float64)

# What has kernels: for each public function its operator, and the dtypes that the kernels of a device take.
# (functional casts float16, and for cells bfloat16, to float32 and back around the recurrent CPU kernels.)
# What is missing here runs on the reference.
COVERAGE = {
    "conv_pool2d": ("conv_pool2d", {"cpu": (*_FULL, torch.bfloat16), "cuda": DTYPES}),
    "lstm": ("rnn", {"cpu": DTYPES, "cuda": DTYPES}),
    "gru": ("rnn", {"cpu": DTYPES, "cuda": DTYPES}),
    "rnn": ("rnn", {"cpu": DTYPES, "cuda": DTYPES}),
    "lstm_cell": ("rnn_cell", {"cpu": DTYPES, "cuda": DTYPES}),
    "gru_cell": ("rnn_cell", {"cpu": DTYPES, "cuda": DTYPES}),
    "rnn_cell": ("rnn_cell", {"cpu": DTYPES, "cuda": DTYPES}),
}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Library:
    """One compiled library: loaded, or the reason why not."""

    name: str
    device: str
    loaded: bool
    reason: str | None


def _build_record():
    try:
        return json.loads((HERE / "_build.json").read_text())
    except FileNotFoundError:
        return {"cpu": "the package was not built (no build record): run from an installed package"}


def _diagnose(error):
    symbol = re.search(r"undefined symbol: (\S+)", str(error))
    cause = f"symbol {symbol[1]} is missing in the installed torch" if symbol else str(error)
    return (
        f"{cause}; installed torch is {torch.__version__}, the library needs torch >= 2.10. "
        "Rebuild it into this torch: pip install --no-build-isolation --force-reinstall --no-deps ."
    )


def _load(name, device, built_reason, usable_reason):
    path = HERE / f"{name}.so"
    if not path.exists():
        return Library(name, device, False, built_reason or f"{path.name} is not in the package")
    if usable_reason:
        return Library(name, device, False, usable_reason)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # torch wraps the loader's own words in an error that only names the file.
        return Library(name, device, False, _diagnose(error.__cause__ or error))
    return Library(name, device, True, None)


@functools.cache
def libraries():
    """{"cpu": Library, "cuda": Library}. The first call loads them."""
    record = _build_record()
    cpu = _load("_ops_cpu", "cpu", record.get("cpu"), None)
    no_cuda = None if torch.version.cuda else "the installed torch is a CPU build"
    if not cpu.loaded:
        no_cuda = "it needs the C++ library, which is not loaded"
    cuda = _load("_ops_cuda", "cuda", record.get("cuda"), no_cuda)
    if not cpu.loaded:
        message = f"cnnrnn_ext runs without compiled kernels, on plain PyTorch: {cpu.reason}"
        if os.environ.get("CNNRNN_REQUIRE_EXT", "") in ("1", "on", "true"):
            raise ImportError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return {"cpu": cpu, "cuda": cuda}


@functools.cache
def build_module():
    """The pybind11 module ``_C``, or None where it was not built."""
    try:
        module = importlib.import_module("cnnrnn_ext._C")
    except ImportError:
        return None
    # An editable install elsewhere answers for names that this package lacks.
    return module if Path(module.__file__).parent == HERE else None


def _find_kernel(function, device, dtype):
    library = libraries()[device]
    if not library.loaded:
        return None, library.reason
    dtypes = COVERAGE[function][1].get(device)
    if dtypes is None:
        return None, f"no {device} kernel for {function}"
    if dtype not in dtypes:
        return None, f"no {device} kernel of {function} for {dtype}"
    if device == "cuda":
        return "cuda", None
    module = build_module()
    return ("cpu/" + module.active_isa() if module else "cpu"), None


def kernel_for(function, device, dtype):
    """(kernel, None) such as ("cpu/avx512", None), or (None, the reason why there is none)."""
    return KERNELS.get((function, device, dtype)) or (None, f"no {device} kernel of {function} for {dtype}")


def schemas():
    """Every operator's schema string, from the file that the C++ library compiles in."""
    text = (HERE / "operators.schema").read_text()
    lines = text.removeprefix('R"schema(').removesuffix(')schema"\n').splitlines()
    return [line for line in lines if line and not line.startswith("#")]


# A plain table, so that torch.compile can trace through a look-up.
KERNELS = {key: _find_kernel(*key) for key in itertools.product(COVERAGE, DEVICES, DTYPES)}
