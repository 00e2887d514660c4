"""Multimodal: a digit seen and spoken, of which either may be missing. CNN → RNN beside CNN ∥ RNN, fused."""

import dataclasses
from pathlib import Path

import torch
from torch.nn import functional as F

from cnnrnn_ext.models import CNNRNN, MultiModal, ParallelCNNRNN
from cnnrnn_ext.recipes.base import Batch, Data, RecipeError, evaluate
from cnnrnn_ext.recipes.classification import Classification
from cnnrnn_ext.recipes.data import clips, moving_digits, multimodal, spectrogram, speech
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.draws import picked

CONDITIONS = {
    "both": {"video": True, "audio": True},
    "video_only": {"video": True, "audio": False},
    "audio_only": {"video": False, "audio": True},
}
ABSENT = -100  # target of a row without the input that is asked about
EXAMPLES = 6


class Multimodal(Classification):
    """The embedded data of :mod:`data.multimodal`; there is no layout for the user's own training data.

    ``--only video`` and ``--only audio`` train the same network with one branch, for comparison: on the same
    rows, but for those that lack what it needs.
    """

    name = "multimodal"
    needs = {"av": "av", "scipy": "scipy", "soundfile": "soundfile"}  # noqa: RUF012
    epochs = 20

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument("--only", choices=multimodal.MODALITIES, help="one branch, for comparison")
        parser.add_argument("--fusion", choices=("late", "gated"), default="gated",
                            help="average the answers, or fuse the features (default gated)")  # fmt: skip
        speech.add_arguments(parser)

    @classmethod
    def add_inputs(cls, parser):
        parser.add_argument("--video", nargs="+", type=Path, metavar="CLIP", help="videos, frames")
        parser.add_argument("--audio", nargs="+", type=Path, metavar="SOUND",
                            help="recordings; with --video: of the same digits in that order")  # fmt: skip

    # ---- data and model ----

    def load(self, facts=None):
        if self.settings.data is not None:
            raise RecipeError("--data: this recipe has its embedded data only; predict takes files of yours")
        seen = moving_digits.load(self.settings.seed, self.settings.quick)
        heard, source = speech.embedded(self.settings, "words")
        only = self.settings.only
        present = {name: name == only for name in multimodal.MODALITIES} if only else None
        splits = {
            name: multimodal.SeenAndHeard(seen[name], heard[name], self.settings.seed, present)
            for name in seen
        }
        facts = {
            "classes": {"label": list(speech.DIGITS)},
            "source": source,
            "channels": 1,
            "frame_size": moving_digits.FRAME,
            "frames": moving_digits.LONGEST,
            "mean": [0.0],
            "deviation": [1.0],
        }
        report = {
            "source": f"handwritten digits (scikit-learn), moved by a program, and spoken ones, {source}",
            "video_noise": f"standard deviation of a pixel {multimodal.VIDEO_NOISE}",
            "audio_noise": f"signal over noise, dB {multimodal.AUDIO_NOISE}",
            "rows": {name: len(split) for name, split in splits.items()},
        }
        return Data(splits, facts, report)

    def read(self, arguments, facts):
        if not arguments.video and not arguments.audio:
            return None
        bad = BadFiles(self.settings.bad_files)
        seen = clips.read(arguments.video, facts, bad) if arguments.video else None
        heard = speech.read_files(arguments.audio, bad) if arguments.audio else None
        bad.settle()
        counts = {len(part) for part in (seen, heard) if part is not None}
        if len(counts) > 1:
            raise RecipeError(
                f"--video, --audio: expected as many of one as of the other, got {sorted(counts)}"
            )
        if counts == {0}:
            raise RecipeError("none of the named files can be used")
        given = [names for names in (seen and seen.names, heard and heard.files) if names]
        names = [" + ".join(row) for row in zip(*given, strict=True)]
        return multimodal.Files(seen, heard), names

    def build(self, facts):
        digits = len(facts["classes"]["label"])
        frame = (facts["frame_size"],) * 2
        branches = {
            "video": CNNRNN(digits, facts["channels"], frame, (16, 32), hidden_size=96, dropout=0.2),
            "audio": ParallelCNNRNN(digits, spectrogram.MELS, channels=(16, 32), hidden_size=64, dropout=0.2),
        }
        if self.settings.only:
            branches = {self.settings.only: branches[self.settings.only]}
        return MultiModal(branches, digits, fusion=self.settings.fusion)

    def batch(self, split, rows, draws=None):
        inputs, present, digit = split.sample(rows, draws)
        wanted = [self.settings.only] if self.settings.only else multimodal.MODALITIES
        inputs, present = (
            {name: part[name] for name in wanted if name in part} for part in (inputs, present)
        )
        if not inputs:
            raise RecipeError(f"the model has no other branch than {self.settings.only}")
        return Batch((inputs, present), None if digit is None else {"label": digit})

    # ---- training ----

    def forward(self, model, batch):
        """In training, of several branches, with the answer of each one alone beside: see :meth:`loss`."""
        if model.training and len(model.branches) > 1:
            return model.with_each_alone(*batch.inputs)
        return model(*batch.inputs)

    def loss(self, outputs, batch):
        """Of the answer and of those that each branch gives alone, in the rows that have it: so that each
        learns as if it were the only one."""
        answer, alone = outputs if isinstance(outputs, tuple) else (outputs, {})
        total, count = super().loss(answer, batch)
        for logits, here in alone.values():
            target = batch.targets["label"].where(here, ABSENT)
            total = total + F.cross_entropy(logits, target, ignore_index=ABSENT, reduction="sum")
        return total, count

    # ---- figures and pictures ----

    def further_figures(self, model, data):
        """Accuracy of all test rows with both, with the video alone and with the audio alone."""
        if self.settings.only:
            return {}
        split = data.splits["test"]
        return {
            name: evaluate(self, model, [dataclasses.replace(split, present=present)], data.facts)["accuracy"]
            for name, present in CONDITIONS.items()
        }

    def pictures(self, folder, model, data, results):
        """The confusion matrix; examples.png: rows of the test split that lack nothing, and what the model
        says of them with both and with one of the two."""
        from cnnrnn_ext.recipes import drawing_multimodal

        paths = [*super().pictures(folder, model, data, results), folder / "examples.png"]
        split, facts = data.splits["test"], data.facts
        rows = picked(len(split), self.settings.seed, EXAMPLES)
        said = {}
        for name, present in CONDITIONS.items():
            if self.settings.only in (None, *(m for m in present if present[m])):
                batch = self.batch(dataclasses.replace(split, present=present), rows)
                with torch.no_grad():
                    said[name] = [found["label"]["class"] for found in self.predict(model, batch, facts)]
        inputs, _, digits = split.sample(rows)
        names = facts["classes"]["label"]
        samples = [
            (frames[:length], sound[:heard], names[digit], {name: told[row] for name, told in said.items()})
            for row, (frames, length, sound, heard, digit) in enumerate(
                zip(*inputs["video"], *inputs["audio"], digits.tolist(), strict=True)
            )
        ]
        title = f"{results['accuracy']:.1%} right, half of the rows with one of the two missing"
        drawing_multimodal.examples(paths[-1], title, f"Speech: {facts['source']}.", samples)
        return paths

    def explain(self, path, model, split, row, name, facts):
        """Integrated gradients of the answer over the pixels and over the spectrogram, and the fusion's
        weights."""
        from cnnrnn_ext.explain import integrated_gradients
        from cnnrnn_ext.recipes import drawing_multimodal

        batch = self.batch(split, [row])
        inputs, present = batch.inputs
        with torch.no_grad():
            (said,) = self.predict(model, batch, facts)
            shares = dict(zip(model.branches, model.branch_weights(inputs, present)[0].tolist(), strict=True))
        target = facts["classes"]["label"].index(said["label"]["class"])
        shown = {}
        for modality, (values, lengths) in inputs.items():
            if bool(present[modality]):
                answer = OneInput(model, modality, inputs, present)
                relevance = integrated_gradients(answer, values, target, internal_batch_size=10)
                shown[modality] = (values[0, : lengths[0]], relevance[0, : lengths[0]])
        told = self.describe(said)
        shares = ", ".join(f"{modality} {share:.0%}" for modality, share in shares.items())
        drawing_multimodal.explanation(path, f"{name}: {told}", f"Shares in the answer: {shares}.", shown)
        return f"{name}: {told}; shares in the answer: {shares}"


class OneInput(torch.nn.Module):
    """The model as a function of one modality's values, all else as it is; for one sample, repeated as often
    as the values."""

    def __init__(self, model, modality, inputs, present):
        super().__init__()
        self.model, self.modality, self.inputs, self.present = model, modality, inputs, present

    def forward(self, values):
        def repeated(x):
            return x.expand(len(values), *x.shape[1:])

        inputs = {name: tuple(map(repeated, pair)) for name, pair in self.inputs.items()}
        inputs[self.modality] = (values, inputs[self.modality][1])
        return self.model(inputs, {name: repeated(here) for name, here in self.present.items()})
