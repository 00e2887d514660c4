"""The multimodal recipe: that what is seen and heard belong together, missing parts, the command line."""

import functools
import json

import numpy as np
import pytest
import torch
from _recipes import require, run, settings_of

from cnnrnn_ext.recipes.data import multimodal as data
from cnnrnn_ext.recipes.data import speech
from cnnrnn_ext.recipes.draws import Draws
from cnnrnn_ext.recipes.multimodal import Multimodal

require(Multimodal)
import soundfile  # noqa: E402


@functools.cache
def loaded():
    recipe = Multimodal(settings_of(Multimodal))
    return recipe, recipe.load()


def test_what_is_heard_is_the_digit_that_is_seen(monkeypatch):
    """Every row's recording says the row's digit, in training and in evaluation."""
    _, found = loaded()
    split, heard = found.splits["train"], []
    sounds = speech.Recordings.sounds
    monkeypatch.setattr(
        speech.Recordings, "sounds", lambda self, rows: heard.extend(rows) or sounds(self, rows)
    )
    rows = list(range(0, len(split), 7))
    for draws in (None, Draws(0, 3, rows)):
        heard.clear()
        digit = split.sample(rows, draws)[2]
        assert torch.equal(digit, split.video.scans.digit[torch.tensor(rows) // split.video.repeats])
        assert [split.audio.words[row] for row in heard] == [(speech.DIGITS[d],) for d in digit.tolist()]


@pytest.mark.parametrize("training", [False, True])
def test_a_row_does_not_depend_on_its_batch(training):
    _, found = loaded()
    split, rows = found.splits["train"], [3, 8, 20, 33]
    many, here, _ = split.sample(rows, Draws(0, 1, rows) if training else None)
    assert all(len(set(many[name][1].tolist())) > 1 for name in data.MODALITIES)
    for place, row in enumerate(rows):
        alone, there, _ = split.sample([row], Draws(0, 1, [row]) if training else None)
        for name in data.MODALITIES:
            length = int(alone[name][1][0])
            assert many[name][1][place] == length
            torch.testing.assert_close(many[name][0][place, :length], alone[name][0][0], atol=0, rtol=0)
            assert here[name][place] == there[name][0]


def test_half_of_the_rows_lack_one_of_the_two_and_none_both():
    _, found = loaded()
    rows = list(range(4000))
    missing = Draws(0, data.EVALUATION, rows).uniform(4)[:, 0]
    present = found.splits["test"]._presence(missing)
    video, audio = present["video"], present["audio"]
    assert (video & audio).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (~video).float().mean() == pytest.approx(0.25, abs=0.03)
    assert (video | audio).all()


def test_noise_is_as_strong_as_said():
    frames, lengths = torch.zeros(2, 6, 1, 28, 28), torch.tensor([6, 4])
    noisy = data._under_static(frames, lengths, torch.tensor([0.0, 1.0]), torch.tensor([0.2, 0.9]))
    assert noisy[0].std() == pytest.approx(data.VIDEO_NOISE[0], rel=0.05)
    assert noisy[1, :4].std() == pytest.approx(data.VIDEO_NOISE[1], rel=0.05)
    assert not noisy[1, 4:].any()


def test_scans_and_voices_of_the_splits_are_disjoint():
    _, found = loaded()
    for part in (lambda s: s.video.scans.index.tolist(), lambda s: s.audio.voices):
        train, validation, test = (set(part(found.splits[name])) for name in ("train", "validation", "test"))
        assert not train & test
        assert not train & validation
        assert not validation & test


def test_what_is_missing_is_not_read():
    recipe, found = loaded()
    model = recipe.build(found.facts).eval()
    inputs, _, _ = found.splits["test"].sample([0, 1, 2])
    present = {"video": torch.tensor([True, True, False]), "audio": torch.tensor([True, False, True])}
    with torch.no_grad():
        before = model(inputs, present)
        inputs["audio"][0][1] = torch.nan
        inputs["video"][0][2] = torch.nan
        after = model(inputs, present)
    assert before.isfinite().all()
    torch.testing.assert_close(before, after, atol=0, rtol=0)


def test_one_branch_alone_sees_the_same_rows():
    """--only: the same clips with the same noise, of which every row has what the branch needs."""
    both, found = loaded()
    only = Multimodal(settings_of(Multimodal, only="video"))
    split = only.load().splits["test"]
    one, all_ = only.batch(split, [5, 9]), both.batch(found.splits["test"], [5, 9])
    assert set(one.inputs[0]) == set(one.inputs[1]) == {"video"}
    assert one.inputs[1]["video"].all()
    torch.testing.assert_close(one.inputs[0]["video"][0], all_.inputs[0]["video"][0], atol=0, rtol=0)
    assert list(only.build(found.facts).branches) == ["video"]


def test_from_training_to_explanation(tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "out"
    output = ["--output", str(out)]
    assert run("train", "multimodal", "--quick", "--epochs", "1", "--threads", "1", *output) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["figures"]) == {"both", "video_only", "audio_only"}
    assert all(0 <= value <= 1 for value in metrics["figures"].values())
    assert {path.name for path in out.glob("*.png")} == {"training.png", "confusion.png", "examples.png"}

    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(4):
        picture = np.zeros((40, 40), np.uint8)
        picture[10:30, 5 + 5 * number : 10 + 5 * number] = 255
        Image.fromarray(picture).save(clip / f"{number}.png")
    sound = tmp_path / "one.wav"
    soundfile.write(sound, 0.3 * np.sin(np.arange(8000) * 0.2), 16000)
    capsys.readouterr()
    answers = []
    for given in (["--video", clip], ["--audio", sound], ["--video", clip, "--audio", sound]):
        assert run("predict", "multimodal", *map(str, given), *output, "--json") == 0
        (said,) = json.loads(capsys.readouterr().out)
        answers.append(said["label"]["probabilities"])
    assert answers[2] not in answers[:2]  # both count
    pair = ["--video", str(clip), "--audio", str(sound)]
    assert run("predict", "multimodal", *pair, str(sound), *output) == 1
    assert "as many of one as of the other" in capsys.readouterr().err
    assert run("explain", "multimodal", *pair, *output) == 0
    assert "shares in the answer: video" in capsys.readouterr().out
    assert (out / "explanation.png").stat().st_size > 20000
