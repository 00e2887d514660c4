"""setup.py's decisions, with compilers that only write down what they are asked; and a load that fails."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import cnnrnn_ext

ROOT = Path(__file__).parents[1]
SWITCHES = ("CNNRNN_", "CXX", "NVCC", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
FAKE_CXX = """#!/bin/sh
# Logs its arguments and makes the files that a compiler would make.
echo "$@" >> "$(dirname "$0")/$(basename "$0").log"
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "fake compiler 1.0" ;;
    -o) echo > "$2"; output=$2 ;;
    -MF) depfile=$2 ;;
  esac
  shift
done
[ -z "$depfile" ] || echo "$output:" > "$depfile"
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, with a library of an earlier build in the package and fake compilers."""
    folder = tmp_path / "a checkout"  # with a space in its path
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in ("cnnrnn_ext", "csrc", "cuda"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
    (folder / "cnnrnn_ext" / "_ops_cuda.so").write_text("stale")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("fake-g++", "fake-nvcc"):
        (tools / name).write_text(FAKE_CXX)
        (tools / name).chmod(0o755)
    return folder


def run_setup(checkout, *arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SWITCHES)}
    tools = checkout.parent / "bin"
    defaults = {"CXX": str(tools / "fake-g++"), "NVCC": str(tools / "fake-nvcc")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=checkout,
        env=environment | defaults | variables,
        capture_output=True,
        text=True,
    )


def build(checkout, **variables):
    done = run_setup(checkout, "build_ext", "--inplace", **variables)
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads((checkout / "cnnrnn_ext" / "_build.json").read_text()), done.stderr


def commands(checkout, compiler="fake-g++"):
    """{source file: its compile command} of a fake compiler's log."""
    log = checkout.parent / "bin" / f"{compiler}.log"
    lines = log.read_text().splitlines() if log.exists() else []
    compiled = [line for line in lines if " -c " in line]
    return {Path(line.split(" -c ")[1].split(" -o ")[0]).name: line for line in compiled}


def libraries(checkout):
    return {path.name.split(".")[0] for path in (checkout / "cnnrnn_ext").glob("*.so")}


def run_python(folder, code, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CNNRNN_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)


# ---- what is built ----


def test_without_a_compiler_one_warning_and_a_package_that_works(checkout):
    record, errors = build(checkout, CXX="/nonexistent/g++")
    assert errors.count("is installed without compiled kernels and will run on plain PyTorch") == 1
    assert "no C++ compiler found" in record["cpu"]
    assert libraries(checkout) == set()

    code = """
import torch, torch.nn.functional as F, cnnrnn_ext as cx
x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
with cx.trace() as log:
    y = cx.functional.conv_pool2d(x, w)
torch.testing.assert_close(y, F.max_pool2d(F.relu(F.conv2d(x, w)), 2), rtol=0, atol=0)
y.sum().backward()
raw = torch.ops.cnnrnn_ext.conv_pool2d(
    x, w.detach(), None, [1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False)
torch.testing.assert_close(raw, y.detach())
print(log[0].backend, log[0].reason)
"""
    done = run_python(checkout, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("reference no C++ compiler found")
    assert done.stderr.count("cnnrnn_ext runs without compiled kernels, on plain PyTorch: no C++") == 1


def test_without_a_compiler_an_error_where_the_extension_is_required(checkout):
    done = run_setup(checkout, "build_ext", "--inplace", CXX="/nonexistent/g++", CNNRNN_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr


def test_a_compiler_that_fails_is_not_hidden(checkout):
    broken = checkout.parent / "bin" / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'fatal: no such flag' >&2\n[ \"$1\" = --version ]\n")
    broken.chmod(0o755)
    record, errors = build(checkout, CXX=str(broken))
    assert "compilation failed" in record["cpu"]
    assert errors.count("is installed without compiled kernels") == 1
    assert libraries(checkout) == set()
    done = run_setup(checkout, "build_ext", "--inplace", CXX=str(broken), CNNRNN_REQUIRE_EXT="1")
    assert done.returncode != 0


def test_without_torch_the_reason_names_the_command(checkout):
    # As in pip's build isolation: setuptools is there, torch is not.
    (checkout / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
    )
    record, errors = build(checkout, PYTHONPATH=str(checkout))
    assert "pip install --no-build-isolation ." in record["cpu"]
    assert "pip install --no-build-isolation ." in errors
    assert libraries(checkout) == set()


def test_libraries_and_their_flags(checkout):
    record, errors = build(checkout, CNNRNN_CUDA="0")
    assert record == {"version": cnnrnn_ext.__version__, "cpu": None, "cuda": "switched off by CNNRNN_CUDA=0"}
    assert "Warning" not in errors
    assert libraries(checkout) == {"_ops_cpu", "_C"}  # the stale CUDA library is gone
    compiled = commands(checkout)
    for source, command in compiled.items():
        assert "-march=native" not in command
        wide = any(flag in command for flag in ("-mavx", "-mfma", "-mbmi"))
        assert wide == (source in ("isa_avx2.cpp", "isa_avx512.cpp", "isa_amx.cpp")), source
    for source in ("ops.cpp", "conv_pool_cpu.cpp", "rnn_cpu.cpp"):
        assert "-DTORCH_TARGET_VERSION=0x020a000000000000ULL" in compiled[source]
    assert "torch" not in compiled["module.cpp"].replace("CNNRNN_TORCH", "").split("-DCNNRNN_COMPILER")[0]


def test_a_second_build_compiles_nothing_and_a_changed_file_alone(checkout):
    build(checkout, CNNRNN_CUDA="0")
    log = checkout.parent / "bin" / "fake-g++.log"
    log.unlink()
    build(checkout, CNNRNN_CUDA="0")
    assert commands(checkout) == {}
    (checkout / "csrc" / "rnn_cpu.cpp").write_text("changed")
    build(checkout, CNNRNN_CUDA="0")
    assert set(commands(checkout)) == {"rnn_cpu.cpp"}


def test_cuda_is_left_out_by_default_where_torch_is_a_cpu_build(checkout):
    if torch.version.cuda:
        pytest.skip("this torch is a CUDA build")
    record, _ = build(checkout)
    assert "CPU build" in record["cuda"]
    assert commands(checkout, "fake-nvcc") == {}


@pytest.mark.skipif(not (ROOT / "cuda").exists(), reason="no CUDA sources here")
@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        ("", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"]),
        ("8.6;9.0+PTX", ["compute_86,code=sm_86", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
    ],
)
def test_cuda_asked_for(checkout, arch_list, expected):
    record, _ = build(checkout, CNNRNN_CUDA="1", TORCH_CUDA_ARCH_LIST=arch_list)
    assert record["cuda"] is None
    assert libraries(checkout) == {"_ops_cpu", "_ops_cuda", "_C"}
    kernels = commands(checkout, "fake-nvcc")
    assert set(kernels) == {path.name for path in (ROOT / "cuda").glob("*_kernels.cu")}
    for command in kernels.values():
        assert [w.split("arch=")[1] for w in command.split() if w.startswith("-gencode")] == expected


def test_cuda_asked_for_without_nvcc_is_an_error(checkout):
    switches = {"CNNRNN_CUDA": "1", "CNNRNN_REQUIRE_EXT": "1", "NVCC": "/nonexistent/nvcc"}
    done = run_setup(checkout, "build_ext", "--inplace", **switches)
    assert done.returncode != 0
    assert "CNNRNN_CUDA=1, but nvcc was not found" in done.stderr


# ---- what is packed ----


def test_a_wheel_made_without_a_compiler_holds_no_library(checkout):
    (checkout / "cnnrnn_ext" / "_ops_cpu.so").write_text("stale, in the package")
    stale = checkout / "build" / "lib" / "cnnrnn_ext"
    stale.mkdir(parents=True)
    (stale / "_ops_cpu.so").write_text("stale, in an earlier build")
    done = run_setup(checkout, "build", "--build-lib", "build/lib", "bdist_wheel", CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("cnnrnn_ext/_build.json"))
    assert [name for name in names if name.endswith(".so")] == []
    assert {"cnnrnn_ext/operators.schema", "cnnrnn_ext/__main__.py"} <= set(names)
    assert "no C++ compiler found" in record["cpu"]


def test_a_source_distribution_holds_all_that_is_compiled(checkout):
    done = run_setup(checkout, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    wanted = ["setup.py", "pyproject.toml", "LICENSE", "README.md", "cnnrnn_ext/operators.schema"]
    sources = [p for folder in ("csrc", "cuda") for p in (checkout / folder).rglob("*") if p.is_file()]
    wanted += [str(path.relative_to(checkout)) for path in sources]
    assert set(wanted) <= names
    assert not [name for name in names if name.endswith(".so")]


# ---- a library that does not load ----


@pytest.fixture
def installed(tmp_path):
    """A copy of the package, without its libraries."""
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "cnnrnn_ext", tmp_path / "cnnrnn_ext", ignore=leave_out)
    (tmp_path / "cnnrnn_ext" / "_build.json").write_text('{"cpu": null, "cuda": null}')
    return tmp_path


def make_broken_library(installed, kind):
    library = installed / "cnnrnn_ext" / "_ops_cpu.so"
    if kind == "not a library":
        library.write_text("not a library")
        return
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source = installed / "broken.cpp"
    source.write_text('extern "C" int a_symbol_of_another_torch(); int value = a_symbol_of_another_torch();')
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("undefined symbol", "symbol a_symbol_of_another_torch is missing in the installed torch"),
        ("not a library", "_ops_cpu.so: "),
    ],
)
def test_import_explains_a_library_that_does_not_load(installed, kind, named):
    make_broken_library(installed, kind)
    code = "import torch, cnnrnn_ext as cx; print(cx.LSTM(2, 3)(torch.zeros(4, 1, 2))[0].shape)"
    done = run_python(installed, code)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([4, 1, 3])" in done.stdout  # on plain PyTorch
    warning = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warning) == 1, done.stderr
    expected = (named, f"installed torch is {torch.__version__}", "needs torch >= 2.10")
    for part in (*expected, "pip install --no-build-isolation"):
        assert part in warning[0]

    done = run_python(installed, "import cnnrnn_ext", CNNRNN_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert named in done.stderr
