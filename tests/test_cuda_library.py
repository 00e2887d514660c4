"""The compiled CUDA library, where it was built: it loads, registers and exports what it should.

No GPU is needed, and none is used.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cnnrnn_ext"


@pytest.fixture(scope="module")
def library():
    path = PACKAGE / "_ops_cuda.so"
    if not path.exists():
        pytest.skip("the CUDA library was not built (CNNRNN_CUDA=1 builds it where nvcc is present)")
    return path


def test_it_loads_and_registers_every_operator(library):
    """Under a CPU build of torch too: nothing in it is resolved from torch's CUDA libraries at load time.

    Narrow weights have no CUDA kernel; every other operator has.
    """
    code = f"""
import re, torch
torch.ops.load_library({str(PACKAGE / "_ops_cpu.so")!r})
torch.ops.load_library({str(library)!r})
names = re.findall(r"^(\\w+)\\(", open({str(PACKAGE / "operators.schema")!r}).read(), re.M)
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(len(names), *(name for name in names if not has("cnnrnn_ext::" + name, "CUDA")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["12", "rnn_narrow", "rnn_cell_narrow"]


def test_it_needs_only_the_stable_abi(library):
    """Every symbol it takes from torch is a function of torch's C shim, and it exports none of its own."""
    if shutil.which("nm") is None:
        pytest.skip("nm not found")
    table = subprocess.check_output(["nm", "-D", str(library)], text=True).splitlines()
    needed = [line.split()[-1] for line in table if " U " in line]
    torchs = [name for name in needed if "torch" in name or "c10" in name]
    assert torchs
    assert all(name.startswith(("aoti_torch_", "torch_")) for name in torchs), torchs
    assert not [line for line in table if " T " in line and "cnnrnn" in line]


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN12_GLOBAL__N_16kernelIfLi4EEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN12_GLOBAL__N_16kernelIfLi4EEEvPT_
    0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8192 bytes smem
"""


PTX = """.visible .entry _ZN12_GLOBAL__N_16kernelIfLi4EEEvPT_(
	.param .u64 p
)
.maxntid 256, 1, 1
.minnctapersm 1
{
}
.visible .entry other(
)
{
	.loc 1 .maxntid 7
}
"""


@pytest.fixture
def resources():
    specification = importlib.util.spec_from_file_location("resources", ROOT / "cuda" / "resources.py")
    resources = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(resources)
    return resources


def test_spills_are_read_from_the_compilers_report(resources):
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt not found")
    assert resources.parse(PTXAS) == [("kernel<float, 4>", 255, 24, 8192)]


def test_occupancy_follows_from_registers_and_launch_bounds(resources):
    assert resources.most_threads(PTX) == {"_ZN12_GLOBAL__N_16kernelIfLi4EEEvPT_": 256, "other": 1024}
    assert resources.blocks_held(255, 256) == 1
    assert resources.blocks_held(127, 128) == 4
    assert resources.blocks_held(128, 256) == 2
    assert resources.blocks_held(16, 128) == 16  # by its threads
