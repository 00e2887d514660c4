"""Text: an RNN puts each character into its context, convolutions look for patterns there."""

import sys
from pathlib import Path

import torch

from cnnrnn_ext.models import RNNCNN
from cnnrnn_ext.recipes.base import Batch, Data, RecipeError
from cnnrnn_ext.recipes.classification import Classification
from cnnrnn_ext.recipes.data import labelled, names, tokens
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.draws import picked
from cnnrnn_ext.recipes.options import positive

EXAMPLES = 24  # in a picture
CONFUSED = 0.1  # probability that a training token is replaced by "unknown"


class Texts:
    """Texts and their labels' numbers [N], -1 where unknown; names for messages."""

    def __init__(self, texts, labels, encoder, names=None):
        self.texts, self.labels, self.names = texts, torch.tensor(labels), names or texts
        self.rows = [encoder.encode(text) for text in texts]

    def __len__(self):
        return len(self.texts)


class Text(Classification):
    """Texts → labels.

    Embedded data: :mod:`names`, which of twelve languages a name is in. Own data: ``--data`` with a table
    text, label, see :mod:`labelled`.
    """

    name = "text"
    needs = {"babel": "Babel"}  # noqa: RUF012 - a constant, as in base
    epochs = 16
    batch_size = 64
    rate = 3e-3
    quick = {"epochs": 2, "hidden_size": 16, "channels": 16}  # noqa: RUF012

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument(
            "--tokens", choices=("characters", "words"), default="characters", help="what the RNN reads"
        )
        parser.add_argument("--longest", type=positive, default=200, help="tokens of a text, at most (200)")
        parser.add_argument("--rnn", choices=("lstm", "gru", "rnn", "rnn_relu"), default="lstm")
        parser.add_argument("--hidden-size", type=positive, help="of each direction of the RNN (default 128)")
        parser.add_argument("--channels", type=positive, help="patterns of each width (default 128)")

    @classmethod
    def add_inputs(cls, parser):
        parser.add_argument(
            "inputs", nargs="*", metavar="TEXT",
            help="texts; - reads standard input, a text on each line",
        )  # fmt: skip
        parser.add_argument(
            "--file", type=Path, help="a file with a text on each line, or a CSV or TSV table"
        )

    # ---- data and model ----

    def load(self, facts=None):
        settings = self.settings
        if settings.data:
            bad = BadFiles(settings.bad_files)
            known = facts["classes"]["label"] if facts else None
            splits, labels, report = labelled.load(settings.data, settings.seed, bad, known)
        else:
            splits, report = names.load(settings.seed, settings.quick)
            labels = sorted(names.LANGUAGES.values())
        if facts is None:
            texts = [text for text, _ in splits["train"]]
            facts = {
                "classes": {"label": labels},
                "tokens": settings.tokens,
                "longest": settings.longest,
                "vocabulary": tokens.vocabulary(texts, settings.tokens),
            }
        number = {label: row for row, label in enumerate(facts["classes"]["label"])}
        encoder = self._encoder(facts)
        return Data(
            {
                name: Texts([text for text, _ in pairs], [number[label] for _, label in pairs], encoder)
                for name, pairs in splits.items()
            },
            facts,
            report,
        )

    def _encoder(self, facts):
        return tokens.Encoder(facts["vocabulary"], facts["tokens"], facts["longest"])

    def read(self, arguments, facts):
        bad = BadFiles(self.settings.bad_files)
        found = []
        for text in arguments.inputs:
            lines = sys.stdin.read().splitlines() if text == "-" else [text]
            found += [(line.strip(), line.strip()) for line in lines if line.strip()]
        if arguments.file:
            found += labelled.lines_of(arguments.file, bad)
            bad.settle()
        if not found:
            if arguments.inputs or arguments.file:
                raise RecipeError("no text in what was named")
            return None
        texts = [text for _, text in found]
        return Texts(texts, [-1] * len(texts), self._encoder(facts), [name for name, _ in found]), [
            name for name, _ in found
        ]

    def build(self, facts):
        settings = self.settings
        return RNNCNN(
            len(self._encoder(facts)),
            {head: len(labels) for head, labels in facts["classes"].items()},
            embedding_size=64,
            hidden_size=settings.hidden_size or 128,
            rnn=settings.rnn,
            channels=settings.channels or 128,
            dropout=0.3,
        )

    def batch(self, split, rows, draws=None):
        ids, lengths = tokens.padded([split.rows[row] for row in rows])
        if draws is not None:
            confused = draws.uniform(ids.shape[1]) < CONFUSED
            ids = ids.masked_fill(confused & (ids > tokens.END), tokens.UNKNOWN)
        return Batch((ids, lengths), {"label": split.labels[rows]})

    def further_figures(self, model, data):
        """The accuracy of a logistic regression on character n-grams, on the same splits."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from threadpoolctl import threadpool_limits

        baseline = make_pipeline(
            TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), min_df=2, sublinear_tf=True),
            LogisticRegression(C=10, max_iter=300),
        )
        train, test = data.splits["train"], data.splits["test"]
        with threadpool_limits(1):  # its products are small: on a busy machine more threads only wait
            baseline.fit(train.texts, train.labels.numpy())
            return {"baseline": {"accuracy": baseline.score(test.texts, test.labels.numpy())}}

    def draw(self, path, split, names, predictions, facts):
        from cnnrnn_ext.recipes import drawing_text

        title, pairs = f"{len(names)} text(s)", zip(split.texts, predictions, strict=True)
        rows = [(text, self.describe(said), None) for text, said in pairs]
        subtitle = f"The first {EXAMPLES}." if len(rows) > EXAMPLES else "What the model says of each."
        drawing_text.examples(path, title, subtitle, rows[:EXAMPLES])

    def pictures(self, folder, model, data, results):
        """The confusion matrix; examples.png, a table of test rows drawn at random."""
        from cnnrnn_ext.recipes import drawing_text

        split, facts = data.splits["test"], data.facts
        chosen = picked(len(split), self.settings.seed, EXAMPLES)
        with torch.no_grad():
            predictions = self.predict(model, self.batch(split, chosen), facts)
        rows = []
        for row, said in zip(chosen, predictions, strict=True):
            truth = facts["classes"]["label"][split.labels[row]]
            wrong = "" if said["label"]["class"] == truth else truth
            rows.append((split.texts[row], self.describe(said), wrong))
        title = f"{results['accuracy']:.1%} right"
        subtitle = f"{len(rows)} of the {len(split)} texts of the test split, drawn at random."
        path = folder / "examples.png"
        drawing_text.examples(path, title, subtitle, rows)
        return [*super().pictures(folder, model, data, results), path]

    def explain(self, path, model, split, row, name, facts):
        """Integrated gradients of the likeliest label and of its rival, of each token."""
        from cnnrnn_ext import explain
        from cnnrnn_ext.recipes import drawing_text

        batch = self.batch(split, [row])
        ids, lengths = batch.inputs
        said = self.predict(model, batch, facts)[0]
        labels = facts["classes"]["label"]
        shown = self._encoder(facts).shown(split.texts[row])
        heat = {}
        for label, probability in list(said["label"]["probabilities"].items())[:2]:
            values = explain.integrated_gradients(
                model, ids, labels.index(label), additional_forward_args=(lengths,), head="label"
            )
            heat[f"{label} {probability:.1%}"] = values[0].tolist()
        told = f"{name}: {self.describe(said)}"
        drawing_text.explanation(path, told, shown, heat)
        return told
