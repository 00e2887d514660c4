"""From a sequence of features to classes: one vector for all steps, and linear heads."""

import torch
from torch import nn

from cnnrnn_ext._checks import check_choice, integers
from cnnrnn_ext.models._masks import masked_softmax, steps_within

READOUTS = ("last", "mean", "attention", "steps")


class NamedHeads(nn.ModuleDict):
    """One linear layer per name, all of the same features."""

    def forward(self, features):
        return {name: head(features) for name, head in self.items()}


def make_heads(features, heads):
    """A linear layer of ``heads`` classes, or one for each entry of {"name": classes}."""
    if not isinstance(heads, dict):
        (classes,) = integers("heads", heads, 1, 1)
        return nn.Linear(features, classes)
    if not heads:
        raise ValueError("heads: expected a number of classes or {name: number}, got an empty dict")
    for name, classes in heads.items():
        integers(f"heads[{name!r}]", classes, 1, 1)
    return NamedHeads({name: nn.Linear(features, classes) for name, classes in heads.items()})


class AttentionWeights(nn.Module):
    """A weight for each step: softmax over t of v · tanh(W y_t + b) (as in Yang et al. 2016).

    Shape: y [T, N, D], mask [T, N] bool or None; returns [T, N], 0 where the mask is not set.
    """

    def __init__(self, features):
        super().__init__()
        self.project = nn.Linear(features, features)
        self.score = nn.Linear(features, 1, bias=False)

    def forward(self, y, mask=None):
        return masked_softmax(self.score(torch.tanh(self.project(y))).squeeze(-1), mask, 0)


class Readout(nn.Module):
    """What the heads read of a sequence.

    Args:
        kind: "last": the state after the last step. "mean": of the steps. "attention": the steps' sum,
            weighed by :class:`AttentionWeights`. "steps": every step.
        features: D.
    """

    def __init__(self, kind, features, choices=READOUTS):
        super().__init__()
        check_choice("readout", kind, choices)
        self.kind = kind
        self.attention = AttentionWeights(features) if kind == "attention" else None

    def forward(self, y, last=None, lengths=None):
        """y: [T, N, D]; last: [N, D]; lengths: [N] or None. Returns [N, D], or [N, T, D] of every step.

        The vector of a row of no steps is 0.
        """
        if self.kind == "last":
            return last
        if self.kind == "steps":
            return y.transpose(0, 1)
        mask = None if lengths is None else steps_within(lengths, y.shape[0])
        if self.kind == "attention":
            return torch.einsum("tn,tnd->nd", self.attention(y, mask), y)
        if mask is None:
            return y.mean(0)
        return y.masked_fill(~mask[..., None], 0.0).sum(0) / lengths.clamp(min=1)[:, None]

    def weights(self, y, lengths=None):
        """[N, T]: how much each step counts, for "attention"; RuntimeError for another kind."""
        if self.attention is None:
            raise RuntimeError(f"readout: {self.kind!r} has no attention; it takes readout='attention'")
        return self.attention(y, None if lengths is None else steps_within(lengths, y.shape[0])).t()

    def extra_repr(self):
        return self.kind
