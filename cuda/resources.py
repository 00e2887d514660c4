"""Registers, spills, shared memory and occupancy of every CUDA kernel, as the compiler reports them.

    python cuda/resources.py [--arch 80 --arch 90a] [--output cuda/resources.txt]

Compiles the kernels with -Xptxas -v (no GPU is needed) and prints a table. The exit status is 1 if a kernel
spills registers. Shared memory is what the kernel declares; these kernels ask for theirs at launch. The last
column is occupancy: how many blocks of the most threads the registers of a multiprocessor hold. Kernels with
resident weights take so much shared memory at launch that one block is all there is.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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


def most_threads(ptx):
    """{mangled name: threads of a block, by the kernel's launch bounds} from a PTX file."""
    threads = {}
    for part in ptx.split(".entry ")[1:]:
        bound = re.search(r"\.maxntid (\d+)", part.split("{")[0])
        threads[re.match(r"\w+", part)[0]] = int(bound[1]) if bound else 1024
    return threads


def blocks_held(registers, threads):
    """How many blocks of so many threads a multiprocessor (sm_80, sm_90) holds by registers and threads."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (of_warp * (threads // 32)), 2048 // threads, 32)


def compile_log(nvcc, source, arch):
    """What ptxas says while it compiles one source for one architecture, and the PTX."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", f"-arch=sm_{arch}"]
        command += ["-Xptxas", "-v", "--keep", f"--keep-dir={folder}"]
        command += [f"-I{FOLDER}", f"-I{FOLDER.parent / 'csrc'}", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[:4000]}")
        return done.stderr, "".join(path.read_text() for path in Path(folder).glob("*.ptx"))


def rows_of(nvcc, source, arch):
    """Lines of the table, and whether any kernel of them spills."""
    log, ptx = compile_log(nvcc, source, arch)
    threads_of = {kernel_name(mangled): threads for mangled, threads in most_threads(ptx).items()}
    kernels = parse(log)
    lines = [
        f"{name:70} {'sm_' + arch:>6} {registers:9} {spills:7} {shared:6} {threads_of[name]:7} "
        f"{blocks_held(registers, threads_of[name]):6}"
        for name, registers, spills, shared in kernels
    ]
    return lines, any(spills > 0 for _, _, spills, _ in kernels)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", help="repeatable; default 80 and 90a")
    parser.add_argument("--source", default="", metavar="SUBSTRING", help="of the files' names")
    parser.add_argument("--output", type=Path, help="a file for the table, beside standard output")
    arguments = parser.parse_args()
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc was not found (PATH or NVCC)")
    titles = ("arch", 6), ("registers", 9), ("spilled", 7), ("shared", 6), ("threads", 7), ("blocks", 6)
    table = [" ".join([f"{'kernel':70}", *(f"{title:>{width}}" for title, width in titles)])]
    print(table[0])
    jobs = [
        (nvcc, source, arch)
        for source in SOURCES
        if arguments.source in source.name
        for arch in arguments.arch or ["80", "90a"]
    ]
    spilled = False
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count()))) as pool:
        for lines, spills in pool.map(rows_of, *zip(*jobs, strict=True)):
            print(*lines, sep="\n", flush=True)
            table += lines
            spilled |= spills
    if arguments.output:
        arguments.output.write_text("\n".join(table) + "\n")
    if spilled:
        raise SystemExit("registers are spilled")


if __name__ == "__main__":
    sys.exit(main())
