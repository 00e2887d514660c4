"""The pure-Python install: built without a compiler into a folder, and the suite run against it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _marked import files_marked

ROOT = Path(__file__).parents[1]


def environment(**more):
    cleared = {k: v for k, v in os.environ.items() if not k.startswith("CNNRNN_") and k != "PYTHONPATH"}
    return {**cleared, **more}


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """A folder with the package installed from a copy of the sources, where no compiler was found."""
    if os.environ.get("CNNRNN_TEST_PURE") == "1":
        pytest.skip("this run is itself the one on the pure-Python install")
    folder = tmp_path_factory.mktemp("pure")
    sources, target = folder / "sources", folder / "target"
    sources.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, sources)
    # Without the libraries that an in-place build left in the package: they would be installed too.
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    for name in ("cnnrnn_ext", "csrc"):
        shutil.copytree(ROOT / name, sources / name, ignore=leave_out)
    install = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--target",
            str(target),
            str(sources),
        ],
        env=environment(CXX="/nonexistent"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert install.returncode == 0, install.stderr
    return target


def test_install_says_why(pure):
    assert not list(pure.rglob("*.so"))
    reason = json.loads((pure / "cnnrnn_ext" / "_build.json").read_text())["cpu"]
    assert "no C++ compiler found" in reason


def test_one_warning_at_import(pure):
    """Importing warns once, with the reason; using the package warns no more."""
    code = (
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import cnnrnn_ext as cx\n"
        "    cx.LSTM(2, 3)(torch.randn(4, 1, 2)); cx.ConvPool2d(1, 2, 3)(torch.randn(1, 1, 6, 6))\n"
        "ours = [w for w in caught if 'cnnrnn_ext' in str(w.message)]\n"
        "print(len(ours), ours[0].category.__name__, ours[0].message)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(PYTHONPATH=str(pure)),
        cwd=pure,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("1 RuntimeWarning")
    assert "no C++ compiler found" in result.stdout


def test_required_extension_is_an_import_error(pure):
    result = subprocess.run(
        [sys.executable, "-c", "import cnnrnn_ext"],
        env=environment(PYTHONPATH=str(pure), CNNRNN_REQUIRE_EXT="1"),
        cwd=pure,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert "no C++ compiler found" in result.stderr


def test_suite_on_the_pure_install(pure):
    """The checks marked ``pure``: values, gradients, gradcheck of the operators, bad input."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            "-m",
            "pure",
            *files_marked("pure"),
        ],
        env=environment(PYTHONPATH=str(pure), CNNRNN_TEST_PURE="1"),
        cwd=pure,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "failed" not in summary
