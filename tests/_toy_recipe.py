"""A recipe whose run takes a second: sequences of noise with a drift, up or down."""

from types import SimpleNamespace

import torch
from torch import nn

from cnnrnn_ext import LSTM
from cnnrnn_ext.recipes import checkpoints
from cnnrnn_ext.recipes.base import Batch, Data, RecipeError
from cnnrnn_ext.recipes.classification import Classification
from cnnrnn_ext.recipes.draws import Draws

SETTINGS = {
    "seed": 0, "epochs": 3, "batch_size": 8, "rate": 0.01, "patience": 10, "quick": False, "data": None,
    "bad_files": "refuse", "backend": "auto", "modules": "ours", "precision": "32-true", "noise": 1.0,
}  # fmt: skip


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = LSTM(3, 8, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.dropout(self.rnn(x)[0][:, -1]))


class Toy(Classification):
    name = "toy"
    epochs, batch_size = 3, 8
    sizes = {"train": 44, "validation": 20, "test": 12}  # noqa: RUF012
    seen = []  # noqa: RUF012 - (epoch's first number, rows) of each training batch

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--noise", type=float, default=1.0)

    @classmethod
    def add_inputs(cls, parser):
        parser.add_argument("inputs", nargs="*", type=int)

    def load(self, facts=None):
        if self.settings.data:
            raise RecipeError("the toy has no use for --data")
        return Data(
            {name: range(size) for name, size in self.sizes.items()},
            {"classes": {"label": ["down", "up"]}},
            {},
        )

    def read(self, arguments, facts):
        return (arguments.inputs, [f"number {i}" for i in arguments.inputs]) if arguments.inputs else None

    def build(self, facts):
        return Model()

    def batch(self, split, rows, draws=None):
        rows = [split[row] for row in rows]
        label = torch.tensor(rows) % 2
        if draws is not None:
            self.seen.append(rows)
        noise = (draws or Draws(1, 1, rows)).normal(6, 3)
        return Batch((noise * self.settings.noise + (label * 2.0 - 1)[:, None, None],), {"label": label})

    def explain(self, path, model, split, row, name, facts):
        path.write_bytes(b"a picture")
        return f"{name}: why"


def settings(**changes):
    return {**SETTINGS, **changes}


def toy(**changes):
    return Toy(SimpleNamespace(**settings(**changes)))


def fit(folder, *, resume=False, **changes):
    """(history, model) of a training, without the command line; resume: from ``folder``'s last checkpoint."""
    from cnnrnn_ext.recipes import harness

    recipe = toy(**changes)
    data = recipe.load()
    model = checkpoints.build(recipe, data.facts)
    content = checkpoints.read(folder / checkpoints.LAST, "toy") if resume else None
    history, _ = harness.fit(recipe, data, model, folder, resume=content, progress=False)
    return history, model


def stop_after(monkeypatch, batches, how):
    """Calls ``how`` when that many training batches have been made."""
    original = Toy.batch

    def batch(self, split, rows, draws=None):
        if draws is not None and len(self.seen) == batches:
            how()
        return original(self, split, rows, draws)

    monkeypatch.setattr(Toy, "batch", batch)
