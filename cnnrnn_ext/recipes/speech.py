"""Speech: spoken words, one by one (classes) or several in a row (CTC). CNN ∥ RNN on log-mel spectrograms."""

import dataclasses
import re
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from cnnrnn_ext.models import ParallelCNNRNN
from cnnrnn_ext.models._fusion import FUSIONS
from cnnrnn_ext.recipes import ctc
from cnnrnn_ext.recipes.base import Batch, Data, Recipe, RecipeError, evaluate
from cnnrnn_ext.recipes.classification import Classification
from cnnrnn_ext.recipes.data import spectrogram, speech
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.draws import Draws, picked

TRAINING_NOISE = (5.0, 60.0)  # dB, signal over noise: from a loud street to nothing audible
EVALUATION = 1 << 20  # the "epoch" of the noise that evaluation adds: one that no training reaches
TABLES = (".tsv", ".txt")
EXAMPLES = 9  # in a picture
DOUBTFUL = 0.9  # a unit of lower probability is told with it


def task_of(settings):
    """ "words" or "strings": as --task says, else what --data is; a folder holds words, a table strings."""
    if settings.task:
        return settings.task
    return "strings" if settings.data and Path(settings.data).suffix.lower() in TABLES else "words"


class Speech(Recipe):
    """What both tasks share: the recordings, and what the network sees of them. ``Speech(settings)`` makes a
    :class:`Words` or a :class:`Strings`."""

    name = "speech"
    needs = {"scipy": "scipy", "soundfile": "soundfile"}  # noqa: RUF012
    epochs = 10
    rate = 3e-3

    def __new__(cls, settings):
        settings.task = task_of(settings)  # for good: later commands may name other data
        if cls is Speech:
            cls = Strings if settings.task == "strings" else Words
        return super().__new__(cls)

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument(
            "--task",
            choices=("words", "strings"),
            help="single words, or several in a row (default: words; strings if --data is a table)",
        )
        parser.add_argument(
            "--speaker",
            metavar="REGEX",
            help="its first group, found in a file's name, is the speaker; nobody is then in two "
            "splits (for --data without a column of speakers)",
        )
        parser.add_argument(
            "--units",
            choices=("words", "characters"),
            default="words",
            help="what a transcript is made of (--data with transcripts; default words)",
        )
        parser.add_argument("--fusion", choices=FUSIONS, default="concatenate",
                            help="how the features of CNN and RNN are joined")  # fmt: skip
        speech.add_arguments(parser)

    @classmethod
    def add_inputs(cls, parser):
        parser.add_argument("files", nargs="*", type=Path, help="recordings: .wav, .flac, .ogg or .mp3")

    # ---- data ----

    def load(self, facts=None):
        bad = BadFiles(self.settings.bad_files)
        if self.settings.data is None:
            parts, source = speech.embedded(self.settings, self.settings.task)
            voices = {name: len(set(part.voices)) for name, part in parts.items()}
            report = {"source": f"spoken digits, {source}", "voices": voices}
            said = [words for part in parts.values() for words in part.words]
            facts = facts or self.facts_of(said, source)
        else:
            found = self.own(bad)
            if not len(found):
                bad.settle()
                raise RecipeError(f"{self.settings.data}: no recordings that can be used")
            facts = facts or self.facts_of(found.words, "recordings")
            found = self.usable(found, facts, bad)
            report = {"source": self.settings.data, "recordings": len(found), "skipped": bad.settle()}
            parts = self.split(found)
        splits = {
            name: dataclasses.replace(part, labels=[self.labels(words, facts) for words in part.words])
            for name, part in parts.items()
        }
        return Data(splits, facts, report)

    def own(self, bad):
        """The Recordings at settings.data; ``bad`` collects what cannot be used."""
        path = Path(self.settings.data)
        if isinstance(self, Words):
            wanted, read = path.is_dir(), speech.read_folder
            there = f"a folder for each word (or a table of transcripts, {' or '.join(TABLES)})"
        else:
            wanted, read = path.is_file(), speech.read_transcripts
            there = "a table of recordings and transcripts"
        if not wanted:
            raise RecipeError(f"{path}: expected {there}" + ("" if path.exists() else ", found nothing"))
        try:
            return read(path, bad)
        except OSError as error:
            raise RecipeError(f"{path}: {error.strerror}") from error

    def usable(self, found, facts, bad):
        """Those of ``found`` whose words the model knows and can say in their time; the others go to
        ``bad``."""
        kept = []
        for row, (words, file) in enumerate(zip(found.words, found.files, strict=True)):
            reason = self.unusable(words, spectrogram.frames_of(len(found.waves[row])), facts)
            if reason:
                bad.add(file, reason)
            else:
                kept.append(row)
        return found.subset(kept)

    def split(self, found):
        """{split: Recordings} of the user's own."""
        if not len(found):
            raise RecipeError(f"{self.settings.data}: no recordings that can be used")
        try:
            return speech.split_voices(
                found, self.settings.seed, self.settings.speaker, isinstance(self, Words)
            )
        except (re.error, ValueError) as error:
            raise RecipeError(f"--speaker: expected a regular expression with a group: {error}") from error

    def read(self, arguments, facts):
        if not arguments.files:
            return None
        bad = BadFiles(self.settings.bad_files)
        found = speech.read_files(arguments.files, bad)
        bad.settle()
        if not len(found):
            raise RecipeError("none of the files can be used")
        return found, found.files

    def batch(self, split, rows, draws=None):
        sounds = split.sounds(rows)
        if draws is not None:
            sounds = spectrogram.add_noise(sounds, draws, TRAINING_NOISE)
        elif split.noise:
            sounds = spectrogram.add_noise(sounds, Draws(self.settings.seed, EVALUATION, rows), split.noise)
        features = [spectrogram.log_mel(sound) for sound in sounds]
        if draws is not None:
            features = spectrogram.distort(features, draws)
        lengths = torch.tensor([len(x) for x in features])
        targets = None if split.labels is None else self.targets([split.labels[row] for row in rows])
        return Batch((pad_sequence(features, batch_first=True), lengths), targets)

    # ---- the model ----

    def network(self, classes, **options):
        sizes = {"channels": (16, 32), "hidden_size": 96, "dropout": 0.2}
        return ParallelCNNRNN(classes, spectrogram.MELS, fusion=self.settings.fusion, **sizes, **options)

    # ---- figures and pictures ----

    def further_figures(self, model, data):
        """The figures of the test recordings without the noise that evaluation adds to synthetic ones."""
        split = data.splits["test"]
        if split.noise is None:
            return {}
        clean = evaluate(self, model, [dataclasses.replace(split, noise=None)], data.facts)
        return {"without_noise": {name: value for name, value in clean.items() if isinstance(value, float)}}

    def draw(self, path, split, names, predictions, facts):
        self.draw_examples(path, split, list(range(min(len(split), EXAMPLES))), predictions, names, facts)

    def draw_examples(self, path, split, rows, predictions, names, facts):
        """Spectrograms of ``rows`` with what the model said of them, and whether it was right if that is
        known."""
        from cnnrnn_ext.recipes import drawing_speech

        inputs = self.batch(split, rows).inputs
        samples = []
        for features, length, row, said, name in zip(*inputs, rows, predictions, names, strict=False):
            told = self.describe(said)
            right = self.text_of(said) == " ".join(split.words[row]) if split.words[row] else None
            truth = f" (said: {' '.join(split.words[row])})" if right is False else ""
            samples.append((features[:length], f"{Path(name).name}\n{told}{truth}", right))
        subtitle = f"Log-mel spectrograms. Speech: {facts['source']}."
        drawing_speech.examples(path, "What the model hears", subtitle, samples)

    def examples(self, folder, model, data):
        """examples.png: some of the test split, of different words and voices; returns the path."""
        split = data.splits["test"]
        rows = picked(len(split), self.settings.seed, EXAMPLES)
        with torch.no_grad():
            said = self.predict(model, self.batch(split, rows), data.facts)
        path, names = folder / "examples.png", [f"voice {split.voices[row]}" for row in rows]
        self.draw_examples(path, split, rows, said, names, data.facts)
        return path

    def explain(self, path, model, split, row, name, facts):
        """Integrated gradients of the answer: of the class's logit, or of the logits of a string's units
        where each begins (of an empty one, of the unit that came nearest)."""
        from cnnrnn_ext.explain import integrated_gradients
        from cnnrnn_ext.recipes import drawing_speech

        batch = self.batch(split, [row])
        features, lengths = batch.inputs
        with torch.no_grad():
            (said,) = self.predict(model, batch, facts)
        answer = Answer(model, self.places(said, facts))
        relevance = integrated_gradients(
            answer, features, 0, additional_forward_args=(lengths,), internal_batch_size=10
        )
        note = (
            "Integrated gradients (Sundararajan et al. 2017) from the mean spectrogram to this one: red "
            f"points speak for the answer, blue ones against it. Speech: {facts['source']}."
        )
        told = self.describe(said)
        drawing_speech.explanation(
            path, f"{Path(name).name}: {told}", features[0], relevance[0], self.marks(said), note
        )
        return f"{name}: {told}; red in the lower picture: what speaks for it"


class Answer(torch.nn.Module):
    """The sum of a model's logits at some places, as [N, 1]: the number that an explanation explains.

    places: [(step, class)]; for a model of one answer a row the step is 0.
    """

    def __init__(self, model, places):
        super().__init__()
        self.model, self.places = model, places

    def forward(self, features, lengths):
        outputs = self.model(features, lengths)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs[:, None]
        return sum(logits[:, step, label] for step, label in self.places)[:, None]


class Words(Speech, Classification):
    """One word a recording: classes."""

    def facts_of(self, words, source):
        known = sorted({said for (said,) in words}, key=_digits_in_order)
        if len(known) < 2:
            raise RecipeError(f"{self.settings.data}: recordings of two words at least are needed")
        return {"task": "words", "classes": {"label": known}, "source": source}

    def unusable(self, words, frames, facts):
        return "" if words[0] in facts["classes"]["label"] else f"the model does not know {words[0]!r}"

    def labels(self, words, facts):
        return [facts["classes"]["label"].index(words[0])]

    def targets(self, labels):
        return {"label": torch.tensor([row[0] for row in labels])}

    def build(self, facts):
        return self.network(len(facts["classes"]["label"]))

    def text_of(self, prediction):
        return prediction["label"]["class"]

    def places(self, prediction, facts):
        """(0, class) of the one answer."""
        return [(0, facts["classes"]["label"].index(self.text_of(prediction)))]

    def marks(self, prediction):
        return []

    def pictures(self, folder, model, data, results):
        return [*super().pictures(folder, model, data, results), self.examples(folder, model, data)]


class Strings(Speech):
    """Several words a recording: CTC, greedy decoding.

    Metrics: ``wer`` (word error rate: substitutions, insertions and deletions over the words said),
    ``word_accuracy`` = 1 - wer, ``whole_strings`` (recordings without an error).
    """

    score = "word_accuracy"
    time_pools = 2  # so a step of the answer is 4 frames, 40 ms

    def facts_of(self, words, source):
        units = sorted({unit for said in words for unit in self.units(said)}, key=_digits_in_order)
        return {"task": "strings", "units": self.settings.units, "symbols": units, "source": source}

    def units(self, words):
        return list(words) if self.settings.units == "words" else list(" ".join(words))

    def unusable(self, words, frames, facts):
        unknown = sorted(set(self.units(words)) - set(facts["symbols"]))
        if unknown:
            return f"the model does not know {', '.join(map(repr, unknown))}"
        needed = ctc.steps_needed(self.units(words)) << self.time_pools
        return f"too short for its transcript: {frames} frames, {needed} needed" if frames < needed else ""

    def labels(self, words, facts):
        return [facts["symbols"].index(unit) + 1 for unit in self.units(words)]

    def targets(self, labels):
        rows = [torch.tensor(row) for row in labels]
        return {
            "labels": pad_sequence(rows, batch_first=True),
            "counts": torch.tensor([len(r) for r in rows]),
        }

    def build(self, facts):
        self.symbols = facts["symbols"]
        return self.network(len(self.symbols) + 1, output="steps", time_pools=self.time_pools)

    def loss(self, outputs, batch):
        return ctc.loss(*outputs, **batch.targets), len(batch.targets["counts"])

    def metrics(self, facts):
        from torchmetrics import MeanMetric
        from torchmetrics.text import WordErrorRate

        return {"wer": WordErrorRate(), "whole_strings": MeanMetric()}

    def update(self, metrics, model, outputs, batch):
        heard = [self.text(found.labels) for found in ctc.greedy(*outputs)]
        rows = zip(batch.targets["labels"].tolist(), batch.targets["counts"].tolist(), strict=True)
        said = [self.text(row[:count]) for row, count in rows]
        metrics["wer"].update(heard, said)
        whole = [float(a == b) for a, b in zip(heard, said, strict=True)]
        metrics["whole_strings"].update(torch.tensor(whole))

    def results(self, metrics):
        found = super().results(metrics)
        return {**found, "word_accuracy": 1 - found["wer"]}

    def text(self, labels):
        """The words of a list of classes."""
        return self.joint().join(self.symbols[label - 1] for label in labels)

    def joint(self):
        return " " if self.settings.units == "words" else ""

    # ---- what the user sees ----

    def predict(self, model, batch, facts):
        """[{"text", "units": [{"unit", "step", "seconds", "probability"}]}]: where each begins, and the
        highest probability that the model gave it there. Where nothing was heard there is "nearest" too, a
        list of the one unit that came nearest to it."""
        outputs = self.forward(model, batch)
        step = spectrogram.HOP / spectrogram.SAMPLE_RATE * model.time_reduction
        predictions = []
        for found, nearest in zip(ctc.greedy(*outputs), ctc.likeliest(*outputs), strict=True):
            said = {"text": self.text(found.labels), "units": self.units_of(found, step)}
            if not said["units"]:
                said["nearest"] = self.units_of(nearest, step)
            predictions.append(said)
        return predictions

    def units_of(self, decoded, seconds):
        """What :meth:`predict` tells of each label; seconds: of a step."""
        return [
            {
                "unit": self.symbols[label - 1],
                "step": step,
                "seconds": round(step * seconds, 3),
                "probability": likely,
            }
            for label, step, likely in zip(*decoded, strict=True)
        ]

    def describe(self, prediction):
        """The text; a unit that the model was not sure of with its probability."""
        told = [
            unit["unit"] if unit["probability"] > DOUBTFUL else f"{unit['unit']} ({unit['probability']:.0%})"
            for unit in prediction["units"]
        ]
        return self.joint().join(told) or "nothing"

    def text_of(self, prediction):
        return prediction["text"]

    def places(self, prediction, facts):
        """(step, class) of each unit, or of the one that came nearest."""
        units = prediction["units"] or prediction["nearest"]
        return [(unit["step"], facts["symbols"].index(unit["unit"]) + 1) for unit in units]

    def marks(self, prediction):
        if not prediction["units"]:
            return [(u["seconds"], f"{u['unit']}? {u['probability']:.0%}") for u in prediction["nearest"]]
        return [(unit["seconds"], unit["unit"]) for unit in prediction["units"]]

    def pictures(self, folder, model, data, results):
        return [self.examples(folder, model, data)]


def _digits_in_order(word):
    """Sorts digits as numbers and everything else, behind them, by the alphabet."""
    return (speech.DIGITS.index(word), "") if word in speech.DIGITS else (len(speech.DIGITS), word)
