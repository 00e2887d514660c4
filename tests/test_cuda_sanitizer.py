"""compute-sanitizer over small cases of every schedule. Skipped where there is no GPU or no such tool.

Run before anything else on a new GPU: what it reports makes other results worthless.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

TESTS = Path(__file__).parent
FILES = ("test_cuda_gpu.py", "test_cuda_gpu_rnn.py")
CASES = "tiny or odd or few_rows or (test_schedule and lstm and whole)"


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer(on_gpu, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "86",
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
    ]
    command += ["-p", "no:cacheprovider", "-k", CASES, *(str(TESTS / name) for name in FILES)]
    # Without torch's caching of memory every bound is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
