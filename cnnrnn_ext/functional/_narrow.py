"""Weights in fewer bits for inference: how they are made, and when they are made again."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from cnnrnn_ext._backend import in_forward_ad, in_function_transform
from cnnrnn_ext._stamps import stamps_of, trackable, unchanged
from cnnrnn_ext.functional._common import HALF, needs_grad


def narrowed(weight, dtype):
    """(narrow weight, scale of each row or None), both shaped as operators.schema has them.

    int8 is symmetric: scale = max|row| / 127, narrow row = round(row / scale). A row of zeros has scale 1.
    A row that holds NaN or infinity has such a scale, so that what it computes is not finite either.
    """
    if dtype == torch.bfloat16:
        return weight.to(dtype), None
    weight = weight.float() if weight.dtype in HALF else weight
    # The zero beside each row is for rows without elements, which have no largest one.
    scale = F.pad(weight, (0, 1)).abs().amax(1) / 127
    scale = scale.masked_fill(scale == 0, 1)
    levels = (weight / scale[:, None]).nan_to_num(0.0).round().clamp(-127, 127)
    return levels.to(torch.int8), scale


def widened(narrow, scale, dtype):
    return (narrow if scale is None else scale[:, None] * narrow).to(dtype)


class Entry(NamedTuple):
    """Narrow copies, and what tells whether they are still those of the weights."""

    stamps: tuple  # of the weights when they were copied, see _stamps.py
    held: tuple  # the memory copied from, kept so that no other tensor can come to stand at its address
    copies: tuple  # for each weight (narrow weight, scale or None)
    operands: tuple  # the same as operators take them, see NarrowWeights


class NarrowWeights:
    """Narrow copies of a module's weights, made when first needed and whenever a weight has changed.

    Neither copied nor pickled with its module: a copy starts empty.

    Args:
        dtype: torch.bfloat16 or torch.int8.
        directions: of each layer, for operands that are a tuple of (weight_ih, weight_hh, scale_ih, scale_hh)
            lists for each layer; None for a cell, whose operands are these four themselves.
    """

    def __init__(self, dtype, directions=None):
        self.dtype, self.directions = dtype, directions
        self._entry = None

    def __reduce__(self):
        return NarrowWeights, (self.dtype, self.directions)

    def __deepcopy__(self, memo):
        return NarrowWeights(self.dtype, self.directions)

    def forget(self):
        self._entry = None

    def of(self, weights):
        """The Entry of these weights: weight_ih and weight_hh of each layer and direction in turn."""
        return self._made(weights) if torch.compiler.is_compiling() else self.kept(weights)

    def kept(self, weights):
        """The same outside a graph."""
        entry = self._entry  # one read: another thread may exchange it meanwhile
        if entry is None or not unchanged(entry.stamps, weights):
            return self._renewed(weights)
        return entry

    def _made(self, weights):
        with torch.no_grad():
            copies = tuple(narrowed(weight, self.dtype) for weight in weights)
        return Entry((), (), copies, self._operands(copies))

    def _renewed(self, weights):
        entry = self._made(weights)
        # A copy that is no plain tensor belongs to a tracer.
        if trackable(weights) and all(type(copy) is torch.Tensor for copy, _ in entry.copies):
            entry = entry._replace(stamps=stamps_of(weights), held=tuple(w.detach() for w in weights))
            self._entry = entry
        return entry

    def _operands(self, copies):
        if self.directions is None:
            (weight_ih, scale_ih), (weight_hh, scale_hh) = copies
            return weight_ih, weight_hh, scale_ih, scale_hh
        layers, each = [], 2 * self.directions
        for first in range(0, len(copies), each):
            kinds = (copies[first : first + each : 2], copies[first + 1 : first + each : 2])
            weights = ([weight for weight, _ in kind] for kind in kinds)
            scales = ([scale for _, scale in kind if scale is not None] for kind in kinds)
            layers.append((*weights, *scales))
        return tuple(layers)


def narrow_entry(narrow, matrices, *tensors):
    """The Entry to compute with, or None where the weights themselves are wanted: that is without
    ``weight_dtype``, and wherever somebody may ask for a derivative.

    Args:
        narrow: NarrowWeights or None.
        matrices: its weights. tensors: the other operands, tensors or None.
    """
    if narrow is None or needs_grad(*matrices, *tensors) or in_forward_ad() or in_function_transform():
        return None
    return narrow.of(matrices)


def narrow_uncovered(tensor):
    """Why the kernels do not take narrow weights beside this tensor, or None."""
    if tensor.device.type != "cpu":
        return f"no {tensor.device.type} kernel with narrow weights"
    return "no kernel with narrow weights for torch.float64" if tensor.dtype == torch.float64 else None


def narrow_note(narrow):
    """What a trace tells of them."""
    return f"{str(narrow.dtype).removeprefix('torch.')} weights"
