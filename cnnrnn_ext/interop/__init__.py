"""Models of other frameworks as modules of ours."""

from cnnrnn_ext.interop.keras import from_keras

__all__ = ["from_keras"]
