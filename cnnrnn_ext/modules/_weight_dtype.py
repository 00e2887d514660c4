"""``weight_dtype=`` of the recurrent modules."""

import torch

from cnnrnn_ext.functional._narrow import NarrowWeights, widened

WEIGHT_DTYPES = (None, torch.bfloat16, torch.int8)


def check_weight_dtype(value):
    if not any(value is dtype for dtype in WEIGHT_DTYPES):
        raise ValueError(f"weight_dtype: expected None, torch.bfloat16 or torch.int8, got {value!r}")


class WeightDtype:
    """A module whose weight_ih and weight_hh are read from narrow copies where nothing needs a gradient.

    The parameters stay as they are. A copy is made again once its parameter was updated, loaded, replaced or
    given other ``.data``; see :meth:`refresh_weights` for the one change that torch tells nobody.
    """

    def _init_weight_dtype(self, weight_dtype, directions=None):
        self.weight_dtype = weight_dtype
        self._narrow = None if weight_dtype is None else NarrowWeights(weight_dtype, directions)

    def refresh_weights(self):
        """Makes the narrow copies again at the next call.

        Needed after an in-place edit through ``.data`` alone (``p.data.mul_(2)``): torch counts those on a
        tensor that is gone afterwards. (``p.mul_(2)`` under ``torch.no_grad()`` is noticed.)
        """
        if self._narrow is not None:
            self._narrow.forget()

    def weight_error(self):
        """{parameter name: largest absolute difference between the weight and its narrow copy}, both as they
        are now; empty without ``weight_dtype``."""
        if self._narrow is None:
            return {}
        with torch.no_grad():
            weights = {name: getattr(self, name) for name in self._matrix_names()}
            copies = self._narrow.of(list(weights.values())).copies
            return {
                name: (weight.double() - widened(*copy, torch.float64)).abs().max().item()
                if weight.numel()
                else 0.0
                for (name, weight), copy in zip(weights.items(), copies, strict=True)
            }

    def _apply(self, fn, recurse=True):
        self.refresh_weights()  # a copy on another device is of no more use
        return super()._apply(fn, recurse)

    def extra_repr(self):
        return super().extra_repr() + (f", weight_dtype={self.weight_dtype}" if self.weight_dtype else "")
