"""The embedded clips: real handwritten digits that move, among specks that move otherwise, in noise.

A clip shows one of scikit-learn's 1797 scans for 10 to 16 frames. The digit lives on the torus of
:mod:`digits`: where it slides out it comes back on the other side. Its start is uniform there, so at every
frame its position is uniform whatever the motion: no single frame tells how the digit moves, only the frames
together do. Small specks as bright as the digit move in ways of their own; each pixel has noise.
"""

import functools
import itertools
from dataclasses import dataclass

import torch

from cnnrnn_ext.recipes.data import digits
from cnnrnn_ext.recipes.draws import Draws

MOTIONS = (*digits.DIRECTIONS, "swinging", "bobbing")  # the last two: left and right, up and down
CLASSES = {"digit": [str(digit) for digit in range(10)], "motion": list(MOTIONS)}
SHORTEST, LONGEST = 10, 16  # frames
PERIOD = 8  # frames, of which a swinging digit goes one way in half: in every clip it turns
SWING = 3  # half pixels per frame, of a swinging or bobbing digit
SPECKS, SPECK = 2, 2  # how many, and their side in pixels
NOISE = 0.08  # standard deviation of a pixel's noise
EVALUATION = 1 << 32  # the epoch that evaluation's samples draw their numbers for: no training reaches it
FRAME = digits.FRAME_SIZE


@dataclass(frozen=True)
class MovingDigits:
    """Rows: every scan ``repeats`` times. In evaluation the repeats of a scan have different motions."""

    scans: digits.Scans
    repeats: int
    seed: int

    def __len__(self):
        return len(self.scans) * self.repeats

    def clips(self, rows, draws=None):
        """(frames [N, T, 1, 28, 28] in 0 … 1, lengths [N], {"digit": [N], "motion": [N]}).

        T is the longest length; frames behind a row's end are black. draws: of a training step, whose scans
        are distorted and whose motions are random.
        """
        rows = torch.as_tensor(rows)
        scan = rows // self.repeats
        distort = draws is not None
        if draws is None:
            draws = Draws(self.seed, EVALUATION, rows.tolist())
            motion = (scan + rows % self.repeats) % len(MOTIONS)
        else:
            motion = draws.integers(len(MOTIONS))
        lengths = SHORTEST + draws.integers(LONGEST - SHORTEST + 1)
        steps = int(lengths.max())
        big = digits.enlarge(self.scans.images[scan], draws.uniform(6).T if distort else None)
        frames = digits.place(big, _torus(_path(motion, draws)[:, :steps], digits.POSITIONS))
        _add_specks(frames, draws)
        frames += _noise()[draws.integers(len(_noise()), steps)].view_as(frames)
        frames.clamp_(0, 1)
        frames[torch.arange(steps) >= lengths[:, None]] = 0
        return frames, lengths, {"digit": self.scans.digit[scan], "motion": motion}


def load(seed, quick=False):
    """{"train" | "validation" | "test": MovingDigits}: every test scan is seen in every motion."""
    repeats = {"train": 2, "validation": 2, "test": len(MOTIONS)}
    splits = {}
    for name, scans in digits.load_scans(seed).items():
        if quick:
            scans = scans.subset(64 if name == "train" else 16, digits.generator(seed, digits.SUBSET))
        splits[name] = MovingDigits(scans, repeats[name], seed)
    return splits


def _path(motion, draws):
    """Positions [N, LONGEST, 2] (y, x) in half pixels, of digits that begin anywhere on the torus."""
    start = draws.integers(digits.POSITIONS, 1, 2)
    speed = torch.tensor(digits.SPEEDS)[draws.integers(len(digits.SPEEDS))]
    straight = (speed[:, None] * digits.STEPS[motion % len(digits.STEPS)])[:, None]
    there = (draws.integers(PERIOD, 1) + torch.arange(LONGEST)) % PERIOD < PERIOD // 2  # [N, LONGEST]
    axis = torch.tensor([[0, 1], [1, 0]])[(motion == MOTIONS.index("bobbing")).long()]  # [N, 2]
    swinging = SWING * torch.where(there, 1, -1)[..., None] * axis[:, None]
    step = torch.where((motion < len(digits.STEPS))[:, None, None], straight, swinging)
    return start + step.cumsum(1)


def _torus(position, size):
    return position % size - digits.OVERHANG


def _add_specks(frames, draws):
    """Squares of two pixels' side that start anywhere and go on by a constant step each, in place."""
    count, steps = frames.shape[:2]
    start = draws.integers(2 * FRAME, SPECKS, 1, 2)
    step = draws.integers(9, SPECKS, 1, 2) - 4
    bright = 0.5 + 0.5 * draws.uniform(SPECKS)
    corner = (start + step * torch.arange(steps)[:, None]) % (2 * FRAME) // 2  # [N, SPECKS, T, 2], pixels
    row, time = torch.arange(count)[:, None], torch.arange(steps)
    for number in range(SPECKS):
        for dy, dx in itertools.product(range(SPECK), repeat=2):
            y, x = ((corner[:, number] + torch.tensor([dy, dx])) % FRAME).unbind(2)
            under = frames[row, time, 0, y, x]
            frames[row, time, 0, y, x] = torch.maximum(under, bright[:, number, None])


@functools.cache
def _noise():
    """Every stretch of FRAME² numbers, [., 28 * 28], of a long row of noise. A frame takes one of them: fresh
    numbers for each pixel would take as long as the network."""
    random = torch.Generator().manual_seed(0)
    return (NOISE * torch.randn(1 << 20, generator=random)).unfold(0, FRAME * FRAME, 1)
