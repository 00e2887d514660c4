"""The demo: a stopped run goes on as if it had not been, bad files do no harm, its figures are right."""

import argparse
import copy
import json
import os
import pickle
import platform
import signal
import zipfile

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from cnnrnn_ext import unfuse_
from cnnrnn_ext.demo import DemoError, cli, comparison, training
from cnnrnn_ext.recipes.data import digits

TINY = training.Recipe(epochs=2, batch=8, scans=40, validate_every=1)


def run(*options):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(option) for option in options]))


@pytest.fixture(scope="module")
def scans():
    return digits.load_scans(seed=0)


# ---- training ----


def interrupt_at(monkeypatch, step, requested):
    """Ctrl-C while step ``step`` is under way; ``requested`` collects the steps whose batch was asked for."""
    original = digits.training_batch

    def batch(scans, size, seed, number):
        requested.append(number)
        if number == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(scans, size, seed, number)

    monkeypatch.setattr(digits, "training_batch", batch)


def fit(recipe, checkpoint, state=None):
    model = training.build(recipe.seed) if state is None else state[0]
    optimizer = training.optimizer_for(model, recipe) if state is None else state[1]
    progress = training.Progress() if state is None else state[2]
    done = training.fit(recipe, training.load_scans(recipe), model, optimizer, progress, checkpoint, False)
    return done, model, progress


def test_a_stopped_run_continues_bit_by_bit(tmp_path, monkeypatch, capsys):
    _, whole, expected = fit(TINY, tmp_path / "whole.pt")
    assert expected.step == 10
    assert expected.losses[0] != expected.losses[1]

    monkeypatch.setattr(cli, "_recipe", lambda arguments: TINY)
    requested = []
    interrupt_at(monkeypatch, 3, requested)
    handler = signal.getsignal(signal.SIGINT)
    assert run("--output", tmp_path) == cli.STOPPED
    assert signal.getsignal(signal.SIGINT) is handler
    assert "after step 4" in capsys.readouterr().err

    recipe, *state = training.load(tmp_path / "checkpoint.pt")
    assert (recipe, state[2].step) == (TINY, 4)
    done, model, progress = fit(recipe, tmp_path / "checkpoint.pt", state)
    assert done
    assert requested == list(range(10))
    assert progress.losses == expected.losses
    assert progress.validation == expected.validation
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_learning_rate_rises_and_falls_to_zero():
    rates = [TINY.rate_at(step, 100) for step in range(101)]
    assert max(rates) == rates[5] == TINY.rate
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[0] > 0
    assert rates[100] == pytest.approx(0)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    model = training.build(0)
    optimizer = training.optimizer_for(model, TINY)
    training.save(path, TINY, model, optimizer, training.Progress(step=3))

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        training.save(path, TINY, model, optimizer, training.Progress(step=4))
    assert training.load(path)[3].step == 3


# ---- checkpoints that are none ----


def other_shapes(path):
    model = nn.Linear(2, 2)
    training.save(path, TINY, model, training.optimizer_for(model, TINY), training.Progress())


def damaged(path):
    model = training.build(0)
    training.save(path, TINY, model, training.optimizer_for(model, TINY), training.Progress())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncated(path):
    damaged(path)
    path.write_bytes(path.read_bytes()[:100_000])


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear reader")


BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("These are my holiday notes.\n"),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"format": training.FORMAT})),
    "other zip": other_zip,
    "other torch file": lambda path: torch.save({"weight": torch.zeros(3)}, path),
    "a function": lambda path: torch.save({"format": training.FORMAT, "recipe": os.system}, path),
    "lacks parts": lambda path: torch.save({"format": training.FORMAT}, path),
    "other shapes": other_shapes,
    "damaged": damaged,
    "truncated": truncated,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_named_and_left_alone(tmp_path, capsys, kind):
    path = tmp_path / "checkpoint.pt"
    BAD[kind](path)
    before = path.read_bytes()
    for options in ((), ("--resume",)):
        assert run("--output", tmp_path, *options) == 1
        assert str(path) in capsys.readouterr().err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_resume(tmp_path, capsys):
    assert run("--output", tmp_path, "--resume") == 1
    assert "no checkpoint" in capsys.readouterr().err


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert run("--output", tmp_path / "taken") == 1
    assert str(tmp_path / "taken") in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [("--epochs", 0), ("--seed", -1), ("--threads", "two"), ("--resume", "--fresh")]
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.NEEDED, "no_such_module_here", "the-package")
    assert run("--output", tmp_path / "new") == 1
    assert "the-package" in (message := capsys.readouterr().err)
    assert "pip install cnnrnn_ext[demo]" in message
    assert not (tmp_path / "new").exists()


# ---- the whole ----


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    assert run("--quick", "--output", output) == 0
    return output


def test_quick_run_writes_metrics(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    assert metrics["train_steps"] == 4
    assert metrics["train_seconds"] > 0
    assert metrics["step_ms_fused"] > 0
    assert metrics["step_ms_stock"] == min(v for k, v in metrics["step_ms"].items() if k in comparison.STOCK)
    assert 0 < metrics["control"]["p25"] <= metrics["control"]["median"] <= metrics["control"]["p75"]
    assert metrics["loss_curve_max_abs_diff"] < 1e-4
    assert metrics["loss_curve_steps"] == 2
    glibc = platform.libc_ver()[0] == "glibc"
    assert metrics["conditions"]["allocator"] == ("glibc, tuned" if glibc else "default")
    assert {kernel.partition(":")[0] for kernel in metrics["conditions"]["kernels"]} == {
        "conv_pool2d",
        "lstm",
    }


def test_quick_run_measures_what_a_stock_network_measures(quick):
    """The accuracies, once more from the checkpoint's weights in stock modules."""
    metrics = json.loads((quick / "metrics.json").read_text())
    recipe, model, _, progress = training.load(quick / "checkpoint.pt")
    stock = copy.deepcopy(model)
    unfuse_(stock)
    test = digits.evaluation_clips(training.load_scans(recipe)["test"], recipe.seed)
    with torch.no_grad():
        logits = stock(test.frames)
    for head, label in test.labels().items():
        right = (logits[head].argmax(1) == label).double().mean().item()
        assert metrics[f"test_accuracy_{head}"] == pytest.approx(right)
    compared = json.loads((quick / "comparison.json").read_text())
    losses = compared["losses"]
    assert losses[comparison.FUSED] == pytest.approx(
        progress.losses[:2], abs=1e-5
    )  # the training's own start
    assert compared["apart"]["ours_exact"] < 1e-12  # three steps in float64 part by rounding alone


@pytest.mark.parametrize("name", ["clips.png", "losses.png", "step_times.png"])
def test_quick_run_draws(quick, name):
    from matplotlib.image import imread

    picture = imread(quick / name)
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.05


def test_another_recipe_does_not_replace_an_unfinished_run(tmp_path, capsys):
    model = training.build(0)
    training.save(
        tmp_path / "checkpoint.pt", TINY, model, training.optimizer_for(model, TINY), training.Progress()
    )
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert run("--output", tmp_path, "--epochs", 3) == 1
    assert "epochs" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_comparison_builds_equal_networks(scans):
    models = comparison.build_all(seed=3)
    clips = digits.training_batch(scans["train"], 4, 0, 0)
    with torch.no_grad():
        logits = {name: model(clips.frames) for name, model in models.items()}
    for name in comparison.STOCK:
        for head in digits.HEADS:
            torch.testing.assert_close(logits[name][head], logits[comparison.FUSED][head])
    frames = clips.frames.flatten(0, 1)
    assert models[comparison.CHANNELS_LAST].cnn[0](frames).is_contiguous(memory_format=torch.channels_last)
    assert models[comparison.NCHW].cnn[0](frames).is_contiguous()


def test_losses_are_compared_while_stock_agrees_with_itself():
    stock = [3.0, 2.0, 1.0, 0.5]
    losses = {
        comparison.NCHW: stock,
        comparison.CHANNELS_LAST: [3.0, 2.0005, 1.1, 0.5],
        comparison.FUSED: [3.0, 1.75, 1.0, 1.0],
    }
    exact = {comparison.FUSED: [3.0, 2.0], comparison.NCHW: [3.0, 2.5]}
    apart = comparison.compare_losses(losses, exact)
    assert (apart["steps"], apart["ours"], apart["stock"]) == (2, 0.25, pytest.approx(0.0005))
    assert (apart["all_steps"], apart["ours_all"], apart["stock_all"]) == (4, 0.5, pytest.approx(0.1))
    assert (apart["exact_steps"], apart["ours_exact"]) == (2, 0.5)


def test_a_failed_comparison_is_reported(tmp_path):
    with pytest.raises(DemoError, match="exit status"):
        comparison.measure_in_fresh_process(
            TINY, comparison.Plan(), tmp_path / "no" / "place", 0, "auto", False
        )
