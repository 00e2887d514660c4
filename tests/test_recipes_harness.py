"""The harness: a stopped run goes on as if it had not been, checkpoints are whole, errors are told."""

import math
import os
import signal

import pytest
import torch
from _toy_recipe import Toy, fit, settings, stop_after

pytest.importorskip("lightning")
pytest.importorskip("torchmetrics")

from cnnrnn_ext import _files
from cnnrnn_ext.recipes import checkpoints, harness, recipe_class, runs
from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.draws import order

pytestmark = pytest.mark.usefixtures("toy_recipe", "interrupts")


# The first epoch is whole; within the second; within the third.
@pytest.mark.parametrize("batches", [5, 7, 14])
def test_a_stopped_run_continues_bit_by_bit(tmp_path, monkeypatch, batches):
    expected, whole = fit(tmp_path / "whole")
    assert len(expected.losses) == 15
    assert expected.losses[0] != expected.losses[5]
    everything = list(Toy.seen)

    Toy.seen.clear()
    with monkeypatch.context() as patch:
        stop_after(patch, batches, lambda: os.kill(os.getpid(), signal.SIGINT))
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "stopped")
        assert signal.getsignal(signal.SIGINT) is handler
    epochs = batches // 5
    Toy.seen.clear()
    history, model = fit(tmp_path / "stopped", resume=True)
    assert Toy.seen == everything[5 * epochs :]
    assert history.losses == expected.losses
    assert history.validation == expected.validation
    assert history.best == expected.best
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for name in (checkpoints.BEST, checkpoints.LAST):
        ours, theirs = (_files.read_torch(tmp_path / folder / name) for folder in ("stopped", "whole"))
        for key, value in theirs["state_dict"].items():
            assert torch.equal(ours["state_dict"][key], value), key


def test_each_epoch_shows_every_row_at_most_once_in_the_seeds_order(tmp_path):
    fit(tmp_path)
    rows = [row for batch in Toy.seen for row in batch]
    for epoch in range(3):
        assert rows[40 * epoch : 40 * (epoch + 1)] == order(44, 0, epoch)[:40]


def test_best_checkpoint_is_the_best_epochs(tmp_path):
    history, _ = fit(tmp_path, epochs=5, noise=4.0)
    scores = [entry["accuracy"] for entry in history.validation]
    assert scores[history.best - 1] == max(scores) > max([0, *scores[history.best :]])
    assert history.best < 5
    recipe, _, model, content = checkpoints.restore(tmp_path / checkpoints.BEST, "toy")
    assert len(content["run"]["history"]["validation"]) == history.best
    split = recipe.load().splits["validation"]
    chosen, truth = recipe.answers(model, split)
    right = (chosen["label"] == truth["label"]).double().mean().item()
    assert right == pytest.approx(max(scores))
    assert "optimizer_states" not in content


def test_early_stopping(tmp_path, monkeypatch):
    """Some epochs behind the best one; of equal ones the last is the best."""
    scores = iter([0.4, 0.7, 0.6, 0.7, 0.5, 0.6, 0.8])
    monkeypatch.setattr(Toy, "results", lambda self, metrics: {"accuracy": next(scores)})
    history, _ = fit(tmp_path, epochs=30, patience=2)
    assert history.best == 4
    assert len(history.validation) == 6


def test_a_run_that_stopped_early_is_at_its_end(tmp_path, monkeypatch):
    """Killed before its figures were written it goes on with them, not with more epochs."""
    scores = iter([0.7, 0.6, 0.5, 0.9, 0.9])
    monkeypatch.setattr(Toy, "results", lambda self, metrics: {"accuracy": next(scores)})
    whole, model = fit(tmp_path, epochs=30, patience=2)
    again, resumed = fit(tmp_path, epochs=30, patience=2, resume=True)
    assert (again.best, again.validation, again.losses) == (whole.best, whole.validation, whole.losses)
    assert len(again.validation) == 3
    before = checkpoints.read(tmp_path / checkpoints.LAST, "toy")["state_dict"]
    for name, weight in model.state_dict().items():
        assert weight.equal(before[f"model.{name}"])
        assert weight.equal(resumed.state_dict()[name])


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "64-true"])
def test_precisions_learn_what_float32_does(tmp_path, precision):
    """Gradients clipped, in mixed precision after they were unscaled: the losses stay near float32's."""
    plain, _ = fit(tmp_path / "plain", epochs=2)
    other, model = fit(tmp_path / precision, epochs=2, precision=precision)
    assert len(other.losses) == len(plain.losses)
    assert max(abs(a - b) for a, b in zip(other.losses, plain.losses, strict=True)) < 0.05
    assert plain.losses[-1] < plain.losses[0] - 0.05, "the case says nothing: it does not learn"
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    fit(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (checkpoints.BEST, checkpoints.LAST)}

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        harness.WholeFiles().save_checkpoint({"a": 1}, tmp_path / checkpoints.LAST)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_a_loss_that_is_no_number_is_told(tmp_path, monkeypatch):
    loss = Toy.loss
    monkeypatch.setattr(Toy, "loss", lambda *arguments: (loss(*arguments)[0] * math.nan, 8))
    with pytest.raises(RecipeError, match=r"loss became nan.*--rate"):
        fit(tmp_path)
    assert not (tmp_path / checkpoints.LAST).exists()


def test_settings_name_the_recipe(tmp_path):
    assert recipe_class("toy") is Toy
    recipe = checkpoints.recipe_of("toy", settings(noise=3.0))
    assert recipe.settings.noise == 3.0
    assert runs._written(0.5) == "50.00%"
