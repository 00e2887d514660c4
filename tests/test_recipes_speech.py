"""The speech recipe: CTC, both tasks by the command line, bad files, explanation."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
from _recipes import require, run, settings_of

from cnnrnn_ext.recipes import ctc
from cnnrnn_ext.recipes.data import spectrogram
from cnnrnn_ext.recipes.data import speech as data
from cnnrnn_ext.recipes.draws import Draws
from cnnrnn_ext.recipes.speech import Answer, Speech, Strings, Words

require(Speech)
import soundfile  # noqa: E402


@functools.cache
def loaded(task):
    """(recipe, its data): the embedded recordings of --quick, synthesised once."""
    recipe = Speech(settings_of(Speech, task=task))
    return recipe, recipe.load()


def collapse(path):
    return [label for label, _ in itertools.groupby(path) if label != ctc.BLANK]


# ---- CTC ----


def test_ctc_loss_is_the_sum_over_all_paths():
    steps, classes, labels = 4, 3, [1, 2]
    logits = torch.randn(1, steps, classes, dtype=torch.float64)
    probabilities = logits.softmax(-1)[0]
    total = sum(
        math.prod(probabilities[t, label].item() for t, label in enumerate(path))
        for path in itertools.product(range(classes), repeat=steps)
        if collapse(path) == labels
    )
    loss = ctc.loss(logits, torch.tensor([steps]), torch.tensor([labels]), torch.tensor([2]))
    assert loss.item() == pytest.approx(-math.log(total) / 2, rel=1e-6)


def test_ctc_loss_reads_neither_padded_steps_nor_padded_labels():
    logits = torch.randn(2, 9, 5)
    lengths, counts = torch.tensor([9, 5]), torch.tensor([3, 2])
    labels = torch.tensor([[1, 2, 2], [4, 3, 0]])
    both = ctc.loss(logits, lengths, labels, counts)
    alone = ctc.loss(logits[1:, :5], lengths[1:], labels[1:, :2], counts[1:])
    first = ctc.loss(logits[:1], lengths[:1], labels[:1], counts[:1])
    torch.testing.assert_close(both, first + alone)


def test_greedy_decoding_merges_runs_and_drops_blanks():
    rows = [[0, 3, 3, 0, 3, 1, 1], [2, 2, 0, 0, 2, 4, 4]]
    logits = torch.full((2, 7, 5), -5.0)
    for row, steps in enumerate(rows):
        for step, label in enumerate(steps):
            logits[row, step, label] = 5.0 + 0.1 * step
    first, second = ctc.greedy(logits, torch.tensor([7, 4]))
    assert (first.labels, first.steps) == ([3, 3, 1], [1, 4, 5])
    assert (second.labels, second.steps) == ([2], [0])  # the rest lies behind the row's end
    assert first.probabilities[2] == logits[0, 6].softmax(0).max().item()
    assert ctc.greedy(torch.zeros(1, 3, 2), torch.tensor([0]))[0].labels == []


def test_the_likeliest_label_is_no_blank_and_within_the_row():
    logits = torch.full((2, 3, 4), -5.0)
    logits[:, :, 0] = 9.0  # the blank, everywhere
    logits[0, 1, 2], logits[0, 2, 3] = 1.0, 4.0
    logits[1, 0, 1], logits[1, 2, 3] = 2.0, 5.0  # the latter behind the row's end
    first, second = ctc.likeliest(logits, torch.tensor([3, 2]))
    assert (first.labels, first.steps) == ([3], [2])
    assert (second.labels, second.steps) == ([1], [0])
    assert first.probabilities == pytest.approx([logits[0, 2].softmax(0)[3].item()])


def test_steps_needed():
    assert ctc.steps_needed([1, 1, 2, 2, 2]) == 5 + 3
    assert ctc.steps_needed([]) == 0


# ---- the two tasks ----


def test_the_task_follows_from_option_or_data():
    assert type(Speech(settings_of(Speech))) is Words
    assert type(Speech(settings_of(Speech, data="/x/all.tsv"))) is Strings
    assert type(Speech(settings_of(Speech, data="/x/folder"))) is Words
    assert type(Speech(settings_of(Speech, task="strings", data="/x/folder"))) is Strings


@pytest.mark.parametrize("task", ["words", "strings"])
def test_a_row_does_not_depend_on_its_batch(task):
    recipe, found = loaded(task)
    split = found.splits["test"]
    for draws in (None, True):
        many = recipe.batch(split, [4, 7, 9], draws and Draws(0, 1, [4, 7, 9]))
        alone = recipe.batch(split, [7], draws and Draws(0, 1, [7]))
        length = int(alone.inputs[1][0])
        assert many.inputs[1][1] == length
        torch.testing.assert_close(many.inputs[0][1, :length], alone.inputs[0][0], atol=0, rtol=0)
        assert not many.inputs[0][1, length:].any()


def test_evaluation_hears_noise_unless_told_not_to():
    recipe, found = loaded("words")
    split = found.splits["test"]
    (wave,) = split.sounds([3])
    plain = spectrogram.log_mel(wave)
    assert not torch.allclose(recipe.batch(split, [3]).inputs[0][0], plain, atol=0.1)
    quiet = data.Recordings(split.waves, split.words, split.voices, split.files)
    torch.testing.assert_close(recipe.batch(quiet, [3]).inputs[0][0], plain)


def test_error_rates_are_counted_in_words():
    recipe = Speech(settings_of(Speech, task="strings"))
    recipe.build({"symbols": ["one", "two", "three"]})
    metrics = recipe.metrics({})
    logits = torch.full((2, 4, 4), -9.0)
    for row, path in enumerate([[1, 0, 2, 2], [3, 0, 3, 0]]):  # "one two", "three three"
        for step, label in enumerate(path):
            logits[row, step, label] = 9.0
    labels = {"labels": torch.tensor([[1, 2, 0], [3, 2, 3]]), "counts": torch.tensor([2, 3])}
    recipe.update(metrics, None, (logits, torch.tensor([4, 4])), recipe_batch(labels))
    found = recipe.results(metrics)
    assert found["wer"] == pytest.approx(1 / 5)  # one word is missing of five
    assert found["word_accuracy"] == pytest.approx(4 / 5)
    assert found["whole_strings"] == pytest.approx(1 / 2)


def recipe_batch(targets):
    from cnnrnn_ext.recipes.base import Batch

    return Batch((), targets)


def test_where_nothing_is_heard_what_came_nearest_is_explained(tmp_path, monkeypatch):
    from cnnrnn_ext.recipes import drawing_speech

    drawn = []
    monkeypatch.setattr(drawing_speech, "explanation", lambda *args: drawn.append(args))
    recipe, found = loaded("strings")
    model = recipe.build(found.facts).eval()
    with torch.no_grad():
        model.heads.bias[0] = 20.0  # the blank, always
    split = found.splits["test"]
    (said,) = recipe.predict(model, recipe.batch(split, [0]), found.facts)
    assert (said["text"], said["units"]) == ("", [])
    (nearest,) = said["nearest"]
    assert nearest["probability"] < 0.1
    place = [(nearest["step"], found.facts["symbols"].index(nearest["unit"]) + 1)]
    assert recipe.places(said, found.facts) == place
    told = recipe.explain(tmp_path / "a.png", model, split, 0, "sample", found.facts)
    assert "nothing" in told
    ((*_, relevance, marks, _),) = drawn
    assert relevance.abs().max() > 0
    assert marks[0][1].startswith(f"{nearest['unit']}?")


def test_the_explained_number_is_the_logit_of_the_answer():
    recipe, found = loaded("words")
    model = recipe.build(found.facts).eval()
    batch = recipe.batch(found.splits["test"], [0])
    (said,) = recipe.predict(model, batch, found.facts)
    value = Answer(model, recipe.places(said, found.facts))(*batch.inputs)
    torch.testing.assert_close(value, model(*batch.inputs).max(1, keepdim=True).values)


# ---- the command line ----


def spoken(folder, count=8, words=("one", "six", "two")):
    """A folder for each word of built-in speech, as a user would have it."""
    speaker = data.engine("builtin")
    for word in words:
        for number in range(count):
            voice = speaker.voices["train"][number]
            wave = speaker.say((word,), voice, np.random.default_rng(number))
            path = folder / word / f"{voice}_{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave, speaker.sample_rate)
    return folder


def test_words_from_training_to_explanation(tmp_path, capsys):
    """A short training learns; what it wrote is used by the other commands."""
    out = tmp_path / "out"
    options = ["--quick", "--epochs", "4", "--output", str(out), "--threads", "1"]
    assert run("train", "speech", *options) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.3  # guessing: 0.1
    assert "spoken digits, synthetic, by" in metrics["data"]["source"]
    assert {path.name for path in out.glob("*.png")} == {"training.png", "confusion.png", "examples.png"}

    folder = spoken(tmp_path / "mine", count=1)
    files = [str(path) for path in sorted(folder.rglob("*.wav"))]
    capsys.readouterr()
    assert run("predict", "speech", *files, "--output", str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in said] == files
    assert all(sum(row["label"]["probabilities"].values()) == pytest.approx(1) for row in said)

    assert run("explain", "speech", files[0], "--output", str(out)) == 0
    assert (out / "explanation.png").stat().st_size > 20000

    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    two = ["predict", "speech", files[0], str(broken), "--output", str(out)]
    assert run(*two) == 1
    assert "broken.wav: cannot be read" in capsys.readouterr().err
    assert run("predict", "speech", files[0], str(broken), "--output", str(out), "--bad-files", "skip") == 0
    assert capsys.readouterr().out.count("\n") == 1

    assert run("evaluate", "speech", "--data", str(folder), "--output", str(out)) == 0
    assert json.loads((out / "evaluation.json").read_text())["samples"] == 3


def test_strings_of_the_users_own(tmp_path, capsys):
    """Transcripts in a table: words that the model cannot know or say in time are bad files."""
    folder = spoken(tmp_path, count=12)
    lines = [
        f"{path.relative_to(tmp_path)}\t{path.parent.name}\t{path.stem.split('_')[0]}"
        for path in sorted(folder.rglob("*.wav"))
    ]
    one, *others = lines
    one = one.split("\t")[0]
    table = tmp_path / "all.tsv"
    table.write_text("\n".join([*others, f"{one}\t" + "one " * 50]), encoding="utf-8")
    out = tmp_path / "out"
    command = ["train", "speech", "--quick", "--data", str(table), "--output", str(out), "--threads", "1"]
    assert run(*command) == 1
    assert "too short for its transcript" in capsys.readouterr().err
    assert not (out / "last.ckpt").exists()
    assert run(*command, "--bad-files", "skip", "--units", "characters", "--epochs", "1") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["data"]["skipped"]) == 1
    assert metrics["test"]["word_accuracy"] == pytest.approx(1 - metrics["test"]["wer"])
    other = tmp_path / "other.tsv"
    other.write_text(f"{one}\tzzz\n{others[0]}\n", encoding="utf-8")
    assert run("evaluate", "speech", "--data", str(other), "--output", str(out)) == 1
    assert "the model does not know 'z'" in capsys.readouterr().err


def test_wrong_kinds_of_data_are_told(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    output = ["--output", str(tmp_path / "out"), "--quick"]
    assert run("train", "speech", "--data", str(tmp_path / "none"), *output) == 1
    assert "expected a folder for each word (or a table" in capsys.readouterr().err
    assert run("train", "speech", "--task", "strings", "--data", str(tmp_path), *output) == 1
    assert "expected a table of recordings and transcripts" in capsys.readouterr().err
    assert run("train", "speech", "--data", str(tmp_path), "--bad-files", "skip", *output) == 1
    told = capsys.readouterr().err
    assert "one: an empty folder" in told
    assert "no recordings that can be used" in told
    write_one = spoken(tmp_path / "single", 3, ("one",))
    assert run("train", "speech", "--data", str(write_one), *output) == 1
    assert "recordings of two words at least" in capsys.readouterr().err
    wrong = ["train", "speech", "--data", str(spoken(tmp_path / "w", 3)), "--speaker", "no-group", *output]
    assert run(*wrong) == 1
    assert "--speaker: expected a regular expression with a group" in capsys.readouterr().err
