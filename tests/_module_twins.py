"""Our modules and their stock twins, with the same parameters, and what they must have in common."""

import torch
from _oracle import running_on
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import cnnrnn_ext as cx


def twins(stock_class, our_class, *args, **kwargs):
    """(ours, stock) with the same parameters, loaded through the state dict, strictly, both ways."""
    stock = stock_class(*args, **kwargs)
    ours = our_class(*args, **kwargs)
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock_class(*args, **kwargs).load_state_dict(ours.state_dict(), strict=True)
    return ours, stock


def flatten(result):
    """Every tensor of nested outputs, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in (result.values() if isinstance(result, dict) else result) for t in flatten(part)]


def check_alike(ours, stock, mode, ops, *inputs, **tolerance):
    """Outputs and gradients of every input and parameter, on the same inputs."""
    leaves = [t for t in flatten(inputs) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for module, where in ((ours, mode), (stock, None)):
        if where is None:
            result = module(*inputs)
        else:
            with running_on(where, *ops):
                result = module(*inputs)
        outputs = flatten(result)
        loss = sum((y.double() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()], allow_unused=True)
        results.append(([y.detach() for y in outputs], grads))
    (our_outputs, our_grads), (their_outputs, their_grads) = results
    for a, b in zip(our_outputs, their_outputs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(our_grads, their_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


KINDS = {
    "lstm": ("lstm", nn.LSTM, cx.LSTM, {}),
    "gru": ("gru", nn.GRU, cx.GRU, {}),
    "rnn": ("rnn", nn.RNN, cx.RNN, {}),
    "rnn relu": ("rnn", nn.RNN, cx.RNN, {"nonlinearity": "relu"}),
}


def random_states(kind, *shape):
    states = torch.randn(shape), torch.randn(shape)
    return states if kind == "lstm" else states[0]
