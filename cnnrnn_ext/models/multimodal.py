"""Several networks, one for each kind of input, that answer together; any of their inputs may be missing."""

import torch
from torch import nn

from cnnrnn_ext._checks import check_choice, check_tensor, shape_of
from cnnrnn_ext._checks_rnn import check_rate
from cnnrnn_ext.models._fusion import Fusion
from cnnrnn_ext.models._readout import make_heads

FUSIONS = ("late", "gated")


class MultiModal(nn.Module):
    """{"video": clips, "audio": spectrograms, …} → the features of a branch each → fused → classes.

    Args:
        branches: {"name": module}, each with ``features(*inputs) -> [N, D]`` and ``feature_size`` = D, as
            CNNRNN, RNNCNN and ParallelCNNRNN have them (not of every step). Their own heads are not used.
        heads: the number of classes, or {"name": number}.
        fusion: "late": each branch answers by heads of its own, and the logits of those present are averaged.
            "gated": the features are fused first (each one a mixture of the present branches' projections,
            with gates that read all of them: Arevalo et al. 2017), and one set of heads answers.
        features: the size of the fused features for "gated"; None: the largest of the branches'.
        branch_dropout: in training, each branch of each row is left out with this probability (never all that
            a row has), so that the model learns to do with what is there.

    Shape:
        inputs: {"name": a tensor, or a tuple of the arguments of that branch's ``features``, or None}: None,
        or no entry, is missing for the whole batch. Tensors begin with N.
        present: None, or {"name": [N] bool}: which rows have that input; the others' content is not read.
        Returns logits [N, classes], or a dict of these. A missing branch contributes nothing: the answer is
        that of the others; of a row without any, 0 ("late") or the heads' of features 0 ("gated").

    A branch runs on the rows that have its input, and not at all where no row has: with DDP that takes
    ``find_unused_parameters=True`` (which ``cnnrnn_ext.recipes`` sets by itself); torch.compile with
    ``present`` or ``branch_dropout`` breaks the graph.

    Raises:
        ValueError: no branches, an unknown fusion or probability, a name in inputs or present that is no
            branch, no input at all.
        TypeError, RuntimeError: a branch without features or feature_size, or whose features have another
            shape; inputs or present of another batch size or dtype, by name.
    """

    def __init__(self, branches, heads, *, fusion="late", features=None, branch_dropout=0.0):
        super().__init__()
        check_choice("fusion", fusion, FUSIONS)
        check_rate("branch_dropout", branch_dropout)
        if not branches:
            raise ValueError("branches: expected {name: module}, got none")
        for name, branch in branches.items():
            if not isinstance(getattr(branch, "feature_size", None), int) or not hasattr(branch, "features"):
                raise TypeError(f"branches[{name!r}]: expected a module with features() and feature_size")
        self.branches = nn.ModuleDict(branches)
        self.branch_dropout = branch_dropout
        sizes = [branch.feature_size for branch in branches.values()]
        self.fusion = self.heads = self.branch_heads = None
        if fusion == "gated":
            self.fusion = Fusion("gated", sizes, features or max(sizes))
            self.heads = make_heads(self.fusion.features, heads)
        else:
            self.branch_heads = nn.ModuleList(make_heads(size, heads) for size in sizes)

    def forward(self, inputs, present=None):
        return self._answer(*self._features(inputs, present))

    def with_each_alone(self, inputs, present=None):
        """(what ``forward`` returns, {name: (what it would with that branch alone, [N] bool: rows with it)}).

        To train on: a loss on each branch's own answer as well makes all of them learn what they would by
        themselves, where otherwise the best one answers and the others need not; a missing one costs least
        then. The features are computed once, so that this costs little more than ``forward``.
        """
        features, present = self._features(inputs, present)
        alone = {}
        for column, name in enumerate(self.branches):
            here = torch.zeros_like(present)
            here[:, column] = present[:, column]
            alone[name] = self._answer(features, here), present[:, column]
        return self._answer(features, present), alone

    def branch_weights(self, inputs, present=None):
        """[N, B]: the share of each branch in a row's answer, in the order of ``branches``.

        "late": equal shares of those present. "gated": the means of the gates.
        """
        features, present = self._features(inputs, present)
        if self.fusion is not None:
            return self.fusion.weights(features, present)
        return present / present.sum(1, keepdim=True).clamp(min=1)

    def _answer(self, features, present):
        if self.fusion is not None:
            return self.heads(self.fusion(features, present))
        answers = [head(x) for head, x in zip(self.branch_heads, features, strict=True)]
        if isinstance(answers[0], dict):
            return {name: _mean([answer[name] for answer in answers], present) for name in answers[0]}
        return _mean(answers, present)

    def _features(self, inputs, present):
        """([N, D] of each branch, 0 where missing; present [N, B] bool)."""
        inputs, rows, device = self._arguments(inputs)
        present = self._presence(inputs, present, rows, device)
        if self.training and self.branch_dropout:
            kept = present & (torch.rand(present.shape, device=device) >= self.branch_dropout)
            present = torch.where(kept.any(1, keepdim=True), kept, present)
        each = zip(self.branches.items(), present.unbind(1), strict=True)
        features = [self._branch(name, branch, inputs.get(name), here) for (name, branch), here in each]
        dtype = next(x.dtype for x in features if x is not None)
        sizes = (branch.feature_size for branch in self.branches.values())
        return [
            torch.zeros(rows, size, dtype=dtype, device=device) if x is None else x
            for x, size in zip(features, sizes, strict=True)
        ], present

    def _branch(self, name, branch, arguments, here):
        """[N, D], 0 in rows without this input; None if no row has it."""
        if arguments is None:
            return None
        rows = here.nonzero().squeeze(1)
        everywhere = len(rows) == len(here)
        if len(rows) == 0 and not everywhere:
            return next(branch.parameters()).new_zeros(len(here), branch.feature_size)
        if not everywhere:
            arguments = [a.index_select(0, rows.to(a.device)) if _is_tensor(a) else a for a in arguments]
        x = branch.features(*arguments)
        if shape_of(x) != [len(rows), branch.feature_size]:
            raise RuntimeError(
                f"branches[{name!r}]: expected features of shape {[len(rows), branch.feature_size]}, got "
                f"{shape_of(x)}"
            )
        return x if everywhere else x.new_zeros(len(here), x.shape[1]).index_copy(0, rows, x)

    def _arguments(self, inputs):
        """({name: list of arguments} of the branches that have any, N, device)."""
        if not isinstance(inputs, dict):
            raise TypeError(f"inputs: expected a dict of names, got {type(inputs).__name__}")
        self._check_names("inputs", inputs)
        given = {
            name: list(value) if isinstance(value, (tuple, list)) else [value]
            for name, value in inputs.items()
            if value is not None
        }
        if not given:
            raise ValueError(f"inputs: expected at least one of {', '.join(self.branches)}")
        first = next(iter(given.values()))[0]
        for name, arguments in given.items():
            check_tensor(f"inputs[{name!r}]", arguments[0])
            for argument in filter(_is_tensor, arguments):
                if argument.dim() == 0 or len(argument) != len(first):
                    raise RuntimeError(
                        f"inputs[{name!r}]: expected {len(first)} rows, got shape {shape_of(argument)}"
                    )
        return given, len(first), first.device

    def _presence(self, inputs, present, rows, device):
        present = {} if present is None else present
        self._check_names("present", present)
        columns = []
        for name in self.branches:
            here = present.get(name)
            if here is None or name not in inputs:
                columns.append(torch.full((rows,), name in inputs, device=device))
                continue
            check_tensor(f"present[{name!r}]", here)
            if here.dtype != torch.bool or shape_of(here) != [rows]:
                raise RuntimeError(
                    f"present[{name!r}]: expected bool of shape [{rows}], got {here.dtype} of shape "
                    f"{shape_of(here)}"
                )
            columns.append(here.to(device))
        return torch.stack(columns, 1)

    def _check_names(self, what, given):
        unknown = [repr(name) for name in given if name not in self.branches]
        if unknown:
            raise ValueError(f"{what}: {', '.join(unknown)} is none of {', '.join(self.branches)}")


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def _mean(logits, present):
    """The mean over the branches that are present. logits: [N, classes] each; present: [N, B]."""
    total = sum(x.masked_fill(~here[:, None], 0.0) for x, here in zip(logits, present.unbind(1), strict=True))
    return total / present.sum(1, keepdim=True).clamp(min=1)
