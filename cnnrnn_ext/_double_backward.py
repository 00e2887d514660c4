"""Second derivatives of an operator, through its reference in plain PyTorch."""

import torch


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


def double_backward(function, inputs, grad_outputs, outer, zeros=()):
    """Gradients of the vector-Jacobian product above with respect to grad_outputs and inputs.

    ``outer`` are the incoming gradients of the product's outputs, one per input, None where unused.
    ``zeros`` are the positions of inputs that stand for zeros where they are None.
    """
    keep_graph = torch.is_grad_enabled()
    absent = [t is None for t in (*grad_outputs, *inputs)]
    inputs = [
        torch.zeros_like(o) if t is None and i in zeros and o is not None else t
        for i, (t, o) in enumerate(zip(inputs, outer, strict=True))
    ]

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
    found = [None if t is None else next(grads) for t in sources]
    return [None if missing else g for missing, g in zip(absent, found, strict=True)]
