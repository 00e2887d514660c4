"""The learning rate's course."""

import math


def rate_at(step, steps, peak, warmup=0.05):
    """The rate at ``step`` of ``steps``: up to ``peak`` in the part ``warmup``, then down as a cosine."""
    rise = max(1.0, warmup * steps)
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, steps - rise)))
