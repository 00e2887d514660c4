"""Registers, spills and shared memory of every CUDA kernel, as the compiler reports them.

    python cuda/resources.py [--arch 80 --arch 90a]

Compiles the kernels with -Xptxas -v (no GPU is needed) and prints a table. The exit status is 1 if a kernel
spills registers. Shared memory is what the kernel declares; these kernels ask for theirs at launch.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("*_kernels.cu"))


def kernel_name(mangled):
    """lstm_block_forward<float, true>, without namespaces and parameters."""
    name = subprocess.check_output(["c++filt", mangled], text=True).strip()
    name = re.sub(r"^void ", "", name).replace("(anonymous namespace)", "")
    depth = 0
    for end, char in enumerate(name):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char == "(" and depth == 0:
            name = name[:end]
            break
    return re.sub(r"(\w*::)+", "", name)


def parse(log):
    """Rows (kernel, registers, bytes spilled, bytes of declared shared memory) from ptxas' -v output."""
    rows = []
    for part in log.split("Compiling entry function '")[1:]:
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        rows.append((kernel_name(part.split("'")[0]), registers, spills, int(shared[1]) if shared else 0))
    return sorted(rows)


def compile_log(nvcc, source, arch):
    """What ptxas says while it compiles one source for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", f"-arch=sm_{arch}"]
        command += ["-Xptxas", "-v"]
        command += [f"-I{FOLDER}", f"-I{FOLDER.parent / 'csrc'}", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[:4000]}")
    return done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="repeatable; default 80 and 90a")
    arguments = parser.parse_args()
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc was not found (PATH or NVCC)")
    print(f"{'kernel':60} {'arch':>6} {'registers':>9} {'spilled B':>9} {'shared B':>9}")
    spilled = False
    for source in SOURCES:
        for arch in arguments.arch or ["80", "90a"]:
            for name, registers, spills, shared in parse(compile_log(nvcc, source, arch)):
                print(f"{name:60} {'sm_' + arch:>6} {registers:9} {spills:9} {shared:9}")
                spilled |= spills > 0
    if spilled:
        raise SystemExit("registers are spilled")


if __name__ == "__main__":
    sys.exit(main())
