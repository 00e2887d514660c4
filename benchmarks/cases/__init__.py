"""The grids: one row per case, how to build its stock and our module, and what it costs to compute.

base       what every case has
conv_pool  the convolution block and its grid
stacks     the convolutions of real networks
rnn        recurrent sequences and cells; grid: their rows, real networks among them
"""

from . import conv_pool, grid, stacks
from .base import FORWARD, PHASES, TRAINING, Case
from .conv_pool import ConvPoolCase
from .rnn import CellCase, RNNCase
from .stacks import StackCase

__all__ = [
    "CASES",
    "FAMILIES",
    "FORWARD",
    "PHASES",
    "TRAINING",
    "Case",
    "CellCase",
    "ConvPoolCase",
    "RNNCase",
    "StackCase",
]

CASES: tuple[Case, ...] = (*conv_pool.CASES, *stacks.CASES, *grid.CASES)
FAMILIES = tuple(dict.fromkeys(case.family for case in CASES))


def select(
    family: str | None = None, quick: bool = False, text: str = "", allocator: str = "tuned"
) -> list[Case]:
    """The cases of a family, of --quick, whose "family name" contains ``text``, under this allocator."""
    return [
        case
        for case in CASES
        if family in (None, case.family)
        and (case.quick or not quick)
        and text.lower() in f"{case.family} {case.name}".lower()
        and (case.both_allocators or allocator == "tuned")
    ]
