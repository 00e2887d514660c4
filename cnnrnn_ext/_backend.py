"""Which backend a call uses, and the record of what each call used."""

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, float32, float64
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

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

# Whether no thread is inside backend() or trace() and the CPU kernels are there: one read for ``plain``.
usual = _library.libraries()["cpu"].loaded
_overrides = 0
_lock = threading.Lock()


@contextlib.contextmanager
def _override():
    global usual, _overrides
    with _lock:
        _overrides += 1
        usual = False
    try:
        yield
    finally:
        with _lock:
            _overrides -= 1
            usual = _overrides == 0 and _library.libraries()["cpu"].loaded


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
    with _override():
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
    with _override():
        try:
            yield _state.log
        finally:
            if before is not None:
                before.extend(_state.log)
            _state.log = before


def is_traced():
    """Whether the running call is recorded, so that what a trace tells is worth finding out."""
    return _state.log is not None and not torch.compiler.is_compiling()


def in_function_transform():
    """Inside torch.func's grad, vmap and the like. A compiled graph has them resolved already."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_forward_ad():
    return forward_ad._current_level >= 0


def plain(input, rank):
    """Whether nothing stands between this input and a CPU kernel: a tensor of torch's own, of this rank and
    of the kernels' dtypes; no backend(), trace(), autocast, forward mode, transform or graph.

    Modules ask it at every call, so that a short one may go to the operator at once. What it answers
    changes no result.
    """
    return (
        usual
        and type(input) is Tensor
        and not is_compiling()
        and peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not is_any_autocast_enabled()
        and input.dtype in (float32, float64)
        and input.is_cpu
        and input.dim() == rank
    )


def plain_operands(*tensors):
    """Whether operands, outside of graphs and transforms, are for an autograd.Function of our own:
    subclasses, and modes that look on at the operators, are to see the one with its registered gradient."""
    return not dispatch_modes() and all(t is None or type(t) in (Parameter, Tensor) for t in tensors)


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
    if is_traced():
        told = f"{kernel}, {note}" if kernel and note else kernel
        _state.log.append(Call(op, "compiled" if kernel else "reference", told, reason))
    return kernel is not None
