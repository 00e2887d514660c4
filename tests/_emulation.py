"""The emulation of tests/cuda_emulation as the tests load and ask it."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))
import build as emulation_build

# Shared memory of a block, blocks of the largest cluster, blocks that run at once
SM_80, SM_90 = (163 * 1024, 0, 108), (227 * 1024, 8, 132)
CLUSTERS_OF_16 = (227 * 1024, 16, 132)
NOTHING_AT_ONCE = (227 * 1024, 0, 1)  # blocks have room, groups of them do not
NO_SHARED_MEMORY = (0, 0, 1)  # to launchers that ask: no schedule with resident weights fits
# What a barrier that is left out leads to
VIOLATION = r"emulation: (race|uninitialised|access to a block that has|more arrivals|.*nobody initialised)"


def load():
    """The library, with the types of what the tests call in it; skips the test where it cannot be built."""
    reason = emulation_build.missing()
    if reason:
        pytest.skip(f"the emulation needs a C++ compiler: {reason}")
    path = emulation_build.build()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.run_planted.restype = ctypes.c_char_p
    library.run_planted.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_bool]
    library.run_fragments.restype = ctypes.c_char_p
    library.run_fragments.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_bool]
    library.emulator_device.argtypes = [ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint]
    library.emulator_drop_barrier.argtypes = [ctypes.c_char_p]
    library.emulator_seen_barriers.restype = ctypes.c_char_p
    library.emulator_record_launches.argtypes = [ctypes.c_bool]
    library.emulator_recorded_launches.restype = ctypes.c_char_p
    return library


def check_every_barrier_is_needed(library, run, at_least):
    """Without any one of the barriers that ``run`` comes to the emulator reports a violation."""
    library.emulator_seen_barriers()
    run()
    sites = library.emulator_seen_barriers().decode().split()
    assert len(sites) >= at_least, sites
    for site in sites:
        library.emulator_drop_barrier(site.encode())
        try:
            with pytest.raises(RuntimeError, match=VIOLATION):
                run()
        except pytest.fail.Exception:
            pytest.fail(f"the barrier at {site} can be left out unnoticed")
        finally:
            library.emulator_drop_barrier(b"")
