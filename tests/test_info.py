"""``python -m cnnrnn_ext info`` tells the truth: what it names is what a call then runs on."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnrnn_ext as cx
from cnnrnn_ext import _library

ROOT = Path(__file__).parents[1]
SWITCHES = ("CNNRNN_CPU_ISA", "CNNRNN_REQUIRE_EXT")


def run_info(*arguments, cwd=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    command = [sys.executable, "-m", "cnnrnn_ext", "info", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)


def json_info(**options):
    done = run_info("--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def info():
    return json_info(**{name: os.environ[name] for name in SWITCHES if name in os.environ})


@pytest.fixture(scope="module")
def pure_python(tmp_path_factory):
    """A folder that holds the package as an install without a compiler leaves it."""
    folder = tmp_path_factory.mktemp("pure")
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cnnrnn_ext", folder / "cnnrnn_ext", ignore=leave_out)
    record = {"version": cx.__version__, "cpu": "no C++ compiler found", "cuda": "no C++ library"}
    (folder / "cnnrnn_ext" / "_build.json").write_text(json.dumps(record))
    return folder


def call(name, dtype):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    function = getattr(cx.functional, name)
    if name == "conv_pool2d":
        return function(random(1, 2, 6, 6), random(3, 2, 3, 3))
    rows = {"lstm": 12, "gru": 9, "rnn": 3}[name.removesuffix("_cell")]
    weights = random(rows, 2), random(rows, 3), random(rows), random(rows)
    if name.endswith("_cell"):
        state = random(1, 3)
        return function(random(1, 2), (state, state) if name == "lstm_cell" else state, *weights)
    state = random(1, 1, 3)
    return function(random(2, 1, 2), (state, state) if name == "lstm" else state, weights)


def test_every_function_dtype_and_device_is_listed_once(info):
    rows = [(row["function"], row["dtype"], row["device"]) for row in info["kernels"]]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    expected = {(o, t, d) for o in _library.COVERAGE for t in dtypes for d in ("cpu", "cuda")}
    assert len(rows) == len(expected)
    assert set(rows) == expected


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("function", _library.COVERAGE)
def test_info_names_the_kernel_that_a_call_runs(info, function, dtype):
    (row,) = (
        row
        for row in info["kernels"]
        if (row["function"], row["dtype"], row["device"]) == (function, dtype, "cpu")
    )
    with cx.trace() as log:
        call(function, getattr(torch, dtype))
    assert [(entry.op, entry.backend, entry.kernel, entry.reason) for entry in log] == [
        (function, row["backend"], row["kernel"], row["reason"])
    ]


def test_what_is_missing_has_a_reason_and_what_is_there_has_none(info):
    for row in info["kernels"]:
        assert (row["kernel"] is None) == bool(row["reason"]) == (row["backend"] == "reference"), row
    for name, library in info["libraries"].items():
        assert library["loaded"] == (not library["reason"]), name


def test_versions_libraries_and_threads(info):
    assert info["version"] == cx.__version__
    assert info["torch"] == torch.__version__
    assert info["python"] == platform.python_version()
    assert info["cpu"]["threads"] == torch.get_num_threads()
    package = ROOT / "cnnrnn_ext"
    assert info["libraries"]["_ops_cpu"]["loaded"] == (package / "_ops_cpu.so").exists()
    assert info["libraries"]["_C"]["loaded"] == bool(list(package.glob("_C.*.so")))
    if info["libraries"]["_C"]["loaded"]:
        assert info["build"]["version"] == cx.__version__
        assert info["build"]["compiler"]
        assert info["build"]["torch_minimum"] == "2.10"


def test_the_environment_is_followed_and_shown():
    if _library.build_module() is None:
        pytest.skip("the instruction set is known to compiled libraries only")
    info = json_info(CNNRNN_CPU_ISA="baseline", OMP_NUM_THREADS="1")
    assert info["cpu"]["isa"] == "baseline"
    assert info["cpu"]["best_isa"] == _library.build_module().best_isa()
    assert info["cpu"]["threads"] == 1
    assert info["environment"]["CNNRNN_CPU_ISA"] == "baseline"
    kernels = {row["kernel"] for row in info["kernels"] if row["device"] == "cpu" and row["kernel"]}
    assert kernels == {"cpu/baseline"}


def test_an_unknown_instruction_set_is_refused_by_name():
    if _library.build_module() is None:
        pytest.skip("the instruction set is known to compiled libraries only")
    done = run_info(CNNRNN_CPU_ISA="avx9000")
    assert done.returncode != 0
    assert "CNNRNN_CPU_ISA=avx9000 is not one of baseline, avx2, avx512, amx" in done.stderr


def test_without_compiled_libraries(pure_python):
    info = json_info(cwd=pure_python)
    assert Path(info["package"]) == pure_python / "cnnrnn_ext"
    assert not any(library["loaded"] for library in info["libraries"].values())
    assert info["libraries"]["_ops_cpu"]["reason"] == "no C++ compiler found"
    assert {row["backend"] for row in info["kernels"]} == {"reference"}
    reasons = {row["reason"] for row in info["kernels"] if row["device"] == "cpu"}
    assert reasons == {"no C++ compiler found"}

    page = run_info(cwd=pure_python)
    assert page.returncode == 0
    assert page.stderr.count("runs without compiled kernels, on plain PyTorch: no C++ compiler found") == 1
    assert "missing: no C++ compiler found" in page.stdout


def test_the_page_says_what_the_json_says(info):
    page = run_info(**info["environment"]).stdout
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in page.splitlines() if line.strip()}
    assert torch.__version__ in page
    for function in _library.COVERAGE:
        for device in ("cpu", "cuda"):
            row = [r for r in info["kernels"] if (r["function"], r["device"]) == (function, device)]
            assert lines[function, device] == [r["kernel"] or "reference" for r in row]
    for row in info["kernels"]:
        assert row["reason"] is None or row["reason"] in page


def test_a_command_is_required():
    done = subprocess.run([sys.executable, "-m", "cnnrnn_ext"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "command" in done.stderr
