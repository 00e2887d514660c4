"""Which modules of a model follow each other in every call: convolution, norm, activation, pool.

Each container's own ``forward`` is followed symbolically (torch.fx), its children taken as they are, once in
training and once in evaluation mode. What cannot be followed is left alone, and the reason kept.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, field

from torch import fx, nn

from cnnrnn_ext.fuse._stock import NORMS, activation_of, pool_of

UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # they have no forward


@dataclass
class Chain:
    """A convolution and what may be computed with it: modules, None where there is none."""

    convolution: nn.Module
    norm: nn.Module | None = None
    activation: nn.Module | None = None
    pool: nn.Module | None = None
    reason: str = ""  # why it is no longer, or why there is none

    def absorbed(self):
        """What goes into the convolution, in the order in which it is computed afterwards."""
        return [module for module in (self.norm, self.activation, self.pool) if module is not None]


@dataclass
class Calls:
    """Where the modules of a model are called: (graph, node) of each call, by the module's id."""

    nodes: dict = field(default_factory=lambda: defaultdict(list))
    modules: dict = field(default_factory=dict)  # (graph id, node name) -> module
    failures: dict = field(default_factory=dict)  # id of a child -> why its parent could not be followed


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


def _graph_of(module, training):
    # A shallow twin: what forward writes to itself must not stay in the user's model.
    twin = object.__new__(type(module))
    twin.__dict__.update(
        {
            key: copy.copy(value) if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
        }
    )
    twin.__dict__["training"] = training
    return _Tracer().trace(twin)


def calls_of(model):
    """The :class:`Calls` in all containers of ``model``."""
    calls = Calls()
    for container in model.modules():
        if not container._modules or isinstance(container, UNCALLED):
            continue
        try:
            graphs = [_graph_of(container, training) for training in (True, False)]
        except Exception as error:  # whatever the user's forward raises when its tensors are symbols
            reason = f"{type(container).__name__}.forward cannot be followed ({_short(error)})"
            for child in container.children():
                for inner in child.modules() if isinstance(child, UNCALLED) else [child]:
                    calls.failures[id(inner)] = reason
            continue
        for graph in graphs:
            for node in graph.nodes:
                if node.op == "call_module":
                    module = container.get_submodule(node.target)
                    calls.nodes[id(module)].append((graph, node))
                    calls.modules[id(graph), node.name] = module
    return calls


def _short(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:60]}…" if len(text) > 60 else f"{type(error).__name__}: {text}"


def chain_from(convolution, calls, paths):
    """The longest :class:`Chain` that holds wherever the convolution is called.

    Args:
        calls: of the whole model. paths: {id of a module: how many names it has in the model}.
    """
    found = calls.nodes.get(id(convolution), [])
    if not found:
        return Chain(convolution, reason=calls.failures.get(id(convolution), "it is called by no forward"))
    if paths[id(convolution)] > 1:
        return Chain(convolution, reason="it stands in the model under several names")
    if len({id(graph) for graph, _ in found}) < len(found):
        return Chain(convolution, reason="it is called several times")
    chains = [_chain_in(graph, node, convolution, calls, paths) for graph, node in found]
    first = min(chains, key=lambda chain: len(chain.absorbed()))
    for chain in chains:
        if chain.absorbed()[: len(first.absorbed())] != first.absorbed():
            return Chain(convolution, reason="what follows it differs from call to call")
    return first


def _chain_in(graph, node, convolution, calls, paths):
    chain = Chain(convolution)
    dims = convolution.weight.dim() - 2
    while True:
        if len(node.users) != 1:
            chain.reason = "its output is used several times" if node.users else "nothing follows it"
            return chain
        (user,) = node.users
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            chain.reason = "it returns here" if user.op == "output" else f"{_name(user)} follows, no module"
            return chain
        module = calls.modules[id(graph), user.name]
        place = _place(chain, module, convolution, dims)
        if place is None:
            chain.reason = f"{type(module).__name__} follows"
        elif reason := _taken(module, calls, paths, len(calls.nodes[id(convolution)])):
            chain.reason = f"{type(module).__name__} follows and {reason}"
            place = None
        if place is None:
            return chain
        setattr(chain, place, module)
        node = user


def _name(node):
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _place(chain, module, convolution, dims):
    """Which part of the chain this module can become, or None."""
    if type(module) in NORMS:
        fits = NORMS[type(module)] is type(convolution) and module.num_features == convolution.out_channels
        return "norm" if fits and not chain.absorbed() else None
    if activation_of(module):
        # The maximum of ReLU's values is ReLU of the maximum, gradients included; the mean's is not.
        pooled_first = chain.pool is None or (
            activation_of(module) == "relu" and pool_of(chain.pool, dims)["pool"] == "max"
        )
        return "activation" if chain.activation is None and pooled_first else None
    return "pool" if chain.pool is None and pool_of(module, dims) else None


def _taken(module, calls, paths, count):
    """Why nobody may compute this module's work elsewhere, or None. count: of the convolution's calls."""
    if paths[id(module)] > 1:
        return "stands in the model under several names"
    if len(calls.nodes[id(module)]) != count:
        return "is called elsewhere too"
    return changed_behaviour(module)


def changed_behaviour(module):
    """Why this module does something else than its type says, or None."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "has hooks"
    return "has a forward of its own" if "forward" in module.__dict__ else None
