"""The video recipe: what its clips promise, the user's own clips, good ones and bad ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _recipes import require, run

from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.data import clips, digits, moving_digits
from cnnrnn_ext.recipes.draws import Draws
from cnnrnn_ext.recipes.video import Video, _examples

require(Video)
import av  # noqa: E402

# ---- the embedded clips ----


@pytest.fixture(scope="module")
def splits():
    return moving_digits.load(0)


def test_no_scan_is_in_two_splits(splits):
    rows = [set(split.scans.index.tolist()) for split in splits.values()]
    assert sum(map(len, rows)) == len(set().union(*rows)) == 1797
    assert len(splits["test"]) == 6 * len(splits["test"].scans)


def test_evaluation_shows_every_test_scan_in_every_motion(splits):
    count = len(moving_digits.MOTIONS)
    _, _, labels = splits["test"].clips(range(5 * count))
    for scan in range(5):
        part = slice(count * scan, count * (scan + 1))
        assert sorted(labels["motion"][part].tolist()) == list(range(count))
        assert set(labels["digit"][part].tolist()) == {splits["test"].scans.digit[scan].item()}


def test_a_clip_depends_on_seed_epoch_and_row_alone(splits):
    train = splits["train"]
    together = train.clips([3, 700, 41], Draws(0, 2, [3, 700, 41]))
    alone = train.clips([700], Draws(0, 2, [700]))
    steps = int(alone[1])
    assert torch.equal(together[0][1, :steps], alone[0][0])
    assert together[1][1] == steps
    assert together[2]["motion"][1] == alone[2]["motion"][0]
    assert not torch.equal(train.clips([700], Draws(0, 3, [700]))[0][:, :8], alone[0][:, :8])


def test_lengths_vary_and_nothing_is_behind_an_end(splits):
    frames, lengths, _ = splits["test"].clips(range(100))
    assert set(lengths.tolist()) == set(range(moving_digits.SHORTEST, moving_digits.LONGEST + 1))
    behind = torch.arange(frames.shape[1]) >= lengths[:, None]
    assert frames[behind].abs().max() == 0
    assert frames[~behind].amax((1, 2, 3)).min() > 0.3
    assert frames.min() >= 0
    assert frames.max() <= 1


def test_digits_move_as_labelled(splits):
    motion = torch.arange(6).repeat(50)
    path = moving_digits._path(motion, Draws(0, 0, range(300)))
    step = path.diff(dim=1)
    signs = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
    for name, (dy, dx) in signs.items():
        found = step[motion == moving_digits.MOTIONS.index(name)].sign()
        assert (found == torch.tensor([dy, dx])).all(), name
    for name, axis in (("swinging", 1), ("bobbing", 0)):
        found = step[motion == moving_digits.MOTIONS.index(name)]
        assert (found[:, :, 1 - axis] == 0).all()
        both = found[:, : moving_digits.SHORTEST - 1, axis].sign()
        assert ((both == 1).any(1) & (both == -1).any(1)).all(), name  # in the shortest clip too


def test_no_single_frame_tells_the_motion(splits):
    """A decision tree on where the light is guesses, however it is trained."""
    from sklearn.tree import DecisionTreeClassifier

    rows = list(range(2400))
    frames, _, labels = splits["train"].clips(rows, Draws(7, 0, rows))
    place = torch.arange(28.0)
    for step in (0, 5, 9):
        frame = frames[:, step, 0] * (frames[:, step, 0] > 0.3)
        mass = frame.sum((1, 2))
        centre = torch.stack([frame.sum(2) @ place / mass, frame.sum(1) @ place / mass], 1)
        tree = DecisionTreeClassifier(max_depth=6, random_state=0).fit(centre[:1200], labels["motion"][:1200])
        score = tree.score(centre[1200:], labels["motion"][1200:])
        assert abs(score - 1 / 6) < 4 * (5 / 36 / 1200) ** 0.5


def test_placing_a_square_where_it_belongs():
    square = torch.ones(1, 4, 4)
    frame = digits.place(square, torch.tensor([[[10, 20]]]))[0, 0, 0]
    assert frame.sum() == 4
    assert frame[5:7, 10:12].all()


# ---- the user's own ----


def pictures(number, up):
    """Eight frames of a square that moves up or down over grey, differently for each number."""
    for step in range(8):
        frame = torch.full((32, 32, 3), 60 + 3 * number, dtype=torch.uint8)
        y = 22 - 2 * step if up else 2 + 2 * step
        frame[y : y + 8, 6 + number : 16 + number] = torch.tensor([250, 200, 30], dtype=torch.uint8)
        yield av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")


def write_video(path, frames):
    codec, form = ("gif", "rgb8") if path.suffix == ".gif" else ("mpeg4", "yuv420p")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = form
        for frame in frames:
            file.mux(stream.encode(frame.reformat(format=form)))
        file.mux(stream.encode())


def write_folder(path, frames):
    path.mkdir()
    for number, frame in enumerate(frames, 1):
        frame.to_image().save(path / f"frame{number}.png")


def make_set(root, clips_per_class=6):
    for label, up in (("rising", True), ("sinking", False)):
        (root / label).mkdir(parents=True)
        for number in range(clips_per_class):
            write_video(
                root / label / f"clip{number}.{'gif' if number == 1 else 'mp4'}", pictures(number, up)
            )
        write_folder(root / label / "frames", pictures(clips_per_class, up))
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture
def copy(own, tmp_path):
    return Path(shutil.copytree(own, tmp_path / "data"))


def load(root, bad_files="refuse", facts=None, **changes):
    settings = SimpleNamespace(
        data=str(root), seed=0, bad_files=bad_files, gray=False, frame_size=16, frames=16, **changes
    )
    return clips.load(root, settings, facts)


@pytest.mark.parametrize("form", ["mp4", "gif", "folder"])
def test_a_clip_is_read_upright_in_order_and_in_colour(tmp_path, form):
    path = tmp_path / ("clip" if form == "folder" else f"clip.{form}")
    (write_folder if form == "folder" else write_video)(path, pictures(0, up=True))
    frames = clips.read_clip(path, 16, 32, 3)
    assert frames.shape == (8, 3, 32, 32)
    expected = torch.stack([torch.from_numpy(f.to_ndarray()).permute(2, 0, 1) for f in pictures(0, up=True)])
    worst = {"folder": 0, "gif": 70, "mp4": 45}[form]  # the formats lose colours, not places
    assert (frames.int() - expected.int()).abs().float().flatten(1).quantile(0.97) <= worst
    assert (frames[0, 0, 22:30, 6:16] > 180).all()
    assert (frames[7, 0, 8:16, 6:16] > 180).all()
    small = clips.read_clip(path, 3, 16, 1)
    assert small.shape == (3, 1, 16, 16)
    assert (small[0, 0, 12:14, 4:7] > 130).all()  # the first frame and
    assert (small[2, 0, 5:7, 4:7] > 130).all()  # the last are among the chosen


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    write_folder(tmp_path / "clip", (frame for number in range(2) for frame in pictures(number, up=True)))
    frames = clips.read_clip(tmp_path / "clip", 16, 32, 1)  # frame10 is the tenth, not the second
    assert len(frames) == 16
    assert frames[8, 0, 0, 0] == frames[15, 0, 0, 0] != frames[0, 0, 0, 0]


def test_own_clips_are_split_and_normalised(own):
    data = load(own)
    assert data.facts["classes"] == {"label": ["rising", "sinking"]}
    assert data.report["clips"] == {"rising": 7, "sinking": 7}
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 10,
        "validation": 2,
        "test": 2,
    }
    names = [name for split in data.splits.values() for name in split.names]
    assert len(set(names)) == 14
    frames, lengths, labels = data.splits["train"].clips(range(10))
    assert lengths.tolist() == [8] * 10
    for row, name in enumerate(data.splits["train"].names):
        assert (labels["label"][row] == 0) == ("rising" in name)
    torch.testing.assert_close(frames.mean((0, 1, 3, 4)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.std((0, 1, 3, 4)), torch.ones(3), atol=1e-3, rtol=0)


# ---- bad ones ----


def _truncated(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def _bad_files(root):
    """{path: a word of its reason}, made in the set at ``root``."""
    rising, sinking = root / "rising", root / "sinking"
    (rising / "empty.mp4").write_bytes(b"")
    (rising / "letter.mp4").write_text("Dear reader, this is no video.")
    (rising / "notes.txt").write_text("notes")
    (rising / "nothing").mkdir()
    shutil.copy(rising / "clip0.mp4", rising / "cut.mp4")
    _truncated(rising / "cut.mp4")
    shutil.copy(rising / "clip1.gif", rising / "cut.gif")
    _truncated(rising / "cut.gif", 0.9)
    shutil.copytree(rising / "frames", rising / "cutframes")
    _truncated(rising / "cutframes" / "frame3.png", 0.7)
    shutil.copy(rising / "clip2.mp4", sinking / "wrong.mp4")
    shutil.copy(sinking / "clip3.mp4", sinking / "again.mp4")
    (root / "stray.mp4").write_bytes(b"x")
    (root / "hollow").mkdir()
    return {
        rising / "empty.mp4": "empty file",
        rising / "letter.mp4": "cannot be decoded",
        rising / "notes.txt": "not a video",
        rising / "nothing": "without pictures",
        rising / "cut.mp4": "",
        rising / "cut.gif": "truncated",
        rising / "cutframes": "frame3.png: truncated",
        rising / "clip2.mp4": "mislabelled",
        sinking / "wrong.mp4": "mislabelled",
        sinking / "clip3.mp4": "a copy of",
        root / "stray.mp4": "beside the classes",
        root / "hollow": "empty class folder",
    }


def test_bad_files_are_skipped_by_name_and_the_rest_is_used(copy, capsys):
    expected = _bad_files(copy)
    data = load(copy, "skip")
    told = {entry["name"]: entry["reason"] for entry in data.report["skipped"]}
    assert told.keys() == {str(path) for path in expected}
    for path, word in expected.items():
        assert word in told[str(path)], path
    assert data.report["clips"] == {"rising": 6, "sinking": 7}
    assert f"{len(expected)} bad file" in capsys.readouterr().err


def test_bad_files_are_refused_by_default_and_nothing_is_written(copy, tmp_path, capsys):
    (copy / "rising" / "empty.mp4").write_bytes(b"")
    assert run("train", "video", "--data", copy, "--output", tmp_path / "out", "--quick") == 1
    told = capsys.readouterr().err
    assert "1 bad file" in told
    assert "empty.mp4: an empty file" in told
    assert list((tmp_path / "out").iterdir()) == []


def test_sets_that_cannot_be_trained_on_are_told(tmp_path, copy):
    with pytest.raises(RecipeError, match="expected a folder"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no clips"):
        load(tmp_path / "empty")
    for path in sorted((copy / "sinking").iterdir())[2:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RecipeError, match=r"at least 3 usable clips; too few: sinking \(2\)"):
        load(copy)
    shutil.rmtree(copy / "sinking")
    with pytest.raises(RecipeError, match="only the class rising"):
        load(copy)


def test_a_class_the_model_does_not_know_is_a_bad_file(copy, own):
    facts = load(own).facts
    (copy / "sinking").rename(copy / "falling")
    with pytest.raises(RecipeError, match=r"7 bad file[\s\S]*no class 'falling'"):
        load(copy, facts=facts)
    data = load(copy, "skip", facts)
    assert data.report["clips"] == {"rising": 7, "sinking": 0}
    assert data.facts is facts


# ---- the whole ----


def test_own_clips_from_training_to_explanation(own, tmp_path, capsys):
    out = tmp_path / "out"
    train = ("train", "video", "--data", own, "--frame-size", 28, "--output", out, "--threads", 1)
    assert run(*train, "--epochs", 30, "--rate", 0.01, "--hidden-size", 16, "--compare", "--quick") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == 1.0
    compared = metrics["comparison"]
    assert set(compared["step_ms"]) == {"cnnrnn_ext", "stock", "stock channels_last", "reference"}
    for name in ("stock", "stock channels_last", "reference"):
        assert compared["losses"][name] == pytest.approx(compared["losses"]["cnnrnn_ext"], abs=1e-5)
    assert {kernel.split(":")[0] for kernel in compared["conditions"]["kernels"]} == {"conv_pool2d", "lstm"}
    assert sorted(path.name for path in out.iterdir()) == [
        "best.ckpt", "confusion.png", "examples.png", "last.ckpt", "metrics.json", "training.png",
    ]  # fmt: skip
    capsys.readouterr()

    asked = (own / "rising" / "clip0.mp4", own / "sinking")
    assert run("predict", "video", *asked, "--output", out, "--json", "--draw", out / "said.png") == 0
    said = {entry["name"]: entry["label"]["class"] for entry in json.loads(capsys.readouterr().out)}
    assert len(said) == 8
    for name, label in said.items():
        assert Path(name).parent.name == label
    assert run("evaluate", "video", "--data", own, "--output", out) == 0
    assert json.loads((out / "evaluation.json").read_text())["samples"] == 14
    assert run("explain", "video", own / "rising" / "frames", "--output", out) == 0

    from matplotlib.image import imread

    for name in ("said.png", "explanation.png", "examples.png"):
        picture = imread(out / name)
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.05


def test_predict_refuses_or_skips_what_is_no_clip(own, tmp_path, capsys):
    assert run("train", "video", "--data", own, "--output", tmp_path, "--epochs", 1, "--quick", "--gray") == 0
    (tmp_path / "letter.mp4").write_text("no video")
    asked = ("predict", "video", tmp_path / "letter.mp4", own / "rising" / "clip0.mp4", tmp_path / "gone.mp4")
    assert run(*asked, "--output", tmp_path) == 1
    told = capsys.readouterr().err
    assert "2 bad file" in told
    assert "gone.mp4: there is no such file" in told
    capsys.readouterr()
    assert run(*asked, "--output", tmp_path, "--bad-files", "skip") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(str(own / "rising" / "clip0.mp4") + ": ")
    assert len(captured.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("good", "shown"), [(20, (6, 2)), (1, (1, 7)), (0, (0, 8)), (7, (6, 2)), (24, (8, 0))]
)
def test_examples_are_right_ones_and_some_wrong_ones(good, shown):
    right = torch.zeros(24, dtype=torch.bool)
    right[torch.linspace(0, 23, good).long() if good else []] = True
    rows = _examples(right)
    assert len(set(rows)) == len(rows) == 8
    assert (int(right[rows].sum()), int((~right[rows]).sum())) == shown
