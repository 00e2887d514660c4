"""Video: a CNN on every frame, an RNN over the frames."""

from pathlib import Path

import torch

from cnnrnn_ext.models import CNNRNN
from cnnrnn_ext.recipes.base import Batch, Data, RecipeError
from cnnrnn_ext.recipes.classification import Classification
from cnnrnn_ext.recipes.data import clips, moving_digits
from cnnrnn_ext.recipes.data.files import BadFiles


class Video(Classification):
    """Clips [N, T, C, H, W] of different lengths → classes.

    Embedded data: :mod:`moving_digits`, two heads, digit and motion. Own data: ``--data`` with a folder for
    each class, see :mod:`clips`.
    """

    name = "video"
    needs = {"av": "av"}  # noqa: RUF012 - a constant, as in base
    epochs = 20
    batch_size = 32
    rate = 2e-3
    quick = {"epochs": 2, "hidden_size": 32}  # noqa: RUF012

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--cnn", choices=("seed", "vgg", "resnet"), default="seed",
                            help="network of a frame (models.CNNRNN)")  # fmt: skip
        parser.add_argument("--rnn", choices=("lstm", "gru", "rnn", "rnn_relu"), default="lstm")
        parser.add_argument("--readout", choices=("last", "mean", "attention"), default="last")
        parser.add_argument("--hidden-size", type=int, help="of the RNN (default 128)")
        parser.add_argument("--frame-size", type=int, default=64, help="side of a frame of --data (default 64)")
        parser.add_argument("--frames", type=int, default=16, help="of --data, at most, evenly spaced (16)")
        parser.add_argument("--gray", action="store_true", help="read --data without colours")

    @classmethod
    def add_inputs(cls, parser):
        parser.add_argument("inputs", nargs="*", type=Path, metavar="CLIP",
                            help="video files, folders of frames, or folders of these")  # fmt: skip

    # ---- data and model ----

    def load(self, facts=None):
        settings = self.settings
        if settings.data:
            return clips.load(Path(settings.data), settings, facts)
        splits = moving_digits.load(settings.seed, settings.quick)
        facts = facts or {
            "classes": moving_digits.CLASSES,
            "channels": 1,
            "frame_size": moving_digits.FRAME,
            "frames": moving_digits.LONGEST,
            "mean": [0.0],
            "deviation": [1.0],
        }
        source = "real handwritten digits (scikit-learn), moved by a program, among specks and noise"
        report = {"source": source, "clips": {name: len(split) for name, split in splits.items()}}
        return Data(splits, facts, report)

    def read(self, arguments, facts):
        if not arguments.inputs:
            return None
        bad = BadFiles(self.settings.bad_files)
        split = clips.read(arguments.inputs, facts, bad)
        bad.settle()
        if not len(split):
            raise RecipeError("none of the named files is a usable clip")
        return split, split.names

    def build(self, facts):
        settings = self.settings
        size = facts["frame_size"]
        return CNNRNN(
            {head: len(names) for head, names in facts["classes"].items()},
            in_channels=facts["channels"],
            frame_size=(size, size),
            hidden_size=settings.hidden_size or 128,
            cnn=settings.cnn,
            rnn=settings.rnn,
            readout=settings.readout,
        )

    def batch(self, split, rows, draws=None):
        frames, lengths, targets = split.clips(rows, draws)
        return Batch((frames, lengths), targets)
