"""The convolution block: first layers to deep ones, other kernels, pools and dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import FORWARD, SEED, Case, generator

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


@dataclass(frozen=True)
class Block:
    """convolution + bias + ReLU + max pool to ``k`` channels; window 1: no pool.

    ``step`` is the pool's stride (default: the window), ``margin`` its padding. dims 1: height 1 throughout.
    """

    k: int
    kernel: int = 3
    padding: int = 0
    stride: int = 1
    window: int | tuple[int, int] = 2
    step: int | None = None
    margin: int = 0
    relu: bool = True
    dims: int = 2

    @property
    def pooled(self) -> bool:
        return self.window != 1

    def stock(self, c: int) -> nn.Sequential:
        conv = CONVOLUTIONS[self.dims](c, self.k, self.kernel, self.stride, self.padding)
        layers = [conv] + ([nn.ReLU()] if self.relu else [])
        if self.pooled:
            layers.append(POOLS[self.dims](self.window, self.step, self.margin))
        return nn.Sequential(*layers)

    def ours(self, stock: nn.Sequential) -> nn.Module:
        """Ours with the parameters of ``stock``."""
        from cnnrnn_ext import ConvPool1d, ConvPool2d

        conv = stock[0]
        pool = {"pool_size": self.window, "pool_stride": self.step, "pool_padding": self.margin}
        module = (ConvPool1d if self.dims == 1 else ConvPool2d)(
            conv.in_channels,
            self.k,
            self.kernel,
            self.stride,
            self.padding,
            activation="relu" if self.relu else "none",
            pool="max" if self.pooled else "none",
            **(pool if self.pooled else {}),
        )
        module.load_state_dict(conv.state_dict())
        return module

    def convolved(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after the convolution."""

        def side(length: int) -> int:
            return (length + 2 * self.padding - self.kernel) // self.stride + 1

        return (1 if self.dims == 1 else side(size[0])), side(size[1])

    def reduced(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after the pool."""
        window = (1, self.window) if self.dims == 1 else pair(self.window)
        margin = (0, self.margin) if self.dims == 1 else pair(self.margin)
        step = window if self.step is None else pair(self.step)
        height, width = (
            (length + 2 * m - w) // s + 1
            for length, w, s, m in zip(self.convolved(size), window, step, margin, strict=True)
        )
        return height, width

    def weights(self, c: int) -> int:
        return self.k * c * self.kernel**self.dims

    def flop(self, n: int, c: int, size: tuple[int, int]) -> float:
        """Operations of the dense direct convolution."""
        height, width = self.convolved(size)
        return 2.0 * n * self.weights(c) * height * width


class ConvCase(Case):
    """What blocks and stacks share: a batch of n images (or sequences) of c channels, size h x w."""

    family: ClassVar[str] = "conv_pool"
    image_layout: ClassVar[bool] = True
    n: int
    c: int

    @property
    def size(self) -> tuple[int, int]:
        raise NotImplementedError

    def costs(self) -> tuple[float, int, int]:
        """(operations of the forward pass, numbers of the weights, numbers of the output)."""
        raise NotImplementedError

    @property
    def input_grad(self) -> bool:
        """Does training need the gradient of the input? Not of an image (at most 3 channels)."""
        return self.c > 3

    def input(self) -> Tensor:
        return torch.randn(self.n, self.c, *self.size, generator=generator())

    def flop(self, phase: str) -> float:
        """Operations of the dense direct convolution; a gradient costs as much as the forward pass."""
        forward, _, _ = self.costs()
        return forward if phase == FORWARD else forward * (3 if self.input_grad else 2)

    def reads(self, phase: str) -> tuple[int, int]:
        """Bytes that must be read at least, and bytes of the set they come from.

        The input and the weights once, and once more with the output's gradient in training.
        """
        height, width = self.size
        _, weights, outputs = self.costs()
        x, weight, y = 4 * self.n * self.c * height * width, 4 * weights, 4 * outputs
        return (x + weight, x + weight) if phase == FORWARD else (2 * (x + weight) + y, x + weight + y)


@dataclass(frozen=True)
class ConvPoolCase(ConvCase):
    """One block on ``[n, c, s, s]``, or ``[n, c, h, s]``, or ``[n, c, s]`` with dims 1, to ``k`` channels."""

    n: int
    c: int
    s: int
    k: int
    padding: int = 0
    quick: bool = False
    kernel: int = 3
    stride: int = 1
    window: int = 2
    step: int | None = None
    margin: int = 0
    h: int | None = None
    dims: int = 2
    both_allocators: bool = False
    group: str = "conv_pool"

    @property
    def image_layout(self) -> bool:
        return self.dims == 2

    @property
    def block(self) -> Block:
        return Block(
            self.k,
            self.kernel,
            self.padding,
            self.stride,
            self.window,
            self.step,
            self.margin,
            dims=self.dims,
        )

    @property
    def size(self) -> tuple[int, int]:
        return (1, self.s) if self.dims == 1 else (self.s if self.h is None else self.h, self.s)

    @property
    def name(self) -> str:
        image = f"{self.s}" if self.dims == 1 else f"{self.s}²" if self.h is None else f"{self.h}×{self.s}"
        parts = [f"{self.n}×{self.c}×{image} → {self.k}"]
        parts += [f"kernel {self.kernel}"] if self.kernel != 3 else []
        parts += [f"stride {self.stride}"] if self.stride != 1 else []
        parts += [f"pad {self.padding}"] if self.padding else []
        parts += ["no pool"] if self.window == 1 else []
        if self.step is not None:
            parts += [f"pool {self.window}/{self.step}" + (f"/{self.margin}" if self.margin else "")]
        return ", ".join(parts)

    def costs(self) -> tuple[float, int, int]:
        height, width = self.block.reduced(self.size)
        return (
            self.block.flop(self.n, self.c, self.size),
            self.block.weights(self.c),
            self.n * self.k * height * width,
        )

    def stock(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return self.block.stock(self.c)

    def ours(self, stock: nn.Module) -> nn.Module:
        return self.block.ours(stock)

    def input(self) -> Tensor:
        x = super().input()
        return x.squeeze(2) if self.dims == 1 else x

    def upstream(self, stock64: nn.Module, x64: Tensor) -> Tensor:
        """A random gradient of the output, zero where rounding decides which position of a window wins.

        Two values closer than float32 can tell apart are ranked by chance, in torch's kernel as in ours, and
        the whole gradient follows the winner: it would measure luck. Every other window keeps its gradient.
        """
        rows = []
        random = generator()
        window, step = (self.window,) * self.dims, (self.step or self.window,) * self.dims
        with torch.no_grad():
            for image in x64.split(1):  # image by image: the map before pooling is big in float64
                z = stock64[0](image)
                near = 1e-4 * z.abs().max()
                z = F.pad(z, (self.margin,) * 2 * self.dims, value=-torch.inf)
                for dim in range(self.dims):
                    z = z.unfold(2 + dim, window[dim], step[dim])
                # The second place of a window of one position is far below.
                top = F.pad(z.flatten(2 + self.dims), (0, 1), value=-torch.inf).topk(2, dim=-1).values
                winner = (top[..., 0] > near) & (top[..., 0] - top[..., 1] > near)
                dead = top[..., 0] < -near
                rows.append(torch.randn(winner.shape, generator=random) * (winner | dead))
        return torch.cat(rows)


CASES = (
    ConvPoolCase(512, 1, 28, 32, both_allocators=True),
    ConvPoolCase(16, 3, 112, 32, padding=1, quick=True, both_allocators=True),
    ConvPoolCase(16, 3, 224, 64, padding=1, both_allocators=True),
    ConvPoolCase(512, 32, 13, 64, quick=True, both_allocators=True),
    ConvPoolCase(16, 32, 56, 64, padding=1, both_allocators=True),
    ConvPoolCase(8, 64, 112, 64, padding=1, both_allocators=True),
    ConvPoolCase(8, 128, 56, 128, padding=1, both_allocators=True),
    ConvPoolCase(8, 256, 28, 256, padding=1),
    ConvPoolCase(16, 3, 224, 64, padding=3, kernel=7, stride=2, window=3, step=2, margin=1),
    ConvPoolCase(1, 1, 28, 32),
    ConvPoolCase(1, 3, 224, 64, padding=1),
    ConvPoolCase(64, 128, 256, 128, kernel=5, dims=1),
    ConvPoolCase(16, 1, 300, 32, padding=1, h=80),
    ConvPoolCase(7, 5, 47, 24, padding=2, kernel=5, window=3, step=2, h=61),
    ConvPoolCase(8, 64, 112, 64, padding=1, window=1),
    ConvPoolCase(8, 128, 56, 128, padding=1, window=1),
)
