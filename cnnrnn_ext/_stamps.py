"""Whether tensors are still what they were when something was computed from them."""


def trackable(tensors):
    """Whether every later change of these tensors can be seen: those of inference mode count no versions."""
    return not any(tensor.is_inference() for tensor in tensors)


def stamps_of(tensors):
    """What :func:`unchanged` compares: each tensor itself, its version, address and strides.

    Who keeps stamps must also keep the memory (``tensor.detach()``), or another tensor may come to stand at
    the same address.
    """
    return tuple((t, t._version, t.data_ptr(), t.stride()) for t in tensors)


def unchanged(stamps, tensors):
    """Whether ``tensors`` are those of the stamps, and nobody updated them or gave them other ``.data``.

    An in-place edit through ``.data`` alone (``p.data.mul_(2)``) goes unseen: torch counts it on a tensor
    that is gone afterwards.
    """
    for tensor, (source, version, address, strides) in zip(tensors, stamps, strict=True):
        if (
            tensor is not source
            or tensor._version != version
            or tensor.data_ptr() != address
            or tensor.stride() != strides
        ):
            return False
    return True
