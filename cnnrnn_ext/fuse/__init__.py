"""Stock modules in a user's model exchanged for ours, and back."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils import parametrize

from cnnrnn_ext.fuse import _chains
from cnnrnn_ext.fuse._modules import Absorbed, ConvNormPool1d, ConvNormPool2d, FoldedNorm, share
from cnnrnn_ext.fuse._stock import (
    CONVOLUTIONS,
    OURS,
    activation_of,
    convolution_arguments,
    only_ours,
    our_recurrent,
    pool_of,
    stock_of,
)

__all__ = ["Report", "fuse_", "unfuse_"]


@dataclass
class Report:
    """What :func:`fuse_` or :func:`unfuse_` did, or would do.

    Attributes:
        changed: list of (name of the module, what stood there, what stands there now).
        skipped: list of (name of the module, what stands there, why it stays).
        dry_run: True if nothing was changed.
    """

    changed: list = field(default_factory=list)
    skipped: list = field(default_factory=list)
    dry_run: bool = False

    def __str__(self):
        lines = [f"{len(self.changed)} {'would change' if self.dry_run else 'changed'}"]
        lines += [f"  {name}: {before} -> {after}" for name, before, after in self.changed]
        if self.skipped:
            lines.append(f"{len(self.skipped)} left alone")
            lines += [f"  {name}: {what}: {reason}" for name, what, reason in self.skipped]
        return "\n".join(lines)


def fuse_(model, filter_fn=None, dry_run=False):
    """Exchanges the stock modules of ``model`` for ours, in place; outputs, state dict and parameters stay.

    - ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells become ours.
    - ``nn.Conv1d`` and ``nn.Conv2d`` become ConvPool together with what follows them in every call:
      BatchNorm, an activation, a pool (each may be missing), as long as each is a module that is called
      nowhere else. What is computed earlier passes its input on; its name and parameters stay where they
      are. BatchNorm is folded while it normalises by its running statistics, and computed by itself while
      it trains.

    What follows a convolution is read from the forward of each container, in both modes. Where a forward
    cannot be followed (its control flow depends on values) its own convolutions stay as they are; an
    ``nn.Sequential`` inside is still exchanged: it is taken to be called as a whole. Forward hooks belong on
    a model after this call: a module with hooks stays as it is, and the output of a fused convolution is the
    pooled map.

    Args:
        model: nn.Module. Optimizers, which hold its parameters, may exist already.
        filter_fn: ``filter_fn(name, module) -> bool``, asked for each convolution and recurrent module;
            only those where it returns True are exchanged. None for all.
        dry_run: only report.

    Returns:
        A :class:`Report`; ``print`` shows it as a list, with the reason for each module left alone.

    Raises:
        TypeError: model is no nn.Module, or filter_fn not callable.
        ValueError: model is itself one module of those exchanged: nothing could be put in its place.
    """
    _check_model(model, (*OURS, *CONVOLUTIONS))
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a callable or None, got {type(filter_fn).__name__}")
    report = Report(dry_run=dry_run)
    names = dict(model.named_modules())
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    calls = None
    exchanged = {}  # id of a module -> what takes its place
    for name, module in names.items():
        kind = type(module)
        if parametrize.is_parametrized(module) and issubclass(kind, (*OURS, *CONVOLUTIONS)):
            report.skipped.append((name, kind.__name__, "it is parametrized"))
            continue
        if kind not in OURS and kind not in CONVOLUTIONS:
            continue
        if filter_fn is not None and not filter_fn(name, module):
            report.skipped.append((name, kind.__name__, "filter_fn"))
            continue
        if reason := _chains.changed_behaviour(module):
            report.skipped.append((name, kind.__name__, f"it {reason}"))
        elif kind in OURS:
            exchanged[id(module)] = our_recurrent(module)
            report.changed.append((name, kind.__name__, f"cnnrnn_ext.{OURS[kind].__name__}"))
        else:
            calls = calls or _chains.calls_of(model)
            chain = _chains.chain_from(module, calls, paths)
            if not chain.absorbed():
                report.skipped.append((name, kind.__name__, chain.reason))
                continue
            fused = _fused(chain)
            exchanged |= {id(old): new for old, new in fused}
            before = " + ".join(type(old).__name__ for old, _ in fused)
            report.changed.append((name, before, f"cnnrnn_ext.{CONVOLUTIONS[kind].__name__}"))
    if not dry_run:
        _exchange(model, exchanged)
    return report


def unfuse_(model):
    """Exchanges our modules for stock ones, in place: what :func:`fuse_` did is undone, and modules that were
    ours from the start become stock modules of the same parameters, names and results.

    A stock layer that takes the place of one of ours still takes ``lengths=`` (by packing), and none of our
    other keyword arguments; narrow weights (``weight_dtype``) are no longer narrow.

    Args:
        model: nn.Module.

    Returns:
        A :class:`Report`.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: model is itself one of our modules, or holds one with options that no stock module has
            (layer_norm, zoneout, recurrent_dropout). Nothing has been changed then.
    """
    _check_model(model, ())
    if stock_of(model) is not None:
        raise ValueError(f"model: it is itself a {type(model).__name__}; put it into a module first")
    report, exchanged = Report(), {}
    for name, module in model.named_modules():
        if options := only_ours(module):
            raise ValueError(f"model: {name} has {', '.join(options)}, which no stock module has")
        new = _restored(module)
        if new is None:
            continue
        exchanged[id(module)] = new
        report.changed.append((name, f"cnnrnn_ext.{type(module).__name__}", type(new).__name__))
    _exchange(model, exchanged)
    return report


def _check_model(model, kinds):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if type(model) in kinds:
        raise ValueError(
            f"model: it is itself an {type(model).__name__}, and nothing can take its place from inside; "
            f"build it from cnnrnn_ext instead"
        )


def _fused(chain):
    """[(old module, new module)] of a chain, in the order of computation."""
    old = chain.convolution
    dims = old.weight.dim() - 2
    options = {"activation": activation_of(chain.activation) if chain.activation else "none", "pool": "none"}
    if chain.pool:
        options |= pool_of(chain.pool, dims)
    kind = CONVOLUTIONS[type(old)]
    if chain.norm:
        kind = (ConvNormPool1d, ConvNormPool2d)[dims - 1]
    convolution = share(old, kind(**convolution_arguments(old), **options, device="meta"))
    convolution.__dict__["stock"] = type(old)
    norm = FoldedNorm(chain.norm) if chain.norm else None
    if norm:
        convolution.follow(norm)
    pairs = [(old, convolution)] + ([(chain.norm, norm)] if norm else [])
    rest = [module for module in (chain.activation, chain.pool) if module]
    return pairs + [(module, Absorbed(module, norm)) for module in rest]


def _restored(module):
    if isinstance(module, FoldedNorm):
        return module.restored()
    if isinstance(module, Absorbed):
        module.original.training = module.training
        return module.original
    return stock_of(module)


def _exchange(model, exchanged):
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in exchanged:
                setattr(parent, name, exchanged[id(child)])
