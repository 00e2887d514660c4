"""What every case has: the harness, the peers and the report know no more of it than this."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

FORWARD, TRAINING = "forward", "training"
PHASES = (FORWARD, TRAINING)
SEED = 20260101


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


class Case:
    """A plain description of one computation. Everything a contender needs comes from it.

    ``stock()`` is the torch.nn module (fixed seed) and ``ours(stock)`` ours with the same parameters;
    ``input()`` is the tensor x whose gradient training may need, and ``upstream(stock64, x64)`` the gradient
    that arrives at the first output. ``bind`` and ``bind_ours`` make the call that is timed.
    """

    family: str  # the report's section
    group: str  # whose geometric mean it enters
    name: str
    quick: bool  # part of --quick
    phases: tuple[str, ...] = PHASES
    both_allocators: bool = False  # measured under the default allocator too
    image_layout: ClassVar[bool] = False  # channels_last means something here
    input_grad: bool = True  # training needs the gradient of x
    dtype: torch.dtype = torch.float32
    # Largest error over the largest value where torch's own error is no measure, as for narrow weights.
    tolerance: float | None = None
    # Why a kind of peer is not asked, or None.
    no_compile: str | None = None
    no_onnx: str | None = None

    @property
    def variant(self) -> tuple[str, Case] | None:
        """Another case that ours is timed on beside this one, and what distinguishes it: no peer."""
        return None

    @property
    def variant_cost(self) -> float | None:
        """Operations of the variant over those of this case, if they are what the pair shows."""
        return None

    def flop(self, phase: str) -> float:
        """Operations that the dense direct algorithm needs; activations are not counted."""
        raise NotImplementedError

    def reads(self, phase: str) -> tuple[int, int]:
        """Bytes that must be read at least, and bytes of the set they come from."""
        raise NotImplementedError

    def stock(self) -> nn.Module:
        raise NotImplementedError

    def ours(self, stock: nn.Module) -> nn.Module:
        raise NotImplementedError

    def input(self) -> Tensor:
        raise NotImplementedError

    def upstream(self, stock64: nn.Module, x64: Tensor) -> Tensor:
        raise NotImplementedError

    def output_names(self) -> tuple[str, ...]:
        """Names of the results in forward."""
        return ("output",)

    def arguments(self, x: Tensor) -> tuple:
        """Positional arguments of the stock module."""
        return (x,)

    def bind(self, module: nn.Module, x: Tensor) -> Callable[[], object]:
        """One call of the stock module, or of a peer made from it; a partial costs less than a lambda."""
        return functools.partial(module, *self.arguments(x))

    def bind_ours(self, module: nn.Module, x: Tensor) -> Callable[[], object]:
        return self.bind(module, x)
