"""The recipes' command line: what it writes and prints, what it goes on with, how mistakes are told."""

import json
import os
import signal
import zipfile

import pytest
import torch
from _recipes import run
from _toy_recipe import Toy, fit, stop_after, toy

from cnnrnn_ext import _files, _timing
from cnnrnn_ext.recipes import checkpoints, cli, comparison, runs
from cnnrnn_ext.recipes.options import STOPPED

pytestmark = pytest.mark.usefixtures("toy_recipe", "interrupts")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    assert run("train", "toy", "--output", tmp_path, "--epochs", 2, "--quick") == 0
    return tmp_path


def test_train_writes_what_it_measured(trained, capsys):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["train_steps"] == 10
    assert metrics["train_seconds"] > 0
    assert metrics["step_ms"] > 0
    assert len(metrics["validation"]) == len(metrics["epoch_losses"]) == 2
    assert metrics["settings"]["noise"] == 1.0
    assert metrics["conditions"]["torch"] == torch.__version__
    assert metrics["conditions"]["backend"] == "auto"
    assert metrics["conditions"]["modules"] == "ours"
    assert {kernel.partition(":")[0] for kernel in metrics["conditions"]["kernels"]} == {"lstm"}
    counts = torch.tensor(metrics["test"]["confusion_label"])
    assert counts.sum() == metrics["test_samples"] == 12
    assert metrics["test"]["accuracy"] == pytest.approx(counts.diagonal().sum().item() / 12)
    assert sorted(path.name for path in trained.iterdir()) == [
        "best.ckpt", "confusion.png", "last.ckpt", "metrics.json", "training.png",
    ]  # fmt: skip


def clock(monkeypatch, milliseconds):
    """Every contender is run once, and takes the milliseconds (of two rounds) that ``milliseconds`` says."""

    def paired(steps, rounds, control, **options):
        for step in steps.values():
            step()
        times = {name: milliseconds[name] for name in (*steps, _timing.CONTROL)}
        return _timing.Timings({name: [ms / 1e3 for ms in pair] for name, pair in times.items()}, control)

    monkeypatch.setattr(_timing, "paired", paired)


def test_comparison_times_equal_models_and_names_their_kernels(compiled, monkeypatch):
    times = {"cnnrnn_ext": (2, 4), "stock": (8, 12), "reference": (6, 16), "control": (8, 12.6)}
    clock(monkeypatch, times)
    recipe = toy(quick=True)
    data = recipe.load()
    models = comparison.contenders(recipe, data.facts)
    assert isinstance(models["stock"].rnn, torch.nn.LSTM)
    assert not isinstance(models["cnnrnn_ext"].rnn, torch.nn.LSTM)
    batch = recipe.batch(data.splits["train"], list(range(8)))
    outputs = {name: model.eval()(*batch.inputs) for name, model in models.items()}
    for name in ("stock", "reference"):
        torch.testing.assert_close(outputs[name], outputs["cnnrnn_ext"], atol=1e-6, rtol=0)
    compared = comparison.measure(recipe, data.facts, batch)
    assert set(compared["step_ms"]) == {"cnnrnn_ext", "stock", "reference"}
    assert compared["ratios"].keys() == {"stock", "reference"}
    assert compared["step_ms"] == pytest.approx({"cnnrnn_ext": 3, "stock": 10, "reference": 11})
    medians = {name: ratio["median"] for name, ratio in compared["ratios"].items()}
    assert medians == pytest.approx({"stock": 3.5, "reference": 3.5})  # of 8/2, 12/4 and of 6/2, 16/4
    assert compared["control"]["median"] == pytest.approx(1.025)
    assert compared["valid"]
    (kernel,) = compared["conditions"]["kernels"]
    assert kernel.startswith("lstm: ")
    assert "plain torch" not in kernel
    rows = list(comparison.rows({**compared, "valid": False}))
    assert rows[-1][2].startswith("VOID")


def test_a_comparison_alone_trains_nothing_and_leaves_a_run_as_it_is(trained, monkeypatch, capsys):
    def in_this_process(module, *arguments):  # another one would not know the toy
        monkeypatch.setattr("sys.argv", [module, *map(str, arguments)])
        comparison.main()
        return 0

    monkeypatch.setattr(comparison._timing, "run_tuned", in_this_process)
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    Toy.seen.clear()
    capsys.readouterr()
    assert run("train", "toy", "--output", trained, "--epochs", 2, "--quick", "--compare-only") == 0
    assert len(Toy.seen) == 1
    compared = json.loads((trained / "comparison.json").read_text())
    assert set(compared["step_ms"]) == {"cnnrnn_ext", "stock", "reference"}
    told = capsys.readouterr().out
    assert "step, stock" in told
    assert "× ours" in told
    (trained / "comparison.json").unlink()
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_pictures_show_something(trained):
    from matplotlib.image import imread

    for name in ("training.png", "confusion.png"):
        picture = imread(trained / name)
        assert min(picture.shape[:2]) > 400
        assert picture[..., :3].std() > 0.03


def test_epochs_are_whole_numbers(tmp_path, monkeypatch):
    from cnnrnn_ext.recipes import drawing
    from cnnrnn_ext.recipes.harness import History

    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    for epochs in (2, 18):
        history = History([2.0, 1.0] * epochs, [{"accuracy": e / epochs} for e in range(epochs)])
        drawing.curve(tmp_path / "a.png", history, "accuracy", "title")
        for axes in drawn.pop().axes:
            ticks = axes.get_xticks()
            assert len(ticks) > 1
            assert all(tick == int(tick) for tick in ticks)


def test_a_long_title_ends_within_the_page():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from cnnrnn_ext.recipes import drawing

    with drawing.styled():
        figure = drawing.page(6.0, 3.0, "the same words again " * 9, "below")
        title = figure.texts[0]
        assert title.get_text().endswith("…")
        assert title.get_window_extent(FigureCanvasAgg(figure).get_renderer()).x1 < figure.bbox.x1


def test_parts_of_a_split_are_a_table(capsys):
    runs._print_grids(
        {
            "copy": {"accuracy": 0.5},
            "by_language": {"de": {"pairs": 12, "exact_match": 0.25}, "fr": {"pairs": 3, "exact_match": 1.0}},
        }
    )
    assert capsys.readouterr().out.splitlines() == [
        "",
        "by language  pairs  exact match",
        "de              12       25.00%",
        "fr               3      100.00%",
    ]
    assert list(runs._flat({"without_noise": {"word_accuracy": 0.5}, "by_kind": {"a": {"n": 1}}})) == [
        ("without noise, word accuracy", 0.5)
    ]


def test_evaluate_measures_what_a_stock_model_measures(trained, capsys):
    metrics = json.loads((trained / "metrics.json").read_text())
    for options in ((), ("--modules", "stock"), ("--backend", "reference")):
        assert run("evaluate", "toy", "--output", trained, *options) == 0
        found = json.loads((trained / "evaluation.json").read_text())
        assert found["accuracy"] == metrics["test"]["accuracy"]
        assert found["samples"] == 12
    recipe, _, model, _ = checkpoints.restore(trained / "best.ckpt", "toy", modules="stock")
    assert type(model.rnn).__module__.partition(".")[0] == "torch" or isinstance(model.rnn, torch.nn.LSTM)
    right = 0
    for row in recipe.load().splits["test"]:
        right += (model(recipe.batch(range(99), [row]).inputs[0]).argmax(1) == row % 2).item()
    assert right / 12 == pytest.approx(metrics["test"]["accuracy"])


def test_predict_prints_lines_or_json(trained, capsys):
    capsys.readouterr()
    assert run("predict", "toy", 3, 4, "--output", trained) == 0
    assert capsys.readouterr().out.startswith("number 3: ")
    assert run("predict", "toy", 3, 4, "--output", trained, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == ["number 3", "number 4"]
    for entry in found:
        assert sum(entry["label"]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert entry["label"]["probability"] == max(entry["label"]["probabilities"].values())
    assert run("predict", "toy", "--output", trained) == 1
    assert "nothing to predict" in capsys.readouterr().err


def test_explain_takes_an_input_or_a_test_sample(trained, capsys):
    capsys.readouterr()
    assert run("explain", "toy", 7, "--output", trained) == 0
    assert capsys.readouterr().out.startswith("number 7: why")
    assert (trained / "explanation.png").read_bytes() == b"a picture"
    assert (
        run("explain", "toy", "--output", trained, "--sample", 2, "--picture", trained / "a" / "b.png") == 0
    )
    assert "test sample 2: why" in capsys.readouterr().out
    assert (trained / "a" / "b.png").exists()
    assert run("explain", "toy", "--output", trained, "--sample", 12) == 1
    assert "12 samples" in capsys.readouterr().err


def test_a_finished_run_starts_anew_and_an_unfinished_one_goes_on(trained, monkeypatch, capsys):
    options = ("train", "toy", "--output", trained, "--epochs", 2, "--quick")
    assert run(*options) == 0
    assert len(Toy.seen) > 10  # it trained again
    (trained / "metrics.json").unlink()
    Toy.seen.clear()
    assert run(*options) == 0
    assert "from epoch 3" in capsys.readouterr().out
    assert not Toy.seen  # nothing was left to do but to evaluate
    assert (trained / "metrics.json").exists()


def test_another_run_does_not_replace_an_unfinished_one(trained, capsys):
    (trained / "metrics.json").unlink()
    before = (trained / "last.ckpt").read_bytes()
    assert run("train", "toy", "--output", trained, "--epochs", 2, "--quick", "--noise", 2) == 1
    assert "another noise" in capsys.readouterr().err
    assert (trained / "last.ckpt").read_bytes() == before
    assert run("train", "toy", "--output", trained, "--epochs", 2, "--quick", "--noise", 2, "--fresh") == 0


def test_ctrl_c_is_told_and_leaves_the_last_epoch(tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert run("train", "toy", "--output", tmp_path, "--batch-size", 8) == STOPPED
    assert "goes on" in capsys.readouterr().err
    content = checkpoints.read(tmp_path / "last.ckpt", "toy")
    assert len(content["run"]["history"]["losses"]) == 5
    assert not (tmp_path / "metrics.json").exists()


# ---- errors ----


def _damaged(path):
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        stored = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
    content[content.index(stored) + 10] ^= 1
    path.write_bytes(content)


def _other(path):
    content = _files.read_torch(path)
    content["state_dict"] = {name: value[:1] for name, value in content["state_dict"].items()}
    torch.save(content, path)


BAD = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("These are my holiday notes.\n"),
    "damaged": _damaged,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "code": lambda path: torch.save({"run": os.system}, path),
    "another file of torch": lambda path: torch.save({"weight": torch.zeros(3)}, path),
    "other shapes": _other,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_named_and_left_alone(tmp_path, capsys, kind):
    fit(tmp_path, epochs=1)
    for name in (checkpoints.BEST, checkpoints.LAST):
        BAD[kind](tmp_path / name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trains = (("train", "toy", "--epochs", 1), ("train", "toy", "--epochs", 1, "--resume"))
    for command_line in (("predict", "toy", 1), ("evaluate", "toy"), ("explain", "toy"), *trains):
        assert run(*command_line, "--output", tmp_path) == 1
        assert str(tmp_path) in (told := capsys.readouterr().err)
        assert "ckpt" in told
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_another_recipe_is_told(tmp_path, capsys):
    fit(tmp_path, epochs=1)
    content = _files.read_torch(tmp_path / "best.ckpt")
    content["run"]["name"] = "video"
    torch.save(content, tmp_path / "best.ckpt")
    assert run("predict", "toy", 1, "--output", tmp_path) == 1
    assert "of the recipe video, not of toy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--epochs", 0), "--epochs"),
        (("--seed", -1), "--seed"),
        (("--rate", "inf"), "--rate"),
        (("--modules", "theirs"), "--modules"),
        (("--resume", "--fresh"), "--resume"),
    ],
)
def test_bad_options(tmp_path, capsys, options, told):
    with pytest.raises(SystemExit) as stop:
        run("train", "toy", "--output", tmp_path, *options)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_user_errors_are_lines_not_tracebacks(tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("")
    for options, told in (
        (("train", "toy", "--output", tmp_path / "taken"), "cannot be made a folder"),
        (("train", "toy", "--output", tmp_path, "--resume"), "no checkpoint to resume"),
        (("train", "toy", "--output", tmp_path, "--data", "x"), "no use for --data"),
        (("predict", "toy", 1, "--output", tmp_path), "train first"),
    ):
        assert run(*options) == 1
        assert told in capsys.readouterr().err
    monkeypatch.setitem(cli.NEEDED, "no_such_module_here", "the-package")
    assert run("train", "toy", "--output", tmp_path / "new") == 1
    assert "the-package" in (message := capsys.readouterr().err)
    assert "pip install cnnrnn_ext[recipes]" in message
    assert not (tmp_path / "new").exists()


def test_help_imports_no_recipe_and_no_lightning(capsys):
    import subprocess
    import sys

    code = (
        "import sys, contextlib, io, cnnrnn_ext.__main__ as m\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    m.main(['train', '--help'])\n"
        "heavy = ('lightning', 'sklearn', 'matplotlib', 'torchmetrics')\n"
        "print([n for n in sys.modules if n.split('.')[0] in heavy or n == 'cnnrnn_ext.recipes.video'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
