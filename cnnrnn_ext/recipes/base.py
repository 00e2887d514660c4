"""What a recipe provides. The harness does the rest: training, checkpoints, evaluation, the command line.

A recipe is a subclass of :class:`Recipe` and a row in ``recipes.RECIPES``. It never sees Lightning, devices,
processes or files of the harness. The harness calls it in this order::

    recipe = Video(settings)                        # an attribute for every option that decides a run
    data = recipe.load()                            # Data: splits, facts, report
    model = recipe.build(data.facts)                # weights: from torch's generator, which the harness seeds
    batch = recipe.batch(data.splits["train"], rows, draws)
    outputs = recipe.forward(model, batch)          # model(*batch.inputs)
    total, count = recipe.loss(outputs, batch)      # the step minimises total / count
    recipe.update(metrics, model, outputs, batch)   # metrics = recipe.metrics(facts), in evaluation only
    recipe.pictures(folder, model, data, results)

``predict`` and ``explain`` start from a checkpoint: settings and facts come from there, and ``read`` turns
what the user named on the command line into a split. So ``build``, ``batch`` and ``predict`` must need
nothing that is not in settings and facts.

What a sample looks like may depend on the seed, the epoch and its row, and on nothing else: a recipe draws
random numbers from ``draws`` (:class:`draws.Draws`) alone. Then a resumed run goes on as if it had not been
stopped, and several processes do together what one does alone.

A recipe's module may import torch and cnnrnn_ext at its top; everything of the ``recipes`` extra (lightning,
torchmetrics, scikit-learn, matplotlib, av, …) inside the functions that use it.
"""

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from cnnrnn_ext.recipes.options import UserError


class RecipeError(UserError):
    """Raised by recipes: something the user can put right."""


class Batch(NamedTuple):
    """Some samples: the model's arguments, and what the loss and the metrics compare its outputs with.

    Both hold tensors, None, or tuples and dicts of them, so that the harness can move them to a device.
    ``targets`` is None where nothing is known (predict).
    """

    inputs: tuple
    targets: Any = None


@dataclass
class Data:
    """What ``load`` returns.

    splits: {"train" | "validation" | "test": any object with a length}; its rows are 0 … len - 1.
    facts: what the model and the predictions must know of the data (class names, alphabet, frame size);
        plain values that JSON can hold. They are saved in the checkpoint.
    report: what metrics.json tells about the data (counts, sources, skipped files); plain values too.
    """

    splits: dict[str, Any]
    facts: dict
    report: dict = field(default_factory=dict)


class Recipe(abc.ABC):
    """Base class of all recipes.

    Class attributes:
        name: on the command line, and of the folder ``out/<name>``.
        needs: {module: package} beyond what the harness itself needs (``harness.NEEDED``).
        epochs, batch_size, rate: of the training on the embedded data. batch_size counts all processes
            together; rate is Adam's at its peak.
        patience: epochs with a lower score than the best one's after which the training ends.
        quick: {option: value}: what ``--quick`` sets where the user does not, so that a run takes seconds;
            ``load`` cuts the data where ``settings.quick`` is true.
        score: the name of the validation metric that chooses the best checkpoint; more is better.

    Args:
        settings: a namespace with every option that decides a run: ``seed, epochs, rate, patience, quick``;
            ``batch_size``, or None (see ``harness.batch_size``); ``data``, a path, or None for the embedded
            data; ``bad_files``, "skip" or "refuse"; and what ``add_arguments`` added. They are saved in the
            checkpoint.
    """

    name = ""
    needs: ClassVar[dict[str, str]] = {}
    epochs = 10
    batch_size = 32
    rate = 2e-3
    patience = 10
    quick: ClassVar[dict[str, Any]] = {"epochs": 2}
    score = "accuracy"

    def __init__(self, settings):
        self.settings = settings

    # ---- the command line ----

    @classmethod
    def add_arguments(cls, parser):
        """Adds the recipe's own options of ``train`` (numbers, strings, switches); each decides the run."""
        return

    @classmethod
    @abc.abstractmethod
    def add_inputs(cls, parser):
        """Adds the positional arguments of ``predict`` and ``explain`` (files, texts); see :meth:`read`."""

    # ---- data and model ----

    @abc.abstractmethod
    def load(self, facts=None):
        """The :class:`Data` of ``settings.data``, or the embedded ones.

        facts: of a checkpoint, when that one is evaluated: labels and alphabets must then be the known ones;
        what is unknown is a bad file. Raises RecipeError when there is nothing to train on.
        """

    @abc.abstractmethod
    def read(self, arguments, facts):
        """(split, names): what the user asks about, as a split for :meth:`batch`, and a name for each row.

        arguments: the parsed command line, with what :meth:`add_inputs` added.
        """

    @abc.abstractmethod
    def build(self, facts):
        """The model, of cnnrnn_ext's modules. ``--modules stock`` is the harness's business (unfuse_)."""

    @abc.abstractmethod
    def batch(self, split, rows, draws=None):
        """:class:`Batch` of ``rows``, a list of row numbers of ``split``.

        draws: :class:`draws.Draws` of these rows in training; None in evaluation, where a row always gives
        the same sample.
        """

    # ---- training and evaluation ----

    def forward(self, model, batch):
        """The model's outputs."""
        return model(*batch.inputs)

    @abc.abstractmethod
    def loss(self, outputs, batch):
        """(total, count): the sum of the losses, a scalar with a gradient, and how many were summed (samples,
        tokens). The harness minimises total / count over the whole batch, however many processes share it."""

    @abc.abstractmethod
    def metrics(self, facts):
        """{name: torchmetrics.Metric}: new ones."""

    @abc.abstractmethod
    def update(self, metrics, model, outputs, batch):
        """Adds a batch to ``metrics``. model: in eval mode, for what needs more than outputs (generate)."""

    def results(self, metrics):
        """{name: number or nested list}: the metrics' values; ``score`` is one of the names."""
        return {name: metric.compute().tolist() for name, metric in metrics.items()}

    def further_figures(self, model, data):
        """Figures of the test split beside the metrics, for metrics.json: baselines, parts of the model."""
        return {}

    # ---- what the user sees ----

    @abc.abstractmethod
    def predict(self, model, batch, facts):
        """One dict of plain values for each sample: the prediction, with probabilities or scores."""

    @abc.abstractmethod
    def describe(self, prediction):
        """One line of text for an element of :meth:`predict`'s list."""

    def draw(self, path, split, names, predictions, facts):
        """The PNG of ``predict --draw``: samples with what the model says; RecipeError if there is none."""
        raise RecipeError(f"the recipe {self.name} draws no predictions")

    def pictures(self, folder, model, data, results):
        """Draws the test split into ``folder`` (confusion matrix, examples); returns the paths. The curve of
        the training is the harness's."""
        return []

    @abc.abstractmethod
    def explain(self, path, model, split, row, name, facts):
        """Draws into ``path`` (PNG) which parts of the sample ``row`` of ``split`` decided; returns a line
        that says what the picture shows."""


def batches(recipe, split, size):
    """All batches of a split, in order, as evaluation sees them."""
    for start in range(0, len(split), size):
        yield recipe.batch(split, list(range(start, min(start + size, len(split)))))


def move(value, device):
    """The tensors in ``value`` (a Batch; tuples and dicts inside one another) on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move(part, device) for name, part in value.items()}
    if isinstance(value, Batch):
        return Batch(*(move(part, device) for part in value))
    if isinstance(value, tuple):
        return tuple(move(part, device) for part in value)
    return value


@torch.no_grad()
def outputs_of(recipe, model, split, size=64):
    """(outputs, batch) for all batches of a split, on the model's device, the model in eval mode."""
    before, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in batches(recipe, split, size):
            batch = move(batch, device)
            yield recipe.forward(model, batch), batch
    finally:
        model.train(before)


def evaluate(recipe, model, splits, facts):
    """{name: number or nested list}: the recipe's metrics over all rows of some splits."""
    device = next(model.parameters()).device
    metrics = {name: metric.to(device) for name, metric in recipe.metrics(facts).items()}
    for split in splits:
        for outputs, batch in outputs_of(recipe, model, split):
            recipe.update(metrics, model, outputs, batch)
    return recipe.results(metrics)
