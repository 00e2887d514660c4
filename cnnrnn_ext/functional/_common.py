"""Gradients and dtypes of a call, shared by all functions."""

import contextlib

import torch

HALF = (torch.bfloat16, torch.float16)


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(device):
    """The dtype of an active autocast region of this device, or None."""
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def beyond_autocast(tensor):
    """A context for operators on operands that are in the autocast dtype: those registered for autocast would
    be widened to float32 again."""
    if tensor.dtype in HALF and autocast_dtype(tensor.device) is not None:
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def cast(dtype, *tensors):
    """The floating-point tensors below float64 among these, in dtype."""
    return tuple(
        t.to(dtype)
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def autocast(*tensors):
    """The tensors in the dtype of an active autocast region, as torch's own convolution and RNN do."""
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else cast(dtype, *tensors)


def runs_in_float32(tensor, narrow):
    """Whether the kernels of sequences take this dtype by way of float32, with narrow weights or without."""
    widened = HALF if narrow else (torch.float16,)
    return tensor.device.type == "cpu" and tensor.dtype in widened
