"""Models that join a CNN with an RNN."""

from cnnrnn_ext.models.cnnrnn import CNNRNN

__all__ = ["CNNRNN"]
