"""Several feature vectors made one, of which some may be missing."""

import torch
from torch import nn

from cnnrnn_ext._checks import check_choice
from cnnrnn_ext.models._masks import masked_softmax

FUSIONS = ("concatenate", "gated", "attention")


class Fusion(nn.Module):
    """Joins one feature vector of each branch.

    Args:
        kind: "concatenate": side by side, a missing one as zeros.
            "gated": each branch is projected, p_i = tanh(W_i x_i + b_i), and each feature of the result is a
            mixture of the branches' with gates that all the branches choose together: sum of z_i ⊙ p_i with
            z = softmax over i of V_i [x_1; x_2; …] (for two branches the gated unit of Arevalo et al. 2017).
            "attention": sum of a_i p_i, one weight for each branch, a = softmax over i of u · tanh(U p_i).
        sizes: D_i of each branch, in order.
        features: of the result, for "gated" and "attention".

    Attributes: ``features``, the size of the result (the sum of ``sizes`` for "concatenate").

    Shape: branches [..., D_i] each, present None or [..., B] bool; returns [..., features]. What stands in a
    missing branch is not read (NaN does no harm); with none present the result is 0.
    """

    def __init__(self, kind, sizes, features, choices=FUSIONS):
        super().__init__()
        check_choice("fusion", kind, choices)
        self.kind = kind
        self.features = sum(sizes) if kind == "concatenate" else features
        if kind == "concatenate":
            return
        self.project = nn.ModuleList(nn.Linear(size, features) for size in sizes)
        if kind == "gated":
            self.gate = nn.Linear(sum(sizes), len(sizes) * features)
        else:
            self.score = nn.Sequential(
                nn.Linear(features, features), nn.Tanh(), nn.Linear(features, 1, bias=False)
            )

    def forward(self, branches, present=None):
        return self._fuse(branches, present)[0]

    def weights(self, branches, present=None):
        """[..., B]: the share of each branch, a mean over the features of gates; not of "concatenate"."""
        if self.kind == "concatenate":
            raise RuntimeError("fusion: 'concatenate' has no weights; 'gated' and 'attention' have")
        return self._fuse(branches, present)[1].mean(-2)

    def _fuse(self, branches, present):
        """(the result, the weights [..., features or 1, B])."""
        if present is not None:
            each = present.unbind(-1)
            branches = [x.masked_fill(~p[..., None], 0.0) for x, p in zip(branches, each, strict=True)]
        if self.kind == "concatenate":
            return torch.cat(branches, -1), None
        projected = torch.stack(
            [torch.tanh(layer(x)) for layer, x in zip(self.project, branches, strict=True)], -1
        )
        if self.kind == "gated":
            scores = self.gate(torch.cat(branches, -1)).unflatten(-1, (self.features, len(branches)))
        else:
            scores = self.score(projected.transpose(-1, -2)).transpose(-1, -2)
        weights = masked_softmax(scores, None if present is None else present[..., None, :], -1)
        return (weights * projected).sum(-1), weights

    def extra_repr(self):
        return self.kind
