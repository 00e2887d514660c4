"""The data: short videos of real handwritten digits that move in one of four directions.

A clip shows one of scikit-learn's 1797 scans (8×8 pixels), enlarged, moving by a constant step per frame.
The digit's position is drawn uniformly from a torus: a digit that slides out on one side comes back on the
other. So at every frame, the first and the last included, the position is uniform whatever the direction: no
single frame tells where the digit goes, only the frames together do.
"""

from dataclasses import dataclass

import numpy as np
import torch

FRAMES = 16
FRAME_SIZE = 28
DIRECTIONS = ("right", "left", "down", "up")
STEPS = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])  # (dy, dx) of each direction
HEADS = {"digit": 10, "direction": len(DIRECTIONS)}

# Lengths in half pixels, so that a digit can move by half a pixel per frame.
DIGIT = 40  # side of the enlarged scan: 20 pixels
OVERHANG = 4  # how far it may slide out of the frame: 2 pixels, the scan's margin and a bit
POSITIONS = 2 * FRAME_SIZE - DIGIT + 2 * OVERHANG + 1  # places on each axis of the torus
SPEEDS = (1, 2)  # half pixels per frame

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # fractions of the scans of each class

# What a random generator is for; each use has its own, so that none shifts another.
ORDER, BATCH, EVALUATION, SUBSET = range(4)


@dataclass(frozen=True)
class Clips:
    """frames [N, T, 1, 28, 28] in 0 … 1; digit, direction [N]; position [N, T, 2] (y, x) in half pixels."""

    frames: torch.Tensor
    digit: torch.Tensor
    direction: torch.Tensor
    position: torch.Tensor

    def __len__(self):
        return len(self.frames)

    def labels(self):
        return {"digit": self.digit, "direction": self.direction}


@dataclass(frozen=True)
class Scans:
    """Some of the scans: images [N, 8, 8] in 0 … 1, digit [N], index [N] (row in scikit-learn's set)."""

    images: torch.Tensor
    digit: torch.Tensor
    index: torch.Tensor

    def __len__(self):
        return len(self.images)

    def subset(self, count, random):
        rows = torch.randperm(len(self), generator=random)[:count].sort().values
        return Scans(self.images[rows], self.digit[rows], self.index[rows])


def load_scans(seed):
    """{"train" | "validation" | "test": Scans}, split by scan, with the same share of every class."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float() / 16
    digits = torch.from_numpy(source.target)
    rng = np.random.default_rng(seed)
    parts = {name: [] for name in SPLITS}
    for digit in range(HEADS["digit"]):
        rows = rng.permutation(np.flatnonzero(source.target == digit))
        cuts = np.round(np.cumsum(list(SPLITS.values()))[:-1] * len(rows)).astype(int)
        for name, part in zip(SPLITS, np.split(rows, cuts), strict=True):
            parts[name].append(part)
    index = {name: torch.from_numpy(np.sort(np.concatenate(rows))) for name, rows in parts.items()}
    return {name: Scans(images[rows], digits[rows], rows) for name, rows in index.items()}


def generator(seed, use, number=0):
    """A random generator for one use: a batch depends on nothing that ran before it."""
    state = np.random.SeedSequence((seed, use, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def epoch_order(count, seed, epoch):
    """The scans' order [count] in an epoch."""
    return torch.randperm(count, generator=generator(seed, ORDER, epoch))


def training_batch(scans, size, seed, step):
    """Batch number ``step`` of the training with ``seed``: distorted digits, random starts and directions.

    Each epoch shows every scan once, but for the rest that fills no batch.
    """
    per_epoch = len(scans) // size
    epoch, place = divmod(step, per_epoch)
    rows = epoch_order(len(scans), seed, epoch)[place * size : (place + 1) * size]
    random = generator(seed, BATCH, step)
    direction = torch.randint(len(DIRECTIONS), (size,), generator=random)
    return make_clips(scans, rows, direction, random, distort=True)


def evaluation_clips(scans, seed):
    """Every scan once in every direction, undistorted: [4 * len(scans)] clips, always the same ones."""
    rows = torch.arange(len(scans)).repeat_interleave(len(DIRECTIONS))
    direction = torch.arange(len(DIRECTIONS)).repeat(len(scans))
    return make_clips(scans, rows, direction, generator(seed, EVALUATION), distort=False)


def make_clips(scans, rows, direction, random, distort):
    """Clips of scans ``rows`` [N] that move in ``direction`` [N]; starts and speeds from ``random``."""
    count = len(rows)
    start = torch.randint(POSITIONS, (count, 1, 2), generator=random)
    speed = torch.tensor(SPEEDS)[torch.randint(len(SPEEDS), (count,), generator=random)]
    travelled = torch.arange(FRAMES)[:, None] * (speed[:, None] * STEPS[direction])[:, None]
    position = (start + travelled) % POSITIONS - OVERHANG
    digits = enlarge(scans.images[rows], torch.rand(6, count, generator=random) if distort else None)
    return Clips(place(digits, position), scans.digit[rows], direction, position)


def enlarge(images, distortion=None):
    """Scans [N, 8, 8] → [N, DIGIT, DIGIT], bicubic.

    distortion: [6, N] random numbers in 0 … 1, by which the scans are a little turned, sheared, scaled and
    shifted; None leaves them as they are.
    """
    count = len(images)
    theta = torch.eye(2, 3).repeat(count, 1, 1)
    if distortion is not None:
        turn, shear, wide, high, dx, dy = (2 * distortion - 1).unbind()
        turn, shear = 0.2 * turn, 0.15 * shear  # radians, and a slope: about 11° and 9°
        wide, high = 1 + 0.12 * wide, 1 + 0.12 * high
        cos, sin = turn.cos(), turn.sin()
        theta = torch.stack(
            [
                cos * wide,
                (shear * cos - sin) * high,
                0.1 * dx,
                sin * wide,
                (shear * sin + cos) * high,
                0.1 * dy,
            ]
        )
        theta = theta.T.reshape(count, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [count, 1, DIGIT, DIGIT], align_corners=False)
    big = torch.nn.functional.grid_sample(images[:, None], grid, mode="bicubic", align_corners=False)
    return big[:, 0].clamp(0, 1)


def place(pictures, position):
    """pictures [N, S, S], in half pixels, at position [N, T, 2] of frames [N, T, 1, 28, 28], black around."""
    side = pictures.shape[-1]
    pictures = torch.nn.functional.pad(pictures, (0, 1, 0, 1))  # the last row and column: what lies outside
    pixel = 2 * torch.arange(FRAME_SIZE) - position[..., None]  # [N, T, 2, 28]
    pixel = torch.where((pixel >= 0) & (pixel < side), pixel, side)
    rows, columns = pixel.unbind(2)
    clip = torch.arange(len(pictures))[:, None, None, None]
    return pictures[clip, rows[..., :, None], columns[..., None, :]].unsqueeze(2)
