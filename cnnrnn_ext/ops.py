"""The Python half of every operator: schemas where nothing is compiled, fake kernels, autograd, autocast.

``torch.ops.cnnrnn_ext.NAME`` comes in the forms that operators.schema describes; this module registers
what each needs beside its compiled kernels.
"""

import torch

from cnnrnn_ext import (
    _autograd_conv_pool,
    _autograd_rnn,
    _fake_kernels,
    _library,
    _operator_conv_pool,
    _operator_rnn,
)

NAMESPACE = "cnnrnn_ext"
CODE_POSITIONS = 255  # a code byte names one of so many positions of a pooling window

NAMES = [schema.split("(")[0] for schema in _library.schemas()]

_registrations = torch.library.Library(NAMESPACE, "FRAGMENT")


def _register_schemas():
    if not _library.libraries()["cpu"].loaded:
        for schema in _library.schemas():
            _registrations.define(schema)


def _register_fallbacks():
    """Where a device has no compiled kernel, the raw operator runs in plain PyTorch."""
    for name in NAMES:
        module = _operator_conv_pool if name.startswith("conv_pool") else _operator_rnn
        _registrations.impl(name, getattr(module, name), "CompositeExplicitAutograd")


def _register_autocast():
    # The compiled kernels compute in float32: under autocast a raw operator stays there.
    # (functional casts to the autocast dtype itself where a kernel or the reference takes it.)
    # Narrow weights are not to be widened: those operators take float32 beside them, and see no autocast.
    for name in (name for name in NAMES if not name.endswith("_narrow")):
        for device in ("cpu", "cuda"):
            torch.library.register_autocast(f"{NAMESPACE}::{name}", device, torch.float32)


def _register_fake_kernels():
    for name in NAMES:
        fake = _on_one_device(name, getattr(_fake_kernels, name))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


def _on_one_device(name, fake):
    """``fake``, refusing operands of several devices: real and meta ones mixed are dispatched here too."""
    arguments = getattr(torch.ops.cnnrnn_ext, name).default._schema.arguments
    names = [argument.name for argument in arguments]

    def checked(*args):
        device = args[names.index("x")].device
        for argument, value in zip(names, args, strict=False):  # defaults at the end are left out
            if argument == "batch_sizes":  # always on the CPU
                continue
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device != device:
                    raise RuntimeError(f"{argument}: expected device {device} as x has, got {tensor.device}")
        return fake(*args)

    return checked


def _register():
    _register_schemas()
    _register_fallbacks()
    _register_autocast()
    _register_fake_kernels()
    for name, (setup, formula) in (_autograd_conv_pool.FORMULAS | _autograd_rnn.FORMULAS).items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", formula, setup_context=setup)


_register()
