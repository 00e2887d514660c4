"""The demo's clips: which are in which split, what they show, that no single frame tells how it moves."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from cnnrnn_ext.recipes.data import digits


@pytest.fixture(scope="module")
def scans():
    return digits.load_scans(seed=0)


def test_split_is_by_scan_and_complete(scans):
    rows = [set(part.index.tolist()) for part in scans.values()]
    assert sum(map(len, rows)) == len(set().union(*rows)) == 1797
    pictures = [{image.numpy().tobytes() for image in part.images} for part in scans.values()]
    assert sum(map(len, pictures)) == len(set().union(*pictures)) == 1797  # no scan is there twice either
    everywhere = torch.bincount(torch.cat([part.digit for part in scans.values()]), minlength=10)
    for name, share in digits.SPLITS.items():
        counts = torch.bincount(scans[name].digit, minlength=10)
        assert ((counts - share * everywhere).abs() <= 1).all()


def test_scans_are_scikit_learns_in_each_split(scans):
    from sklearn.datasets import load_digits

    source = load_digits()
    for part in scans.values():
        assert torch.equal(part.images * 16, torch.from_numpy(source.images).float()[part.index])
        assert torch.equal(part.digit, torch.from_numpy(source.target)[part.index])


def test_an_epoch_shows_each_scan_at_most_once(scans):
    count = len(scans["train"])
    orders = [digits.epoch_order(count, 0, epoch) for epoch in range(2)]
    assert sorted(orders[0].tolist()) == list(range(count))
    assert not torch.equal(*orders)


def test_a_batch_depends_on_seed_and_step_alone(scans):
    first = digits.training_batch(scans["train"], 8, 0, 5)
    torch.rand(100)
    digits.training_batch(scans["train"], 8, 0, 4)
    again = digits.training_batch(scans["train"], 8, 0, 5)
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.direction, again.direction)
    for other in (
        digits.training_batch(scans["train"], 8, 0, 6),
        digits.training_batch(scans["train"], 8, 1, 5),
    ):
        assert not torch.equal(first.frames, other.frames)


def test_evaluation_shows_every_scan_in_every_direction(scans):
    clips = digits.evaluation_clips(scans["test"], seed=0)
    pairs = clips.direction + 4 * torch.arange(len(scans["test"])).repeat_interleave(4)
    assert sorted(pairs.tolist()) == list(range(4 * len(scans["test"])))
    assert torch.equal(clips.digit, scans["test"].digit.repeat_interleave(4))


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_frames_move_where_the_label_says(scans, direction):
    clips = digits.evaluation_clips(scans["validation"], seed=0)
    frames = clips.frames[clips.direction == digits.DIRECTIONS.index(direction), :, 0]
    pixel_ahead = {
        "right": (frames[:, :-1, :, :-1], frames[:, 1:, :, 1:]),
        "left": (frames[:, :-1, :, 1:], frames[:, 1:, :, :-1]),
        "down": (frames[:, :-1, :-1], frames[:, 1:, 1:]),
        "up": (frames[:, :-1, 1:], frames[:, 1:, :-1]),
    }
    moved = {name: (a == b).all(-1).all(-1).sum().item() for name, (a, b) in pixel_ahead.items()}
    # Half of the clips move by a whole pixel a frame, and jump back in few of their frames.
    assert moved.pop(direction) > 0.3 * frames.shape[0] * (digits.FRAMES - 1)
    assert set(moved.values()) == {0}


def test_a_clip_shows_its_scan_upright(scans):
    part = scans["validation"]
    clips = digits.evaluation_clips(part, seed=0)
    whole = ((clips.position >= 0) & (clips.position <= 2 * digits.FRAME_SIZE - digits.DIGIT)).all(-1)
    whole &= (clips.position % 2 == 0).all(-1)
    side, upright, mirrored = digits.DIGIT // 2, [], []
    for clip in range(0, len(clips), 3):
        for frame in whole[clip].nonzero()[:1].flatten().tolist():
            y, x = (clips.position[clip, frame] // 2).tolist()
            seen = clips.frames[clip, frame, :, y : y + side, x : x + side]
            small = nn.functional.interpolate(seen[None], size=(8, 8), mode="area")[0, 0]
            for view, found in ((small, upright), (small.flip(1), mirrored)):
                pair = torch.stack([view.flatten(), part.images[clip // 4].flatten()])
                found.append(torch.corrcoef(pair)[0, 1].item())
    assert len(upright) > 50
    assert min(upright) > 0.9
    assert max(mirrored) < 0.99
    assert sum(mirrored) / len(mirrored) < 0.8


def centres(frames):
    """Centres of mass [N, 2] of frames [N, 28, 28]."""
    place = torch.arange(frames.shape[-1], dtype=frames.dtype)
    mass = frames.sum((1, 2))
    return torch.stack([(frames.sum(2) * place).sum(1) / mass, (frames.sum(1) * place).sum(1) / mass], 1)


def guess_direction(features, direction):
    """Accuracy of a decision tree, trained on the first half, on the second half."""
    from sklearn.tree import DecisionTreeClassifier

    half = len(features) // 2
    tree = DecisionTreeClassifier(max_depth=6, random_state=0).fit(features[:half], direction[:half])
    return tree.score(features[half:], direction[half:])


def test_no_single_frame_tells_the_direction(scans):
    part = scans["train"]
    random = digits.generator(0, digits.BATCH)
    rows = torch.randint(len(part), (2400,), generator=random)
    clips = digits.make_clips(part, rows, torch.randint(4, (2400,), generator=random), random, distort=True)
    chance = 4 * math.sqrt(0.25 * 0.75 / 1200)  # four standard deviations of guessing
    picks = torch.randint(digits.FRAMES, (2400,), generator=random)
    single = {t: clips.frames[:, t, 0] for t in (0, 5, 10, 15)}
    single["any"] = clips.frames[torch.arange(2400), picks, 0]
    for name, frames in single.items():
        assert abs(guess_direction(centres(frames), clips.direction) - 0.25) < chance, name
    two = centres(clips.frames[:, 9, 0]) - centres(clips.frames[:, 8, 0])
    assert guess_direction(two, clips.direction) > 0.85  # the same guesser sees it in two frames
