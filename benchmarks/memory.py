"""Memory of a training step: what is kept for the backward pass, and the largest sum of live tensors.

Counted where torch's CPU allocator gives out memory, so scratch memory of our operators and of torch's is in
it; what a library takes behind its back is not. Parameters and the input are there before the step and do not
count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Bytes of storages that the forward pass keeps for the backward, beside those of ``given``."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, int] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        alive.append(forward())  # or an address might be given out twice
    return sum(kept.values())


def peak_bytes(step: Callable[[], object]) -> int:
    """The largest sum of memory taken since the step began and not given back."""
    step()  # what is made once is there then
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = step()
    del result
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
