"""Recurrent sequences and single steps, generic over the cell: what is computed and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from .base import FORWARD, PHASES, SEED, Case, generator

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
TITLES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "Elman"}
CELLS = tuple(GATES)
_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}  # in torch.nn and here

PADDED, PACKED, LENGTHS, RESETS = "padded", "packed", "lengths", "resets"
EPISODE_END = 1 / 50  # probability of a reset at a step
# Largest error over the largest value: weights rounded to 8 bits of mantissa, or to 127 steps a row, come to
# 0.004 and 0.008 at the sizes of the grid if everything else is exact.
NARROW_TOLERANCE = {torch.bfloat16: 0.01, torch.int8: 0.02}
_BYTES = {torch.float32: 4, torch.bfloat16: 2, torch.int8: 1}

NO_COMPILE = (
    "leaves nn.LSTM, nn.GRU and nn.RNN to eager (a graph break); told to trace them it unrolls all steps, "
    "or fails in LSTM training"
)
NO_ONNX = {
    "packed": "takes no PackedSequence; the case with lengths has its figure",
    "bfloat16": "has no bfloat16 recurrence on the CPU",
}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class OnPacked(nn.Module):
    """Variable lengths on padded input with stock modules: pack, run, pad."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, lengths: Tensor):
        packed, states = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(packed, total_length=x.shape[0])[0], states


class StepByStep(nn.Module):
    """Resets with stock modules, as policies of reinforcement learning run: step by step, state masked."""

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, keep: Tensor):
        """``keep`` [T, N, 1]: 0 where the state is reset before that step, else 1."""
        state, outputs = None, []
        for x_t, keep_t in zip(x, keep, strict=True):
            if state is not None:
                state = tuple(s * keep_t for s in state)
            output, state = self.rnn(x_t.unsqueeze(0), state)
            outputs.append(output)
        return torch.cat(outputs), state


_WRAPPERS = {LENGTHS: OnPacked, RESETS: StepByStep}


@dataclass(frozen=True)
class RNNCase(Case):
    """``layers`` recurrent layers over ``[t, n, i]`` with ``h`` hidden units.

    ``form`` is how the sequence comes: padded; packed; padded with lengths; or with resets. The lengths are
    uniform in [t/4, t], the longest is t. With ``state`` the initial states are given, as in streaming.
    """

    cell: str
    t: int
    n: int
    i: int
    h: int
    layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    form: str = PADDED
    state: bool = False
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    label: str = ""  # of a real workload
    phases: tuple[str, ...] = PHASES
    quick: bool = False
    both_allocators: bool = False

    no_compile: ClassVar[str] = NO_COMPILE

    @property
    def family(self) -> str:
        if self.label:
            return "workload"
        if self.weight_dtype:
            return "narrow"
        if self.dtype != torch.float32:
            return _dtype_name(self.dtype)
        if self.form != PADDED:
            return "variable"
        return "streaming" if self.t == 1 else self.cell

    @property
    def group(self) -> str:
        if self.family in CELLS or self.label:
            return self.family
        kind = {PACKED: "packed ", LENGTHS: "lengths "}.get(self.form, "")
        kind += f"{_dtype_name(self.weight_dtype)} weights " if self.weight_dtype else ""
        return f"{self.family}, {kind}{TITLES[self.cell]}"

    @property
    def name(self) -> str:
        parts = [f"T{self.t} N{self.n} I{self.i} H{self.h}"]
        parts += [f"{self.layers} layers"] if self.layers > 1 else []
        parts += ["bidirectional"] if self.bidirectional else []
        parts += [self.form] if self.form != PADDED else []
        parts += [f"{_dtype_name(self.weight_dtype)} weights"] if self.weight_dtype else []
        text = ", ".join(parts)
        if self.family not in CELLS:
            text = f"{TITLES[self.cell]} {text}"
        return f"{self.label}: {text}" if self.label else text

    @property
    def tolerance(self) -> float | None:
        return NARROW_TOLERANCE[self.weight_dtype] if self.weight_dtype else None

    @property
    def no_onnx(self) -> str | None:
        return NO_ONNX.get(self.form) or NO_ONNX.get(_dtype_name(self.dtype))

    @property
    def variant(self) -> tuple[str, Case] | None:
        if self.form in (PACKED, LENGTHS):
            return "padded", replace(self, form=PADDED)
        if self.weight_dtype:
            return "float32", replace(self, weight_dtype=None)
        return ("float32", replace(self, dtype=torch.float32)) if self.dtype != torch.float32 else None

    @property
    def variant_cost(self) -> float | None:
        return self.t * self.n / self.steps if self.form in (PACKED, LENGTHS) else None

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def lengths(self) -> Tensor:
        """[N], in no order; a packed sequence has them longest first."""
        lengths = torch.randint(self.t // 4, self.t + 1, (self.n,), generator=generator())
        lengths[lengths.argmax()] = self.t
        return lengths.sort(descending=True).values if self.form == PACKED else lengths

    @property
    def steps(self) -> int:
        """Rows of x that are computed."""
        return int(self.lengths().sum()) if self.form in (PACKED, LENGTHS) else self.t * self.n

    def _weights(self) -> list[tuple[int, int]]:
        """(elements of weight_ih, elements of weight_hh) of each layer, both directions together."""
        rows = self.directions * GATES[self.cell] * self.h
        widths = [self.i, *[self.directions * self.h] * (self.layers - 1)]
        return [(rows * width, rows * self.h) for width in widths]

    def flop(self, phase: str) -> float:
        """Operations of the two matrix products of every layer."""
        forward = 2.0 * self.steps * sum(ih + hh for ih, hh in self._weights())
        return forward if phase == FORWARD else 3 * forward

    def reads(self, phase: str) -> tuple[int, int]:
        """The recurrent weights at every step, in training once more on the way back; the rest once.

        They come from one layer's recurrent weights; a single step reads all weights once a call.
        """
        size, width = _BYTES[self.weight_dtype or self.dtype], _BYTES[self.dtype]
        recurrent = size * sum(hh for _, hh in self._weights())
        once = size * sum(ih for ih, _ in self._weights()) + width * self.steps * self.i
        total = self.t * recurrent + once
        source = recurrent + once if self.t == 1 else recurrent // self.layers
        return (total, source) if phase == FORWARD else (2 * total, source)

    def _options(self) -> dict:
        return {
            "num_layers": self.layers,
            "bidirectional": self.bidirectional,
            "batch_first": self.batch_first,
            "dtype": self.dtype,
        }

    def stock(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            module = getattr(nn, _NAMES[self.cell])(self.i, self.h, **self._options())
        return _WRAPPERS[self.form](module) if self.form in _WRAPPERS else module

    def ours(self, stock: nn.Module) -> nn.Module:
        import cnnrnn_ext

        options = self._options()
        if self.weight_dtype:
            options["weight_dtype"] = self.weight_dtype
        module = getattr(cnnrnn_ext, _NAMES[self.cell])(self.i, self.h, **options)
        module.load_state_dict((stock.rnn if self.form in _WRAPPERS else stock).state_dict())
        return module

    def _shape(self, width: int) -> tuple[int, ...]:
        if self.form == PACKED:
            return self.steps, width
        return (self.n, self.t, width) if self.batch_first else (self.t, self.n, width)

    def input(self) -> Tensor:
        return torch.randn(self._shape(self.i), generator=generator()).to(self.dtype)

    def upstream(self, stock64: nn.Module, x64: Tensor) -> Tensor:
        return torch.randn(self._shape(self.directions * self.h), generator=generator())

    def output_names(self) -> tuple[str, ...]:
        return ("output", "h_n", "c_n") if self.cell == "lstm" else ("output", "h_n")

    def resets(self) -> Tensor:
        return torch.rand(self.t, self.n, generator=generator()) < EPISODE_END

    def arguments(self, x: Tensor) -> tuple:
        if self.form == PACKED:
            batch_sizes = (self.lengths() > torch.arange(self.t).unsqueeze(1)).sum(1)
            return (PackedSequence(x, batch_sizes),)
        if self.form == LENGTHS:
            return (x, self.lengths())
        if self.form == RESETS:
            return (x, (~self.resets()).unsqueeze(-1).to(x.dtype))
        if self.state:
            size = (self.layers * self.directions, self.n, self.h)
            return (x, _states(self.cell, size, x.dtype))
        return (x,)

    def bind_ours(self, module: nn.Module, x: Tensor) -> Callable[[], object]:
        if self.form == LENGTHS:
            return functools.partial(module, x, lengths=self.lengths())
        if self.form == RESETS:
            return functools.partial(module, x, reset=self.resets())
        return self.bind(module, x)


def _states(cell: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor | tuple[Tensor, Tensor]:
    random = generator()
    h, c = (torch.randn(size, generator=random).mul(0.5).to(dtype) for _ in range(2))
    return (h, c) if cell == "lstm" else h


@dataclass(frozen=True)
class CellCase(Case):
    """One step of a cell on ``[n, h]`` with given states."""

    cell: str
    n: int
    h: int
    weight_dtype: torch.dtype | None = None
    phases: tuple[str, ...] = PHASES
    quick: bool = False

    # Compiling takes seconds a case: two sizes show what it does.
    COMPILED_SIZES: ClassVar[tuple[int, ...]] = (128, 512)

    @property
    def family(self) -> str:
        return "narrow" if self.weight_dtype else "cell"

    @property
    def group(self) -> str:
        weights = f", {_dtype_name(self.weight_dtype)} weights" if self.weight_dtype else ""
        return f"{TITLES[self.cell]} cell, N{self.n}{weights}"

    @property
    def name(self) -> str:
        weights = f", {_dtype_name(self.weight_dtype)} weights" if self.weight_dtype else ""
        return f"{TITLES[self.cell]} cell N{self.n} I{self.h} H{self.h}{weights}"

    @property
    def tolerance(self) -> float | None:
        return NARROW_TOLERANCE[self.weight_dtype] if self.weight_dtype else None

    @property
    def no_compile(self) -> str | None:
        sizes = " and ".join(map(str, self.COMPILED_SIZES))
        return None if self.h in self.COMPILED_SIZES else f"timed at H = {sizes} only"

    @property
    def variant(self) -> tuple[str, Case] | None:
        return ("float32", replace(self, weight_dtype=None)) if self.weight_dtype else None

    def flop(self, phase: str) -> float:
        """Operations of the two matrix products."""
        forward = 2.0 * self.n * GATES[self.cell] * self.h * 2 * self.h
        return forward if phase == FORWARD else 3 * forward

    def reads(self, phase: str) -> tuple[int, int]:
        """All weights, and in training once more on the way back."""
        weights = _BYTES[self.weight_dtype or self.dtype] * GATES[self.cell] * self.h * 2 * self.h
        return (weights, weights) if phase == FORWARD else (2 * weights, weights)

    def stock(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return getattr(nn, f"{_NAMES[self.cell]}Cell")(self.h, self.h)

    def ours(self, stock: nn.Module) -> nn.Module:
        import cnnrnn_ext

        options = {"weight_dtype": self.weight_dtype} if self.weight_dtype else {}
        module = getattr(cnnrnn_ext, f"{_NAMES[self.cell]}Cell")(self.h, self.h, **options)
        module.load_state_dict(stock.state_dict())
        return module

    def input(self) -> Tensor:
        return torch.randn(self.n, self.h, generator=generator())

    def upstream(self, stock64: nn.Module, x64: Tensor) -> Tensor:
        return torch.randn(self.n, self.h, generator=generator())

    def output_names(self) -> tuple[str, ...]:
        return ("h_1", "c_1") if self.cell == "lstm" else ("h_1",)

    def arguments(self, x: Tensor) -> tuple:
        return (x, _states(self.cell, (self.n, self.h), x.dtype))
