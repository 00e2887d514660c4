"""What all recipes stand on: numbers that belong to a row, splits, bad files, the sharing of batches."""

from collections import Counter

import pytest
import torch
from _toy_recipe import toy

from cnnrnn_ext.recipes import RECIPES, schedule
from cnnrnn_ext.recipes.base import Batch, RecipeError, move
from cnnrnn_ext.recipes.data.files import BadFiles, split_rows
from cnnrnn_ext.recipes.draws import Draws, order


def test_a_rows_numbers_are_its_own():
    together = Draws(3, 5, [4, 900, 7])
    alone = Draws(3, 5, [900])
    for draw in (lambda d: d.uniform(2, 3), lambda d: d.integers(10), lambda d: d.normal(4)):
        assert torch.equal(draw(together)[1:2], draw(alone))
    assert not torch.equal(Draws(3, 5, [900]).uniform(8), Draws(3, 6, [900]).uniform(8))
    assert not torch.equal(Draws(3, 5, [900]).uniform(8), Draws(4, 5, [900]).uniform(8))
    assert not torch.equal(Draws(3, 5, [900]).uniform(8), Draws(3, 5, [901]).uniform(8))


def test_draws_have_the_distributions_they_name():
    rows = range(20_000)
    draws = Draws(0, 0, rows)
    uniform = draws.uniform(2).double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # 40,000 numbers: the means lie within five standard errors
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 200
    assert abs(uniform.var() - 1 / 12) < 0.002
    correlation = torch.corrcoef(torch.stack([uniform[:-1, 0], uniform[1:, 0], uniform[:-1, 1]]))
    assert (correlation - torch.eye(3)).abs().max() < 0.04
    counts = torch.bincount(draws.integers(7), minlength=8)
    assert counts[7] == 0
    assert ((counts[:7] - 20_000 / 7).abs() < 5 * (20_000 / 7) ** 0.5).all()
    normal = draws.normal(2).double()
    assert abs(normal.mean()) < 5 / 200
    assert abs(normal.std() - 1) < 0.02
    assert abs((normal.abs() < 1).double().mean() - 0.6827) < 0.02


def test_an_epoch_shows_each_row_once_in_its_own_order():
    first, second = order(100, 0, 0), order(100, 0, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert order(100, 0, 0) == first
    assert order(100, 1, 0) != first


def test_split_keeps_each_labels_share():
    labels = ["a"] * 50 + ["b"] * 10 + ["c"] * 3
    parts = split_rows(labels, seed=0)
    assert sorted(row for rows in parts.values() for row in rows) == list(range(63))
    count = {name: Counter(labels[row] for row in rows) for name, rows in parts.items()}
    assert count["train"] == {"a": 35, "b": 7, "c": 1}
    assert count["validation"] == {"a": 5, "b": 1, "c": 1}
    assert count["test"] == {"a": 10, "b": 2, "c": 1}
    assert split_rows(labels, seed=1)["test"] != parts["test"]


def test_bad_files_are_named_counted_and_refused_or_skipped(capsys):
    refusing, skipping = BadFiles("refuse"), BadFiles("skip")
    for bad in (refusing, skipping):
        for number in range(25):
            bad.add(f"clip{number}.mp4", "an empty file")
    with pytest.raises(RecipeError, match=r"25 bad file.*\n  clip0.mp4: an empty file[\s\S]*and 5 more"):
        refusing.settle()
    assert skipping.settle()[24] == {"name": "clip24.mp4", "reason": "an empty file"}
    told = capsys.readouterr().err
    assert "25 bad" in told
    assert "clip19.mp4: an empty file" in told
    assert "clip20.mp4" not in told
    assert BadFiles("refuse").settle() == []


def test_rate_rises_and_falls_to_zero():
    rates = [schedule.rate_at(step, 100, 0.1) for step in range(101)]
    assert max(rates) == rates[5] == 0.1
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[0] > 0
    assert rates[100] == pytest.approx(0)


def test_move_reaches_every_tensor():
    batch = Batch((torch.ones(1), (None, {"a": torch.ones(2)})), {"label": torch.ones(3)})
    moved = move(batch, "meta")
    assert isinstance(moved, Batch)
    assert moved.inputs[0].is_meta
    assert moved.inputs[1][1]["a"].is_meta
    assert moved.inputs[1][0] is None
    assert moved.targets["label"].is_meta
    assert batch.inputs[0].device.type == "cpu"


def test_every_recipe_is_there_and_documented():
    from cnnrnn_ext.recipes import base, recipe_class

    for name in RECIPES:
        cls = recipe_class(name)
        assert issubclass(cls, base.Recipe)
        assert cls.name == name
        # The tasks of a recipe are classes below it, of which it makes one.
        for kind in cls.__subclasses__() or [cls]:
            assert not kind.__abstractmethods__


def test_classification_measures_heads_alone_and_together():
    pytest.importorskip("torchmetrics")
    recipe = toy()
    metrics = recipe.metrics({"classes": {"digit": ["0", "1"], "motion": ["l", "r", "u"]}})
    digit, motion = torch.eye(2)[[0, 1, 1, 0]], torch.eye(3)[[0, 1, 2, 2]]
    targets = {"digit": torch.tensor([0, 1, 0, 0]), "motion": torch.tensor([0, 2, 2, 2])}
    recipe.update(metrics, None, {"digit": digit, "motion": motion}, Batch((), targets))
    results = recipe.results(metrics)
    assert results["accuracy"] == pytest.approx(0.5)
    assert results["accuracy_digit"] == results["accuracy_motion"] == pytest.approx(0.75)
    assert results["confusion_digit"] == [[2, 1], [0, 1]]
    assert results["confusion_motion"] == [[1, 0, 0], [0, 0, 0], [0, 1, 2]]
    total, count = recipe.loss({"digit": digit, "motion": motion}, Batch((), targets))
    expected = sum(
        torch.nn.functional.cross_entropy(logits, targets[head])
        for head, logits in {"digit": digit, "motion": motion}.items()
    )
    assert (total / count).item() == pytest.approx(expected.item())
