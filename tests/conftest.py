"""Fixtures of the whole suite: which backend a test runs on, and a fixed seed for each test."""

import os

# Before torch starts its threads: waiting threads sleep, so that a busy machine slows the suite little.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal
import zlib
from pathlib import Path

import pytest
import torch
from _oracle import compiled_missing

import cnnrnn_ext

PURE = os.environ.get("CNNRNN_TEST_PURE") == "1"
REQUIRED = os.environ.get("CNNRNN_REQUIRE_EXT", "").lower() in ("1", "on", "true")


def pytest_configure(config):
    config.addinivalue_line("markers", "isa: runs again for each instruction set (test_isa.py)")
    config.addinivalue_line("markers", "pure: runs again on a pure-Python install (test_pure_python.py)")


def pytest_report_header():
    reason = compiled_missing()
    kernels = f"none: {reason}" if reason else "loaded"
    return f"cnnrnn_ext: {Path(cnnrnn_ext.__file__).parent}, compiled kernels {kernels}"


def pytest_sessionstart():
    if PURE and compiled_missing() is None:
        pytest.exit("CNNRNN_TEST_PURE=1, but this install has compiled libraries", returncode=3)


@pytest.fixture(autouse=True)
def _seed(request):
    """Each test draws the same numbers alone, in any order and in the whole suite."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.split("/")[-1].encode()))


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


def require_compiled():
    reason = compiled_missing()
    if reason is None:
        return
    if REQUIRED:
        pytest.fail(f"CNNRNN_REQUIRE_EXT is set, but there are no compiled kernels: {reason}")
    pytest.skip(f"no compiled kernels: {reason}")


@pytest.fixture(params=["compiled", "reference"])
def mode(request):
    """The backend a test asks for, and asserts with ``_oracle.running_on``."""
    if request.param == "compiled":
        require_compiled()
    return request.param


@pytest.fixture
def compiled():
    """For a test of the compiled kernels only."""
    require_compiled()
    return "compiled"


@pytest.fixture(scope="session")
def emulation():
    """The library of tests/cuda_emulation."""
    import _emulation

    return _emulation.load()


@pytest.fixture
def emulated(emulation):
    """The CUDA operators under the emulation, on a device with clusters of 8."""
    from _emulation import SM_90

    emulation.emulator_seed(0)
    emulation.emulator_device(*SM_90)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's idle threads would spin beside the emulator's one
    yield torch.ops.cnnrnn_emulated
    torch.set_num_threads(threads)


@pytest.fixture
def on_gpu():
    """The CUDA operators, where a GPU is visible."""
    from cnnrnn_ext import _library

    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible to torch")
    library = _library.libraries()["cuda"]
    if not library.loaded:
        pytest.skip(f"no CUDA library: {library.reason}")
    return torch.ops.cnnrnn_ext


@pytest.fixture
def fresh_graphs():
    """torch.compile as a new process has it, before the test and behind it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def toy_recipe(monkeypatch):
    """The recipe of _toy_recipe.py among the others, under the name "toy"."""
    from _toy_recipe import Toy

    from cnnrnn_ext import recipes

    monkeypatch.setitem(recipes.RECIPES, "toy", ("_toy_recipe", "Toy", "drifts"))
    monkeypatch.setattr(Toy, "seen", [])


@pytest.fixture
def interrupts():
    """Ctrl-C as Python has it, also where the suite's parent ignores it, as a shell's background jobs do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
