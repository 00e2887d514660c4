"""Which backend a call uses, and the record of what each call used."""

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from cnnrnn_ext import _library

MODES = ("auto", "compiled", "reference")


@dataclass(frozen=True)
class Call:
    """One entry of a trace: the operator, the backend and kernel that ran, and why not a compiled one."""

    op: str
    backend: str
    kernel: str | None
    reason: str | None


class _State(threading.local):
    mode = "auto"
    log = None


_state = _State()


@contextlib.contextmanager
def backend(mode):
    """Chooses what the functions and modules of this package run on, within a ``with`` block.

    Args:
        mode: "auto" (a compiled kernel where one exists, else plain PyTorch), "compiled" (a missing
            kernel raises RuntimeError instead of falling back), or "reference" (plain PyTorch).

    Raises:
        ValueError: for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    before, _state.mode = _state.mode, mode
    try:
        yield
    finally:
        _state.mode = before


@contextlib.contextmanager
def trace():
    """Records which backend and kernel each call runs: ``with trace() as log: model(x)``.

    ``log`` is a list of :class:`Call`. Calls inside a compiled graph (torch.compile) are not recorded.
    """
    before, _state.log = _state.log, []
    try:
        yield _state.log
    finally:
        if before is not None:
            before.extend(_state.log)
        _state.log = before


def in_function_transform():
    """Inside torch.func's grad, vmap and the like. A compiled graph has them resolved already."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_ad():
    return forward_ad._current_level >= 0


def use_compiled(op, tensor, uncovered=None, note=None):
    """Whether ``op`` runs on a compiled kernel for this tensor's device and dtype; records the choice.

    Args:
        op: the public function's name, a key of ``_library.COVERAGE``.
        uncovered: why the kernels do not serve this configuration, or None if they do.
        note: what a trace tells beside the kernel's name.
    """
    mode = _state.mode
    if mode == "reference":
        kernel, reason = None, 'backend("reference")'
    elif uncovered:
        kernel, reason = None, uncovered
    elif in_forward_ad():
        kernel, reason = None, "no kernel for forward-mode derivatives"
    elif in_function_transform():
        kernel, reason = None, "no kernel for the transforms of torch.func"
    else:
        kernel, reason = _library.kernel_for(op, tensor.device.type, tensor.dtype)
    if kernel is None and mode == "compiled":
        raise RuntimeError(f'{op}: backend("compiled") was asked for, but there is no kernel: {reason}')
    if _state.log is not None and not torch.compiler.is_compiling():
        told = f"{kernel}, {note}" if kernel and note else kernel
        _state.log.append(Call(op, "compiled" if kernel else "reference", told, reason))
    return kernel is not None
