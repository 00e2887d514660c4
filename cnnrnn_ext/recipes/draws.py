"""Random numbers that belong to a row: the same in whatever batch, process or order the row comes.

A counter-based generator: number ``k`` of a row is SplitMix64's finaliser (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014) of (seed, epoch, row, k), for a whole batch at once.
"""

import math

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(value):
    value = (value ^ (value >> np.uint64(30))) * FIRST
    value = (value ^ (value >> np.uint64(27))) * SECOND
    return value ^ (value >> np.uint64(31))


class Draws:
    """Random numbers of ``rows`` in an epoch of the training with ``seed``.

    Each call goes on where the row's numbers ended: the same calls in the same order give the same numbers.
    """

    def __init__(self, seed, epoch, rows):
        key = np.zeros(len(rows), np.uint64)
        for part in (np.full(len(rows), seed), np.full(len(rows), epoch), np.asarray(rows)):
            key = _mix((key ^ part.astype(np.uint64)) + GOLDEN)
        self._key = key
        self._used = 0

    def _bits(self, count):
        """Fresh random bits [N, count], uint64."""
        counter = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64)
        self._used += count
        return _mix(self._key[:, None] + counter * GOLDEN)

    def uniform(self, *shape):
        """Numbers [N, *shape] in [0, 1), float32."""
        bits = self._bits(math.prod(shape)) >> np.uint64(40)  # 24: as many as a float32 holds
        return torch.from_numpy((bits * np.float64(2.0**-24)).astype(np.float32)).view(-1, *shape)

    def integers(self, high, *shape):
        """Whole numbers [N, *shape] in 0 … high - 1, int64. high: below 2**31."""
        bits = self._bits(math.prod(shape)) >> np.uint64(33)
        return torch.from_numpy((bits * np.uint64(high) >> np.uint64(31)).astype(np.int64)).view(-1, *shape)

    def normal(self, *shape):
        """Numbers [N, *shape] of mean 0 and deviation 1, float32 (Box and Muller)."""
        radius, angle = self.uniform(*shape), self.uniform(*shape)
        return (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()


def order(count, seed, epoch):
    """The rows' order in an epoch: a permutation of 0 … count - 1, as a list."""
    keys = Draws(seed, epoch, np.arange(count) + (1 << 40))  # not the numbers that the samples draw
    return np.argsort(keys._bits(1)[:, 0], kind="stable").tolist()


def picked(size, seed, count):
    """At most ``count`` row numbers below ``size`` for pictures and small splits: those that come first in an
    order that no epoch reaches."""
    return order(size, seed, 1 << 20)[:count]


def seed_torch(seed, *numbers):
    """Seeds torch's own generator (weights, dropout) for one use, given by ``numbers``."""
    state = np.random.SeedSequence((seed, *numbers)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))
