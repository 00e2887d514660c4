"""The grid of the recurrent operators: one row per case, and the recurrent parts of real networks.

A shape is steps T, batch N, input I, hidden H.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .base import FORWARD, TRAINING
from .rnn import CELLS, LENGTHS, PACKED, RESETS, CellCase, RNNCase

# In --quick: one case of each kind, and the cell that shows most there.
BASE = (
    RNNCase("lstm", 16, 32, 1600, 128, quick=True),
    RNNCase("lstm", 100, 1, 256, 256, quick=True),
    RNNCase("lstm", 100, 1, 1024, 1024),
    RNNCase("lstm", 64, 64, 256, 256),
    RNNCase("lstm", 50, 128, 64, 128),
    RNNCase("lstm", 100, 32, 512, 512),
    RNNCase("lstm", 35, 20, 650, 650),
)
MORE = (
    RNNCase("lstm", 80, 3, 120, 320),
    RNNCase("lstm", 37, 9, 100, 200),  # odd sizes
    RNNCase("lstm", 64, 64, 256, 256, layers=2, bidirectional=True),
)
LSTM = (*(replace(case, both_allocators=True) for case in BASE), *MORE)
GRU = tuple(replace(case, cell="gru", quick=case.n == 1 and case.quick) for case in (*BASE, *MORE))
ELMAN = tuple(replace(case, cell="rnn_tanh", quick=case.h == 128 and case.quick) for case in (*BASE, *MORE))

_RAGGED = (RNNCase("lstm", 64, 64, 256, 256, form=LENGTHS), RNNCase("lstm", 80, 3, 120, 320, form=LENGTHS))
VARIABLE = (
    *(replace(case, form=PACKED) for case in _RAGGED),
    *(replace(case, quick=case.n == 3) for case in _RAGGED),
    *(replace(case, cell="gru") for case in _RAGGED),
)

STREAMING = tuple(
    RNNCase(cell, 1, 1, h, h, state=True, phases=(FORWARD,), quick=(cell, h) == ("lstm", 128))
    for cell in CELLS
    for h in (64, 128, 256, 512, 1024)
)

CELL_SIZES = (64, 128, 256, 512)
CELL = (
    *(
        CellCase(cell, 1, h, phases=(FORWARD,), quick=(cell, h) == ("lstm", 64))
        for cell in CELLS
        for h in CELL_SIZES
    ),
    *(CellCase(cell, 64, h) for cell in CELLS for h in CELL_SIZES),
)

# Where the processor has no bfloat16 arithmetic, a training step of stock torch takes 5 s at the first of
# these sizes, half a minute at the second: one case of training must do, and none in --quick.
BFLOAT16 = (
    RNNCase("lstm", 64, 64, 256, 256, dtype=torch.bfloat16),
    RNNCase("lstm", 100, 32, 512, 512, dtype=torch.bfloat16, phases=(FORWARD,)),
    RNNCase("gru", 64, 64, 256, 256, dtype=torch.bfloat16, phases=(FORWARD,)),
)

NARROW = (
    *(
        RNNCase("lstm", 100, 1, h, h, weight_dtype=dtype, phases=(FORWARD,), quick=h == 256)
        for h in (256, 1024)
        for dtype in (torch.bfloat16, torch.int8)
    ),
    *(CellCase(cell, 1, 256, weight_dtype=torch.bfloat16, phases=(FORWARD,)) for cell in ("lstm", "gru")),
)


def _two_way(label: str, t: int, n: int, i: int, h: int, layers: int, **options) -> RNNCase:
    return RNNCase("lstm", t, n, i, h, layers=layers, bidirectional=True, label=label, **options)


_ONLY_FORWARD = {"phases": (FORWARD,)}
WORKLOAD = (
    # EasyOCR's CRNN on images 200 and 600 wide; a Linear stands between its two layers there
    _two_way("OCR, W200", 50, 1, 256, 256, 2, quick=True, **_ONLY_FORWARD),
    _two_way("OCR, W600", 150, 1, 256, 256, 2, **_ONLY_FORWARD),
    _two_way("OCR, W200", 50, 16, 256, 256, 2),
    _two_way("OCR, W600", 150, 16, 256, 256, 2),
    # pyannote's PyanNet: 10 s of speech
    _two_way("speakers", 589, 32, 60, 128, 4, batch_first=True),
    # Open-Unmix
    _two_way("source separation", 250, 1, 512, 256, 3, **_ONLY_FORWARD),
    _two_way("source separation", 250, 16, 512, 256, 3),
    # like Kokoro's text encoder
    _two_way("speech synthesis", 50, 1, 512, 256, 1, **_ONLY_FORWARD),
    _two_way("speech synthesis", 500, 1, 512, 256, 1, **_ONLY_FORWARD),
    *(
        RNNCase(cell, 1, 1, h, h, state=True, label="voice activity", phases=(FORWARD,))
        for cell in ("lstm", "gru")
        for h in (64, 128)
    ),
    *(RNNCase("lstm", 1, 8, h, h, state=True, label="acting", phases=(FORWARD,)) for h in (256, 512)),
    *(RNNCase("lstm", 128, 32, h, h, form=RESETS, label="learning", phases=(TRAINING,)) for h in (256, 512)),
)

CASES = (*LSTM, *GRU, *ELMAN, *VARIABLE, *STREAMING, *CELL, *BFLOAT16, *NARROW, *WORKLOAD)
