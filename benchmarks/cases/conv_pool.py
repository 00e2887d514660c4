"""The convolution block: the seven cases from first layers to deep ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import FORWARD, SEED, Case, generator


@dataclass(frozen=True)
class ConvPoolCase(Case):
    """convolution 3×3 + bias + ReLU + max pool 2×2 on ``[n, c, s, s]`` to ``k`` channels."""

    n: int
    c: int
    s: int
    k: int
    padding: int = 0
    quick: bool = False

    family: ClassVar[str] = "conv_pool"
    group: ClassVar[str] = "conv_pool"
    both_allocators: ClassVar[bool] = True
    image_layout: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.n}×{self.c}×{self.s}² → {self.k}" + (f", pad {self.padding}" if self.padding else "")

    @property
    def input_grad(self) -> bool:
        """Does training need the gradient of the input? Not of an image (at most 3 channels)."""
        return self.c > 3

    def flop(self, phase: str) -> float:
        """Operations of the dense direct convolution; a gradient costs as much as the forward pass."""
        side = self.s + 2 * self.padding - 2
        forward = 2.0 * self.n * self.k * self.c * 9 * side * side
        return forward if phase == FORWARD else forward * (3 if self.input_grad else 2)

    def reads(self, phase: str) -> tuple[int, int]:
        """Bytes that must be read at least, and bytes of the set they come from.

        The input and the weights once, and once more with the output's gradient in training.
        """
        x, weight = 4 * self.n * self.c * self.s**2, 4 * self.k * self.c * 9
        side = (self.s + 2 * self.padding - 2) // 2
        y = 4 * self.n * self.k * side * side
        return (x + weight, x + weight) if phase == FORWARD else (2 * (x + weight) + y, x + weight + y)

    def stock(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            conv = nn.Conv2d(self.c, self.k, 3, padding=self.padding)
        return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2))

    def ours(self, stock: nn.Module) -> nn.Module:
        from cnnrnn_ext import ConvPool2d

        module = ConvPool2d(
            self.c, self.k, 3, padding=self.padding, activation="relu", pool="max", pool_size=2
        )
        module.load_state_dict(stock[0].state_dict())
        return module

    def input(self) -> Tensor:
        return torch.randn(self.n, self.c, self.s, self.s, generator=generator())

    def upstream(self, stock64: nn.Module, x64: Tensor) -> Tensor:
        """A random gradient of the output, zero where rounding decides which position of a window wins.

        Two values closer than float32 can tell apart are ranked by chance, in torch's kernel as in ours, and
        the whole gradient follows the winner: it would measure luck. Every other window keeps its gradient.
        """
        rows = []
        random = generator()
        with torch.no_grad():
            for image in x64.split(1):  # image by image: the map before pooling is big in float64
                z = stock64[0](image)
                windows = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
                top = windows.topk(2, dim=-1).values
                near = 1e-4 * z.abs().max()
                winner = (top[..., 0] > near) & (top[..., 0] - top[..., 1] > near)
                dead = top[..., 0] < -near
                rows.append(torch.randn(winner.shape, generator=random) * (winner | dead))
        return torch.cat(rows)


CASES = (
    ConvPoolCase(512, 1, 28, 32),
    ConvPoolCase(16, 3, 112, 32, padding=1, quick=True),
    ConvPoolCase(16, 3, 224, 64, padding=1),
    ConvPoolCase(512, 32, 13, 64, quick=True),
    ConvPoolCase(16, 32, 56, 64, padding=1),
    ConvPoolCase(8, 64, 112, 64, padding=1),
    ConvPoolCase(8, 128, 56, 128, padding=1),
)
