"""The Python half of every operator: schemas where nothing is compiled, fake kernels, autograd, autocast.

``torch.ops.cnnrnn_ext.NAME`` comes in the forms that operators.schema describes; this module registers
what each needs beside its compiled kernels.
"""

import torch

from cnnrnn_ext import _fake_kernels, _library, _operator_reference, reference

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
        _registrations.impl(name, getattr(_operator_reference, name), "CompositeExplicitAutograd")


def _register_autocast():
    # The compiled kernels compute in float32: under autocast a raw operator stays there.
    # (functional casts to the autocast dtype itself where a kernel or the reference takes it.)
    for name in NAMES:
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
        for argument, value in zip(names, args, strict=True):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.device != device:
                    raise RuntimeError(f"{argument}: expected device {device} as x has, got {tensor.device}")
        return fake(*args)

    return checked


# ---- autograd ----


def _conv_pool2d_setup(ctx, inputs, output):
    x, weight, bias, *config = inputs
    _, code = output
    ctx.save_for_backward(x, weight, bias, code)
    ctx.config = config
    ctx.mark_non_differentiable(code)
    ctx.set_materialize_grads(False)


def _conv_pool2d_backward(ctx, grad_y, grad_code):
    x, weight, bias, code = ctx.saved_tensors
    nothing = (None,) * len(ctx.config)
    if grad_y is None:
        return (None, None, None, *nothing)
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    grads = torch.ops.cnnrnn_ext.conv_pool2d_backward(grad_y, x, weight, bias, code, *ctx.config, *need)
    return (*(g if n else None for g, n in zip(grads, need, strict=True)), *nothing)


def _lstm_setup(ctx, inputs, output):
    x, h_0, c_0, *weights = inputs
    ctx.counts = [len(w) for w in weights]
    out, _, _, reserve = output
    ctx.save_for_backward(x, h_0, c_0, *(w for group in weights for w in group), out, reserve)
    ctx.mark_non_differentiable(reserve)
    ctx.set_materialize_grads(False)


def _regroup(tensors, counts):
    tensors = iter(tensors)
    return [[next(tensors) for _ in range(count)] for count in counts]


def _lstm_backward(ctx, grad_output, grad_h_n, grad_c_n, grad_reserve):
    x, h_0, c_0, *rest = ctx.saved_tensors
    groups = _regroup(rest, ctx.counts)
    output, reserve = rest[-2:]
    asked = ctx.needs_input_grad
    need_x, need_state = asked[0], asked[1] or asked[2]
    need_weight = any((*asked[3], *asked[4]))
    need_bias = any((*asked[5], *asked[6]))
    if grad_output is None and grad_h_n is None and grad_c_n is None:
        return None, None, None, *([None] * count for count in ctx.counts)
    grad_x, grad_h_0, grad_c_0, *grad_weights = torch.ops.cnnrnn_ext.lstm_backward(
        grad_output, grad_h_n, grad_c_n, x, h_0, c_0, *groups, output, reserve,
        need_x, need_state, need_weight, need_bias,
    )  # fmt: skip
    grad_weights.append(grad_weights[-1])  # bias_ih and bias_hh have the same gradient
    per_list = [
        [g if wanted else None for g, wanted in zip(grads, flags, strict=True)] if any(flags) else [None] * n
        for grads, flags, n in zip(grad_weights, asked[3:7], ctx.counts, strict=True)
    ]
    return (
        grad_x if need_x else None,
        grad_h_0 if asked[1] else None,
        grad_c_0 if asked[2] else None,
        *per_list,
    )


def _lstm_cell_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _lstm_cell_backward(ctx, grad_h_1, grad_c_1, grad_reserve):
    *inputs, reserve = ctx.saved_tensors
    asked = ctx.needs_input_grad
    if grad_h_1 is None and grad_c_1 is None:
        return (None,) * 7
    grads = torch.ops.cnnrnn_ext.lstm_cell_backward(
        grad_h_1, grad_c_1, *inputs, reserve,
        asked[0], asked[1] or asked[2], asked[3] or asked[4], asked[5] or asked[6],
    )  # fmt: skip
    grads = (*grads, grads[5])  # bias_ih and bias_hh have the same gradient
    return tuple(g if wanted else None for g, wanted in zip(grads, asked, strict=True))


# ---- double backward, through the reference ----


def _reference_vjp(function, inputs, grad_outputs):
    """Gradients of ``function(*inputs)`` (a tuple of tensors) in plain PyTorch, as a differentiable graph."""
    outputs = function(*inputs)
    pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None]
    wanted = [t for t in inputs if t is not None]
    grads = iter(
        torch.autograd.grad(
            [y for y, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    )
    return [None if t is None else next(grads) for t in inputs]


def _double_backward(function, inputs, grad_outputs, outer):
    """Gradients of the vector-Jacobian product above with respect to grad_outputs and inputs.

    ``outer`` are the incoming gradients of the product's outputs, one per input, None where unused.
    """
    keep_graph = torch.is_grad_enabled()

    def attach(t):
        if t is None:
            return None
        return t if keep_graph and t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        inputs, grad_outputs = [attach(t) for t in inputs], [attach(t) for t in grad_outputs]
        product = _reference_vjp(function, inputs, grad_outputs)
        pairs = [
            (p, o)
            for p, o in zip(product, outer, strict=True)
            if p is not None and o is not None and p.requires_grad
        ]
        sources = [*grad_outputs, *inputs]
        wanted = [t for t in sources if t is not None]
        if not pairs:
            return [None] * len(sources)
        grads = iter(
            torch.autograd.grad(
                [p for p, _ in pairs], wanted, [o for _, o in pairs],
                create_graph=keep_graph, allow_unused=True,
            )
        )  # fmt: skip
    return [None if t is None else next(grads) for t in sources]


def _conv_pool2d_backward_setup(ctx, inputs, output):
    grad_y, x, weight, bias, _code, *config = inputs
    ctx.save_for_backward(grad_y, x, weight, bias)
    ctx.config = config
    ctx.set_materialize_grads(False)


def _conv_pool2d_double_backward(ctx, *outer):
    grad_y, *inputs = ctx.saved_tensors
    (
        stride,
        padding,
        dilation,
        groups,
        activation,
        pool,
        pool_size,
        pool_stride,
        pool_padding,
        ceil_mode,
        *need,
    ) = ctx.config

    def function(x, weight, bias):
        y = reference.conv_pool2d(
            x, weight, bias, stride, padding, dilation, groups, activation=activation, pool=pool,
            pool_size=pool_size, pool_stride=pool_stride, pool_padding=pool_padding, ceil_mode=ceil_mode,
        )  # fmt: skip
        return (y,)

    outer = [o if n else None for o, n in zip(outer, need, strict=True)]
    grads = _double_backward(function, inputs, [grad_y], outer)
    return (*grads, None, *([None] * len(ctx.config)))


def _lstm_backward_setup(ctx, inputs, output):
    grads, states, weights = inputs[:3], inputs[3:6], inputs[6:10]
    ctx.counts = [len(w) for w in weights]
    ctx.need = inputs[12:]
    ctx.save_for_backward(*grads, *states, *(w for group in weights for w in group))
    ctx.set_materialize_grads(False)


def _lstm_double_backward(ctx, outer_x, outer_h, outer_c, outer_ih, outer_hh, outer_bias):
    saved = ctx.saved_tensors
    counts, directions = ctx.counts, ctx.counts[0]

    def function(x, h_0, c_0, *flat):
        weight_ih, weight_hh, bias_ih, bias_hh = _regroup(flat, counts)
        weights = [
            (
                weight_ih[d],
                weight_hh[d],
                bias_ih[d] if bias_ih else None,
                bias_hh[d] if bias_hh else None,
                None,
            )
            for d in range(directions)
        ]
        return reference.lstm_layer(x, h_0, c_0, weights)

    need_x, need_state, need_weight, need_bias = ctx.need
    nothing = [None] * directions
    outer = [
        outer_x if need_x else None,
        *((outer_h, outer_c) if need_state else (None, None)),
        *((*outer_ih, *outer_hh) if need_weight else nothing * 2),
        # grad_bias is the gradient of bias_ih; bias_hh's is the same value and is not returned twice.
        *((outer_bias if need_bias else nothing) if counts[2] else ()),
        *(nothing if counts[3] else ()),
    ]
    grads = _double_backward(function, saved[3:], saved[:3], outer)
    return (*grads[:6], *_regroup(grads[6:], counts), None, None, None, None, None, None)


def _lstm_cell_backward_setup(ctx, inputs, output):
    ctx.need = inputs[10:]
    ctx.save_for_backward(*inputs[:9])
    ctx.set_materialize_grads(False)


def _lstm_cell_double_backward(ctx, outer_x, outer_h, outer_c, outer_ih, outer_hh, outer_bias):
    saved = ctx.saved_tensors

    def function(x, h, c, *weights):
        return reference.lstm_cell(x, (h, c), *weights)

    need_x, need_state, need_weight, need_bias = ctx.need
    outer = [
        outer_x if need_x else None,
        *((outer_h, outer_c) if need_state else (None, None)),
        *((outer_ih, outer_hh) if need_weight else (None, None)),
        outer_bias if need_bias else None,
        None,
    ]
    grads = _double_backward(function, saved[2:], saved[:2], outer)
    return (*grads, None, None, None, None, None)


_AUTOGRAD = {
    "conv_pool2d_train": (_conv_pool2d_setup, _conv_pool2d_backward),
    "conv_pool2d_backward": (_conv_pool2d_backward_setup, _conv_pool2d_double_backward),
    "lstm_train": (_lstm_setup, _lstm_backward),
    "lstm_backward": (_lstm_backward_setup, _lstm_double_backward),
    "lstm_cell_train": (_lstm_cell_setup, _lstm_cell_backward),
    "lstm_cell_backward": (_lstm_cell_backward_setup, _lstm_cell_double_backward),
}


def _register():
    _register_schemas()
    _register_fallbacks()
    _register_autocast()
    _register_fake_kernels()
    for name, (setup, formula) in _AUTOGRAD.items():
        torch.library.register_autograd(f"{NAMESPACE}::{name}", formula, setup_context=setup)


_register()
