"""Shared memory and occupancy of the CUDA kernels at real sizes, as the launchers ask for them on an H200.

    python tests/cuda_emulation/launches.py [--output cuda/launches.txt]

Needs a C++ compiler only: the emulation puts launches down instead of running them. Registers are those of
sm_90a in cuda/resources.txt. The last column is occupancy: how many blocks a multiprocessor holds by
registers, threads and 228 KB of shared memory, of which a block takes 1 KB more than it asks for. Kernels
that ask for none are in resources.txt alone.
"""

import argparse
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in (".", "tests", "cuda"))

import _cuda_cases as conv_cases
import _cuda_rnn_cases as rnn_cases
import _emulation
from resources import blocks_held, kernel_name

ROOT = Path(__file__).parents[2]
H200 = (227 * 1024, 16, 132)  # shared memory of a block, blocks of the largest cluster, blocks at once
SHARED_OF_MULTIPROCESSOR, SHARED_OF_ANY_BLOCK = 228 * 1024, 1024

PRECISIONS = {  # (element type, TF32)
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "fp64": (torch.float64, False),
}
RNNS = [
    (cell, n, hidden)
    for cell, batches, sizes in (
        ("lstm", (16, 128), (64, 128, 256, 512, 768, 1024, 2048)),
        ("gru", (16,), (128, 512, 768, 2048)),
        ("rnn_tanh", (16,), (128, 512)),
    )
    for n in batches
    for hidden in sizes
]
CONVS = {
    "1 -> 32, 3x3": conv_cases.Conv((1, 1, 28, 28), 32),
    "3 -> 64, 3x3": conv_cases.Conv((1, 3, 224, 224), 64),
    "64 -> 64, 3x3": conv_cases.Conv((1, 64, 112, 112), 64, channels_last=True),
    "256 -> 256, 3x3": conv_cases.Conv((1, 256, 28, 28), 256),
    "3 -> 64, 7x7 s2, pool 3 s2": conv_cases.Conv(
        (1, 3, 224, 224), 64, (7, 7), (2, 2), (3, 3), pool=(3, 3), pool_padding=(1, 1)
    ),
    "64 -> 64, 5x5": conv_cases.Conv((1, 64, 56, 56), 64, (5, 5), padding=(2, 2)),
    "128 -> 128, 1x1": conv_cases.Conv((1, 128, 56, 56), 128, (1, 1), padding=(0, 0)),
    "128 -> 128, 1d 5": conv_cases.Conv(
        (8, 128, 1, 256), 128, (1, 5), padding=(0, 2), pool=(1, 2), pool_stride=(1, 2)
    ),
    "1 -> 80, 1d 251 s10, pool 3": conv_cases.Conv(
        (8, 1, 1, 16000), 80, (1, 251), (1, 10), (0, 0), pool=(1, 3), pool_stride=(1, 3)
    ),
}


def registers_of_sm_90a():
    """{kernel: registers}, from resources.txt; of kernels that share a name the most."""
    registers = {}
    for line in (ROOT / "cuda/resources.txt").read_text().splitlines()[1:]:
        name, numbers = line.split(" sm_90a ") if " sm_90a " in line else (None, "")
        if name:
            name = name.strip()
            registers[name] = max(registers.get(name, 0), int(numbers.split()[0]))
    return registers


def symbols_of(path):
    """{offset in the library: mangled name}."""
    lines = subprocess.check_output(["nm", str(path)], text=True).splitlines()
    return {int(line.split()[0], 16): line.split()[2] for line in lines if len(line.split()) == 3}


class Recorder:
    def __init__(self):
        self.library = _emulation.load()
        self.library.emulator_device(*H200)
        self.symbols = symbols_of(_emulation.emulation_build.build())
        self.registers = registers_of_sm_90a()

    def lines(self, title, run):
        """A line of the table for each kernel with shared memory that ``run`` launches."""
        self.library.emulator_record_launches(True)
        run()
        self.library.emulator_record_launches(False)
        launches = self.library.emulator_recorded_launches().decode().splitlines()
        return [line for line in map(self._line, [title] * len(launches), dict.fromkeys(launches)) if line]

    def _line(self, title, launch):
        offset, *grid, cluster, threads, shared = map(int, launch.split())
        if shared == 0:
            return None
        name = re.sub(r"\bHalf\b", "__half", kernel_name(self.symbols[offset]))
        name = re.sub(r"\bBFloat16\b", "__nv_bfloat16", name)
        registers = self.registers[name]
        held = min(
            blocks_held(registers, threads), SHARED_OF_MULTIPROCESSOR // (shared + SHARED_OF_ANY_BLOCK)
        )
        return (
            f"{title:38} {name:72} {'x'.join(map(str, grid)):>12} {cluster:7} {threads:7} {shared:7} "
            f"{registers:9} {held:6}"
        )


def rnn_run(cell, n, hidden, dtype, tf32):
    """One training step of a layer, forward and backward."""
    operands = rnn_cases.convert(rnn_cases.Rnn(1, n, 8, hidden).draw(cell), "cpu", dtype)
    ops = torch.ops.cnnrnn_emulated
    *results, reserve = ops.rnn_train(cell, *operands, *rnn_cases.WHOLE, tf32, False)
    rnn_cases.rnn_backward(ops, cell, rnn_cases.WHOLE, results, operands, results, reserve, tf32=tf32)


def conv_run(case, dtype, precision):
    drawn = case.draw(torch.zeros)
    conv_cases.run_conv(torch.ops.cnnrnn_emulated, "cpu", case, dtype, *drawn, precision, check=False)


def table():
    recorder = Recorder()
    titles = ("grid", 12), ("cluster", 7), ("threads", 7), ("shared", 7), ("registers", 9), ("blocks", 6)
    yield f"{'layer':38} {'kernel':72} " + " ".join(f"{title:>{width}}" for title, width in titles)
    for precision, (dtype, tf32) in PRECISIONS.items():
        for cell, n, hidden in RNNS:
            title = f"{cell} {precision} N {n} H {hidden}"
            yield from recorder.lines(title, partial(rnn_run, cell, n, hidden, dtype, tf32))
        for name, case in CONVS.items():
            asked = "high" if tf32 else "highest"
            yield from recorder.lines(f"{name}, {precision}", partial(conv_run, case, dtype, asked))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a file for the table, beside standard output")
    arguments = parser.parse_args()
    lines = []
    for line in table():
        print(line, flush=True)
        lines.append(line)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
