"""Whole stacks of convolution blocks: those of real networks, from end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FORWARD, PHASES, SEED, TRAINING, generator
from .conv_pool import Block, ConvCase


class Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)), ResNet's building block with BatchNorm folded into its convolutions."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


@dataclass(frozen=True)
class ResidualBlock:
    """Two 3x3 convolutions with a shortcut, 1x1 where the map's size or channels change."""

    k: int
    stride: int = 1

    def parts(self, c: int) -> tuple[Block, Block, Block | None]:
        changes = self.stride > 1 or c != self.k
        return (
            Block(self.k, padding=1, stride=self.stride, window=1),
            Block(self.k, padding=1, window=1, relu=False),
            Block(self.k, kernel=1, stride=self.stride, window=1, relu=False) if changes else None,
        )

    def stock(self, c: int) -> nn.Module:
        first, second, shortcut = self.parts(c)
        return Residual(
            nn.Sequential(first.stock(c), second.stock(self.k)),
            shortcut.stock(c) if shortcut else nn.Identity(),
        )

    def ours(self, stock: Residual) -> nn.Module:
        first, second, shortcut = self.parts(stock.body[0][0].in_channels)
        body = nn.Sequential(first.ours(stock.body[0]), second.ours(stock.body[1]))
        return Residual(body, shortcut.ours(stock.shortcut) if shortcut else nn.Identity())

    def reduced(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.parts(0)[0].reduced(size)

    def weights(self, c: int) -> int:
        first, second, shortcut = self.parts(c)
        return first.weights(c) + second.weights(self.k) + (shortcut.weights(c) if shortcut else 0)

    def flop(self, n: int, c: int, size: tuple[int, int]) -> float:
        first, second, shortcut = self.parts(c)
        forward = first.flop(n, c, size) + second.flop(n, self.k, first.reduced(size))
        return forward + (shortcut.flop(n, c, size) if shortcut else 0)


@dataclass(frozen=True)
class StackCase(ConvCase):
    """The convolutions of a real network, end to end, on ``[n, c, h, w]``.

    Rounding flips near-ties in every layer, and whole gradients with them, in torch's kernels as in ours: in
    training the measure of a gradient's error is a part of its largest value.
    """

    label: str
    blocks: tuple[Block | ResidualBlock, ...]
    n: int
    c: int
    h: int
    w: int
    phases: tuple[str, ...] = PHASES
    quick: bool = False
    group: str = "conv_pool stacks"

    @property
    def tolerance(self) -> float | None:
        return None if self.phases == (FORWARD,) else 0.05

    @property
    def name(self) -> str:
        kind = "" if len(self.phases) > 1 else f", {self.phases[0]}"
        return f"{self.label}, {self.n}×{self.c}×{self.h}×{self.w}{kind}"

    @property
    def size(self) -> tuple[int, int]:
        return self.h, self.w

    @property
    def dims(self) -> int:
        return self.blocks[0].dims if isinstance(self.blocks[0], Block) else 2

    @property
    def image_layout(self) -> bool:
        return self.dims == 2

    def costs(self) -> tuple[float, int, int]:
        flop, weights, c, size = 0.0, 0, self.c, self.size
        for block in self.blocks:
            flop += block.flop(self.n, c, size)
            weights += block.weights(c)
            c, size = block.k, block.reduced(size)
        return flop, weights, self.n * c * math.prod(size)

    def flop(self, phase: str) -> float:
        """As of blocks: of images only the first layer has no gradient to compute."""
        forward, _, _ = self.costs()
        first = 0 if self.input_grad else self.blocks[0].flop(self.n, self.c, self.size)
        return forward if phase == FORWARD else forward * 3 - first

    def stock(self) -> nn.Module:
        channels = [self.c, *(block.k for block in self.blocks)]
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return nn.Sequential(*(b.stock(c) for b, c in zip(self.blocks, channels, strict=False)))

    def ours(self, stock: nn.Module) -> nn.Module:
        return nn.Sequential(*(b.ours(s) for b, s in zip(self.blocks, stock, strict=True)))

    def input(self) -> Tensor:
        x = super().input()
        return x.squeeze(2) if self.dims == 1 else x

    def upstream(self, stock64: nn.Module, x64: Tensor) -> Tensor:
        with torch.no_grad():
            size = stock64(x64[:1]).shape[1:]
        return torch.randn(len(x64), *size, generator=generator())


SAME = {"kernel": 3, "padding": 1}
SEED_NETWORK = (Block(32), Block(64))
# EasyOCR's CRNN; the BatchNorm of two layers is folded into them.
OCR = (
    Block(32, **SAME),
    Block(64, **SAME),
    Block(128, **SAME, window=1),
    Block(128, **SAME, window=(2, 1)),
    Block(256, **SAME, window=1),
    Block(256, **SAME, window=(2, 1)),
    Block(256, kernel=2, window=1),
)
# pyannote's PyanNet, without the norms between its blocks.
SPEAKER = (
    Block(80, kernel=251, stride=10, window=3, relu=False, dims=1),
    Block(60, kernel=5, window=3, relu=False, dims=1),
    Block(60, kernel=5, window=3, relu=False, dims=1),
)
POLICY = (
    Block(32, kernel=8, stride=4, window=1),
    Block(64, kernel=4, stride=2, window=1),
    Block(64, window=1),
)
VGG11 = tuple(
    Block(k, **SAME, window=window)
    for k, window in ((64, 2), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2), (512, 1), (512, 2))
)
RESNET18 = (
    Block(64, kernel=7, padding=3, stride=2, window=3, step=2, margin=1),
    *(ResidualBlock(k, stride) for k in (64, 128, 256, 512) for stride in (1 if k == 64 else 2, 1)),
)


def both_phases(label: str, blocks: tuple, n: int, c: int, h: int, w: int, quick: bool = False) -> tuple:
    return tuple(StackCase(label, blocks, n, c, h, w, (phase,), quick) for phase in PHASES)


CASES = (
    *both_phases("seed network", SEED_NETWORK, 512, 1, 28, 28, quick=True),
    *both_phases("OCR", OCR, 1, 1, 64, 400),
    *both_phases("OCR", OCR, 16, 1, 64, 400),
    *both_phases("speaker segmentation", SPEAKER, 32, 1, 1, 160_000),
    StackCase("policy, acting", POLICY, 8, 3, 84, 84, (FORWARD,)),
    *both_phases("policy, learning", POLICY, 256, 3, 84, 84),
    *both_phases("VGG-11", VGG11, 1, 3, 224, 224),
    StackCase("VGG-11", VGG11, 16, 3, 224, 224, (FORWARD,)),
    StackCase("VGG-11", VGG11, 16, 3, 112, 112, (TRAINING,)),  # of a size that takes seconds
    *both_phases("ResNet-18", RESNET18, 1, 3, 224, 224),
    StackCase("ResNet-18", RESNET18, 16, 3, 224, 224, (FORWARD,)),
    StackCase("ResNet-18", RESNET18, 16, 3, 112, 112, (TRAINING,)),
)
