"""Video: a CNN on every frame, an RNN over the frames."""

from pathlib import Path

import torch

from cnnrnn_ext.models import CNNRNN
from cnnrnn_ext.recipes.base import Batch, Data, RecipeError
from cnnrnn_ext.recipes.classification import Classification
from cnnrnn_ext.recipes.data import clips, moving_digits
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.options import positive

SHOWN = 12  # clips of predict --draw


class Video(Classification):
    """Clips [N, T, C, H, W] of different lengths → classes.

    Embedded data: :mod:`moving_digits`, two heads, digit and motion. Own data: ``--data`` with a folder for
    each class, see :mod:`clips`.
    """

    name = "video"
    needs = {"av": "av"}  # noqa: RUF012 - a constant, as in base
    epochs = 30
    batch_size = 32
    rate = 2e-3
    quick = {"epochs": 2, "hidden_size": 32}  # noqa: RUF012

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--cnn", choices=("seed", "vgg", "resnet"), default="seed",
                            help="network of a frame (models.CNNRNN)")  # fmt: skip
        parser.add_argument("--rnn", choices=("lstm", "gru", "rnn", "rnn_relu"), default="lstm")
        parser.add_argument("--readout", choices=("last", "mean", "attention"), default="last")
        parser.add_argument("--hidden-size", type=positive, help="of the RNN (default 128)")
        parser.add_argument(
            "--frame-size", type=positive, default=64, help="side of a frame of --data (default 64)"
        )
        parser.add_argument("--frames", type=positive, default=16, help="of --data, at most (16)")
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

    # ---- what the user sees ----

    def draw(self, path, split, names, predictions, facts):
        """A strip of frames for each clip, at most 12."""
        from cnnrnn_ext.recipes import drawing_video as strips

        rows = []
        for row, (name, said) in enumerate(zip(names, predictions, strict=True)):
            if len(rows) == SHOWN:
                break
            frames, _, _ = split.clips([row])
            told = "\n".join(self.describe({head: found}) for head, found in said.items())
            rows.append((strips.plain(frames[0], facts), f"{Path(name).name}\n{told}", None))
        strips.clips(path, "What the model says", f"{len(rows)} of {len(names)} clips.", rows)

    def pictures(self, folder, model, data, results):
        from cnnrnn_ext.recipes import drawing_video as strips

        paths = [*super().pictures(folder, model, data, results), folder / "examples.png"]
        split, facts = data.splits["test"], data.facts
        chosen, truth = self.answers(model, split)
        right = torch.stack([chosen[head] == truth[head] for head in chosen]).all(0)
        rows = []
        for row in _examples(right):
            frames, lengths, _ = split.clips([row])
            said = ", ".join(facts["classes"][head][chosen[head][row]] for head in chosen)
            true = ", ".join(facts["classes"][head][truth[head][row]] for head in chosen)
            told = said if right[row] else f"{said}\ntruth: {true}"
            rows.append((strips.plain(frames[0, : lengths[0]], facts), told, bool(right[row])))
        title = f"{results['accuracy']:.1%} of the test clips are right"
        strips.clips(paths[-1], title, "Clips of the test split, and what the model says of them.", rows)
        return paths

    def explain(self, path, model, split, row, name, facts):
        """Integrated gradients of each head's answer with respect to the pixels."""
        from cnnrnn_ext import explain
        from cnnrnn_ext.recipes import drawing_video as strips

        batch = self.batch(split, [row])
        frames, lengths = batch.inputs
        said = self.predict(model, batch, facts)[0]
        heat = {}
        for head, found in said.items():
            target = facts["classes"][head].index(found["class"])
            values = explain.integrated_gradients(
                model, frames, target, additional_forward_args=(lengths,), head=head, internal_batch_size=16
            )
            heat[self.describe({head: found})] = values[0].sum(1)
        told = f"{name}: {self.describe(said)}"
        strips.explanation(
            path, told, "Integrated gradients: red pixels spoke for the answer, blue ones against it.",
            strips.plain(frames[0], facts), heat,
        )  # fmt: skip
        return told


def _examples(right, count=8):
    """``count`` rows from all over the split: right ones, then wrong ones, two of these if there are enough
    right ones."""
    good, wrong = (mask.nonzero().flatten().tolist() for mask in (right, ~right))
    wrongs = min(len(wrong), max(2, count - len(good)))
    return _spread(good, count - wrongs) + _spread(wrong, wrongs)


def _spread(rows, count):
    """At most ``count`` of the rows, evenly spaced."""
    return rows[:: max(1, len(rows) // max(1, count))][:count]
