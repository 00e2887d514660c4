"""What decided an answer: attributions by Captum, and the models' own attention.

Captum comes with the ``recipes`` extra: ``pip install cnnrnn_ext[recipes]``. Each function takes a model
(in eval mode during the call) or any function of the same inputs; gradients of parameters stay as they were.
"""

import contextlib

import torch
from torch import nn

from cnnrnn_ext._checks import check_choice, check_tensor, shape_of

METHODS = ("integrated_gradients", "occlusion")


def integrated_gradients(
    model,
    inputs,
    target,
    *,
    baselines=None,
    additional_forward_args=None,
    head=None,
    layer=None,
    n_steps=50,
    internal_batch_size=None,
):
    """How much each number of the input added to one answer, on the way from a baseline to the input.

    The mean gradient on the straight line between both, times their difference (Sundararajan et al. 2017).
    Those of a row add up to answer(input) - answer(baseline), up to the error of ``n_steps`` points.

    Args:
        model: called as ``model(*inputs, *additional_forward_args)``.
        inputs: a floating-point tensor [N, ...], or a tuple of these; or token ids [N, T], of which the
            embedded vectors are explained.
        target: which answer: a class, or a tensor of N classes; for answers [N, T, classes] a tuple
            (step, class), or a list of N of these.
        baselines: what counts as nothing: a number, a tensor like the input, or a tuple of these for several
            inputs. None: 0; for tokens the embedding's padding_idx (0 without one).
        additional_forward_args: a tensor or a tuple, such as ``(lengths,)``: not explained. Tensors of N rows
            are repeated with the inputs.
        head: whose answers, where the model returns a dict of them. Of a tuple the first part counts.
        layer: for tokens, the nn.Embedding that reads them; None: the model's only one, or that named
            ``embedding`` or ``source_embedding``. It is called with [N, T].
        n_steps: points on the line.
        internal_batch_size: at most so many rows at a time. None: all N * n_steps.

    Returns:
        Attributions of the inputs' shape (a tuple for a tuple); for tokens [N, T], the sum over each vector.

    Raises:
        ImportError: Captum is not installed.
        ValueError: a head that the model does not have, or that is needed; no single embedding for tokens.
        TypeError: inputs that are no tensors.
    """
    captum = _captum()
    options = {
        "target": target,
        "additional_forward_args": additional_forward_args,
        "n_steps": n_steps,
        "internal_batch_size": internal_batch_size,
    }
    with _evaluating(model):
        if _are_tokens(inputs):
            layer = _embedding_of(model) if layer is None else layer
            if baselines is None:
                baselines = layer.padding_idx or 0
            method = captum.LayerIntegratedGradients(_answer(model, head), layer)
            return method.attribute(inputs, baselines=baselines, **options).sum(-1).detach()
        method = captum.IntegratedGradients(_answer(model, head))
        return _detached(method.attribute(inputs, baselines=baselines, **options))


def occlusion(
    model,
    inputs,
    target,
    *,
    window,
    strides=None,
    baselines=0,
    additional_forward_args=None,
    head=None,
    perturbations_per_eval=1,
):
    """How much the answer falls where a window of the input is covered (Zeiler and Fergus 2014).

    Args:
        model, target, additional_forward_args, head: as for :func:`integrated_gradients`.
        inputs: a tensor [N, ...] or a tuple of these; token ids too, which ``baselines`` then replaces.
        window: the shape of what is covered at a time, without N: for clips [N, T, C, H, W] for example
            ``(1, 1, 4, 4)``. A tuple of shapes for a tuple of inputs.
        strides: how far the window moves, as ``window``; None: by one.
        baselines: what covers: a number, or as for :func:`integrated_gradients`.
        perturbations_per_eval: windows in one call of the model.

    Returns:
        Of the inputs' shape, floating point: the mean fall of the answer over the windows that covered each
        place.

    Raises:
        ImportError, ValueError, TypeError: as :func:`integrated_gradients`.
    """
    _are_tokens(inputs)  # for its check
    with _evaluating(model), torch.no_grad():
        return _captum().Occlusion(_answer(model, head)).attribute(
            inputs, window, strides, baselines, target, additional_forward_args, perturbations_per_eval
        )  # fmt: skip


def per_step_relevance(model, inputs, target, *, method="integrated_gradients", **options):
    """How much each time step decided.

    Args:
        model, target: as for :func:`integrated_gradients`.
        inputs: one tensor [N, T, ...], or token ids [N, T].
        method: "integrated_gradients": the sum of its attributions within a step. "occlusion": how much the
            answer falls where the whole step is covered.
        options: the other arguments of that function, but for ``window``.

    Returns:
        [N, T].

    Raises:
        As :func:`integrated_gradients`; RuntimeError for inputs without time.
    """
    check_choice("method", method, METHODS)
    check_tensor("inputs", inputs)
    if inputs.dim() < 2:
        raise RuntimeError(f"inputs: expected [N, T, ...], got shape {shape_of(inputs)}")
    if method == "integrated_gradients":
        return integrated_gradients(model, inputs, target, **options).unsqueeze(-1).flatten(2).sum(-1)
    window = (1, *inputs.shape[2:])
    # Every number of a step has the fall of the whole step.
    return occlusion(model, inputs, target, window=window, **options).unsqueeze(-1).flatten(2)[..., 0]


def attention(model, *inputs):
    """The model's own attention: ``model.attention(*inputs)``, in eval mode and without a graph.

    For CNNRNN and ParallelCNNRNN, with an attention readout, the weight of each time step, [N, T];
    for Seq2Seq that of each source token for each target token, [N, T, S].
    """
    with _evaluating(model), torch.no_grad():
        return model.attention(*inputs)


def _captum():
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(
            "cnnrnn_ext.explain needs Captum: pip install cnnrnn_ext[recipes], or pip install captum"
        ) from error
    return captum.attr


@contextlib.contextmanager
def _evaluating(model):
    """Every module of the model in eval mode, and then each as it was."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _answer(model, head):
    """The model as a function that returns one tensor."""

    def answer(*arguments):
        y = model(*arguments)
        if isinstance(y, dict):
            if head not in y:
                raise ValueError(f"head: expected one of {', '.join(map(repr, y))}, got {head!r}")
            return y[head]
        if head is not None:
            raise ValueError(f"head: the model has no named answers, expected None, got {head!r}")
        return y[0] if isinstance(y, tuple) else y

    return answer


def _are_tokens(inputs):
    if isinstance(inputs, tuple):
        for index, tensor in enumerate(inputs):
            check_tensor(f"inputs[{index}]", tensor)
        return False
    check_tensor("inputs", inputs)
    return not inputs.is_floating_point()


def _embedding_of(model):
    """The embedding that reads a model's tokens."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    found = {name: module for name, module in modules.items() if isinstance(module, nn.Embedding)}
    for name in ("embedding", "source_embedding"):
        if name in found:
            return found[name]
    if len(found) != 1:
        raise ValueError(f"layer: expected the nn.Embedding of the tokens; the model has {len(found)}")
    return next(iter(found.values()))


def _detached(attributions):
    if isinstance(attributions, tuple):
        return tuple(part.detach() for part in attributions)
    return attributions.detach()
