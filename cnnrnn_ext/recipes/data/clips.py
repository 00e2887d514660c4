"""The user's own clips, read with PyAV: videos, GIFs and folders of frames.

Layout of ``--data``: a folder for each class, named like it, with clips in it. A clip is a video file, or a
folder of pictures that are its frames in the order of their names (frame2 before frame10). Hidden files are
ignored.

A clip is read once, when the run begins: at most ``frames`` frames, evenly spaced, resized to a square, as
bytes. So a set takes clips × frames × size² × channels bytes of memory.
"""

import hashlib
import re
from dataclasses import dataclass

import torch

from cnnrnn_ext.recipes.base import Data, RecipeError
from cnnrnn_ext.recipes.data.files import BadFiles, split_rows, unambiguous

VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".gif", ".mpg", ".mpeg"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
LAST_BYTES = {".gif": b"\x3b", ".jpg": b"\xff\xd9", ".jpeg": b"\xff\xd9", ".png": b"IEND\xaeB`\x82"}
FEWEST = 3  # clips of a class: one for each split
SHIFT = 0.08  # of the side, by which a training clip is moved at most


@dataclass
class Clips:
    """Some clips: frames, a list of uint8 [T, C, H, W]; label [N], -1 where unknown; names (paths)."""

    frames: list
    label: torch.Tensor
    names: list
    facts: dict

    def __len__(self):
        return len(self.frames)

    def subset(self, rows):
        """The clips of these rows."""
        return Clips(
            [self.frames[i] for i in rows], self.label[rows], [self.names[i] for i in rows], self.facts
        )

    def clips(self, rows, draws=None):
        """(frames [N, T, C, H, W], normalised; lengths [N]; {"label": [N]}).

        draws: of a training step, whose clips are a little shifted, and lighter or darker.
        """
        chosen = [self.frames[row] for row in rows]
        lengths = torch.tensor([len(frames) for frames in chosen])
        mean, deviation = (torch.tensor(self.facts[name]).view(-1, 1, 1) for name in ("mean", "deviation"))
        batch = torch.zeros(len(rows), int(lengths.max()), *chosen[0].shape[1:])
        if draws is not None:
            light = 0.8 + 0.4 * draws.uniform()
            shift = ((2 * draws.uniform(2) - 1) * SHIFT * chosen[0].shape[-1]).round().int().tolist()
        for row, frames in enumerate(chosen):
            frames = frames.float() / 255
            if draws is not None:
                frames = _shifted((frames * light[row]).clamp_(max=1), *shift[row])
            batch[row, : len(frames)] = (frames - mean) / deviation
        return batch, lengths, {"label": self.label[rows]}


def _shifted(frames, down, right):
    """Frames moved by some pixels; the edge's pixels are repeated."""
    height, width = frames.shape[-2:]
    rows = (torch.arange(height) - down).clamp_(0, height - 1)
    columns = (torch.arange(width) - right).clamp_(0, width - 1)
    return frames[:, :, rows][:, :, :, columns]


def load(root, settings, facts=None):
    """:class:`base.Data` of the folder ``root``; a checkpoint's ``facts`` say which classes are known."""
    bad = BadFiles(settings.bad_files)
    found = _labelled(root, bad)
    known = facts["classes"]["label"] if facts else sorted({label for _, label in found})
    reading = facts or {
        "channels": 1 if settings.gray else 3,
        "frame_size": settings.frame_size,
        "frames": settings.frames,
    }
    kept = [(path, label) for path, label in found if label in known]
    for path, label in found:
        if label not in known:
            bad.add(path, f"the model knows no class {label!r}")
    paths, said = zip(*kept, strict=True) if kept else ((), ())
    once = unambiguous(list(map(str, paths)), said, map(_digest, paths), "clip", bad)
    frames, names, labels = [], [], []
    for path, label in (kept[row] for row in once):
        clip = _try_to_read(path, reading, bad)
        if clip is not None:
            frames.append(clip)
            names.append(str(path))
            labels.append(known.index(label))
    report = {"source": str(root), "skipped": bad.settle()}
    if facts is None:
        _check_classes(root, known, labels)
    if not frames:
        raise RecipeError(f"{root}: no usable clip of a known class")
    parts = split_rows(labels, settings.seed)
    if facts is None:
        facts = {"classes": {"label": known}, **reading, **_statistics([frames[i] for i in parts["train"]])}
    clips = Clips(frames, torch.tensor(labels), names, facts)
    report["clips"] = {known[i]: labels.count(i) for i in range(len(known))}
    return Data({name: clips.subset(rows) for name, rows in parts.items()}, facts, report)


def read(paths, facts, bad):
    """:class:`Clips` of unknown label: the files and folders that the user names."""
    frames, names = [], []
    for path in paths:
        if not path.exists():
            bad.add(path, "there is no such file or folder")
            continue
        for clip in _clips_in(path) if path.is_dir() and not _is_clip(path) else [path]:
            tensor = _try_to_read(clip, facts, bad)
            if tensor is not None:
                frames.append(tensor)
                names.append(str(clip))
    return Clips(frames, torch.full((len(frames),), -1), names, facts)


# ---- which files ----


def _labelled(root, bad):
    """[(path of a clip, class)], in the order of the names."""
    if not root.is_dir():
        raise RecipeError(
            f"{root}: expected a folder with a folder of clips for each class"
            + ("" if root.exists() else ", found nothing")
        )
    found = []
    for folder in _sorted(root):
        if not folder.is_dir():
            bad.add(folder, "lies beside the classes' folders, not in one of them")
        elif not (clips := _clips_in(folder)):
            bad.add(folder, "an empty class folder")
        else:
            found += [(clip, folder.name) for clip in clips]
    if not found:
        raise RecipeError(f"{root}: no clips; expected a folder with a folder of clips for each class")
    return found


def _clips_in(folder):
    return _sorted(folder)


def _is_clip(folder):
    """Whether a folder holds pictures, which are then the frames of one clip."""
    return any(path.suffix.lower() in PICTURES for path in _sorted(folder))


def _sorted(folder):
    """What lies in a folder, hidden files apart, with numbers in names ordered as numbers."""
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(visible, key=lambda path: [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", path.name)
    ])  # fmt: skip


def _digest(path):
    """Of a clip's content. Empty and unreadable ones are left to the reader: each is like no other."""
    digest = hashlib.sha256()
    size = 0
    try:
        for part in [path] if path.is_file() else _sorted(path):
            if part.is_file():
                content = part.read_bytes()
                size += len(content)
                digest.update(content)
    except OSError:
        size = 0
    return digest.digest() if size else str(path)


# ---- a clip ----


def _try_to_read(path, facts, bad):
    """uint8 [T, C, H, W], or None when ``path`` went to the bad files."""
    try:
        return read_clip(path, facts["frames"], facts["frame_size"], facts["channels"])
    except UnusableClip as error:
        bad.add(path, str(error))
        return None


class UnusableClip(Exception):
    """Why a file or folder is no clip."""


def read_clip(path, frames, size, channels):
    """A clip as uint8 [T, channels, size, size]: at most ``frames`` frames, evenly spaced.

    Raises UnusableClip, with the reason, for what is empty, unreadable, truncated or no clip at all.
    """
    if path.is_dir():
        pictures = [part for part in _sorted(path) if part.suffix.lower() in PICTURES]
        if not pictures:
            raise UnusableClip("a folder without pictures (" + ", ".join(sorted(PICTURES)) + ")")
        found = []
        for picture in _evenly(pictures, frames):
            try:
                _check_file(picture)
                found += _decode(picture, size, channels)[:1]
            except UnusableClip as error:
                raise UnusableClip(f"{picture.name}: {error}") from error
        return torch.stack(found)
    if path.suffix.lower() not in VIDEOS:
        raise UnusableClip("not a video (" + ", ".join(sorted(VIDEOS)) + ") nor a folder of pictures")
    _check_file(path)
    return torch.stack(_evenly(_decode(path, size, channels), frames))


def _evenly(items, count):
    """``count`` of the items, the first and the last included, or all of them if there are no more."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def _check_file(path):
    """Empty files, and those that end before their format's last bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableClip(f"cannot be read: {error.strerror}") from error
    if not content:
        raise UnusableClip("an empty file")
    last = LAST_BYTES.get(path.suffix.lower())
    if last is not None and last not in content[-64:]:
        raise UnusableClip("truncated, its format's last bytes are missing")


def _decode(path, size, channels):
    """[uint8 [C, size, size]] of all frames of a file."""
    import av

    form = "gray" if channels == 1 else "rgb24"
    found = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnusableClip("no video in it")
            stream = container.streams.video[0]
            expected = stream.frames
            for frame in container.decode(stream):
                picture = frame.reformat(width=size, height=size, format=form).to_ndarray()
                found.append(torch.from_numpy(picture).view(size, size, channels).permute(2, 0, 1))
    except av.FFmpegError as error:
        told = f", after {len(found)} frames" if found else ""
        raise UnusableClip(f"cannot be decoded: {error.strerror}{told}") from error
    if not found:
        raise UnusableClip("no frame in it")
    if len(found) < expected:
        raise UnusableClip(f"truncated, {len(found)} of {expected} frames")
    return found


# ---- the whole set ----


def _check_classes(root, names, labels):
    if len(names) < 2:
        raise RecipeError(f"{root}: only the class {', '.join(names)}; at least two are needed")
    few = [f"{name} ({labels.count(i)})" for i, name in enumerate(names) if labels.count(i) < FEWEST]
    if few:
        raise RecipeError(
            f"{root}: each class needs at least {FEWEST} usable clips; too few: {', '.join(few)}"
        )


def _statistics(frames):
    """Mean and standard deviation of each channel over the training clips, in 0 … 1."""
    pixels = torch.cat([clip.transpose(0, 1).flatten(1).float() / 255 for clip in frames], 1)
    return {"mean": pixels.mean(1).tolist(), "deviation": pixels.std(1).clamp_min(1e-3).tolist()}
