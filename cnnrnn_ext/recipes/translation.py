"""Translation: names and short texts into other languages. RNN → RNN with attention, by characters."""

from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cnnrnn_ext.models import Seq2Seq
from cnnrnn_ext.recipes.base import Batch, Data, Recipe, RecipeError
from cnnrnn_ext.recipes.data import translation
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.draws import picked
from cnnrnn_ext.recipes.options import positive

PAD, BEGIN, END, UNKNOWN = range(4)  # ids that stand for no character
SMOOTHING = 0.1  # of the labels, in the loss: less sure, and better ranked by the beam search
EXAMPLES = 24
FEW = {"train": 128, "validation": 32, "test": 32}  # pairs of --quick


class Alphabet:
    """Texts to ids and back: PAD, BEGIN, END, UNKNOWN, then a token for each language, then the
    characters."""

    def __init__(self, facts):
        self.languages, self.characters = facts["languages"], facts["characters"]
        self.first = UNKNOWN + 1 + len(self.languages)
        self.ids = {character: self.first + i for i, character in enumerate(self.characters)}

    def __len__(self):
        return self.first + len(self.characters)

    def source(self, text, language):
        """The encoder's tokens: the language wanted, the characters, END."""
        return torch.tensor([UNKNOWN + 1 + self.languages.index(language), *self._ids(text), END])

    def target(self, text):
        """The decoder's tokens: BEGIN, the characters, END."""
        return torch.tensor([BEGIN, *self._ids(text), END])

    def _ids(self, text):
        return [self.ids.get(character, UNKNOWN) for character in text]

    def text(self, ids):
        """The characters of generated tokens up to END; UNKNOWN is written as ?."""
        ids = ids[: ids.index(END)] if END in ids else ids
        return "".join("?" if i < self.first else self.characters[i - self.first] for i in ids)


class Translation(Recipe):
    """Names and interface strings from English to French, German and Spanish, or pairs of the user's own.

    One network for all languages: the first token of the source says which one is wanted. Answers are found
    by beam search, in evaluation too. Metrics: ``exact_match``, ``chrf`` (M. Popović 2015: F-score of
    character n-grams, here 0 … 1).
    """

    name = "translation"
    needs = {"babel": "Babel", "django": "django", "sacrebleu": "sacrebleu"}  # noqa: RUF012
    epochs = 18
    batch_size = 64
    rate = 4e-3
    score = "exact_match"

    @classmethod
    def add_arguments(cls, parser):
        parser.add_argument(
            "--longest",
            type=positive,
            default=translation.LONGEST,
            metavar="CHARACTERS",
            help="longer sources and targets are left out (default %(default)s)",
        )
        parser.add_argument("--rnn", choices=("lstm", "gru"), default="lstm", help="(default lstm)")
        parser.add_argument("--hidden", type=positive, default=192, help="size of the RNNs (default 192)")
        parser.add_argument("--beam", type=positive, default=4,
                            help="hypotheses of the search for an answer (default 4; 1: greedy)")  # fmt: skip

    @classmethod
    def add_inputs(cls, parser):
        parser.add_argument("texts", nargs="*", help="texts to translate")
        parser.add_argument(
            "--to", metavar="LANGUAGE", help="fr, de or es, or one of your data's (default: all)"
        )

    # ---- data ----

    def load(self, facts=None):
        settings, report = self.settings, {}
        if settings.data is None:
            pairs = translation.embedded_pairs(settings.longest)
            report["source"] = "CLDR (Babel), Django's catalogues"
        else:
            bad, path = BadFiles(settings.bad_files), Path(settings.data)
            try:
                known = facts["languages"] if facts else None
                pairs = translation.read_pairs(path, settings.longest, bad, known)
            except OSError as error:
                raise RecipeError(f"{path}: expected a table of pairs: {error.strerror}") from error
            report |= {"source": settings.data, "skipped": bad.settle()}
            if not len(pairs):
                raise RecipeError(f"{path}: no pairs that can be used")
        splits = translation.split_pairs(pairs, settings.seed)
        if settings.quick:
            splits = {
                name: part.subset(sorted(picked(len(part), settings.seed, FEW[name])))
                for name, part in splits.items()
            }
        facts = facts or facts_of(splits["train"], pairs.languages)
        self._know(facts)
        report["pairs"] = {split: len(part) for split, part in splits.items()}
        return Data(splits, facts, report)

    def read(self, arguments, facts):
        if not arguments.texts:
            return None
        languages = facts["languages"] if arguments.to is None else [arguments.to]
        if languages[0] not in facts["languages"]:
            raise RecipeError(f"--to {arguments.to}: the model knows {', '.join(facts['languages'])}")
        asked = [(text, language) for text in arguments.texts for language in languages]
        texts, wanted = map(list, zip(*asked, strict=True))
        names = [f"{text} ({language})" if language else text for text, language in asked]
        return translation.Pairs(texts, [None] * len(asked), wanted, [""] * len(asked)), names

    def build(self, facts):
        self._know(facts)
        size = len(self.alphabet)
        special = {"padding_id": PAD, "begin_id": BEGIN, "end_id": END}
        sizes = {"embedding_size": 64, "hidden_size": self.settings.hidden, "dropout": 0.3}
        return Seq2Seq(size, size, rnn=self.settings.rnn, **sizes, **special)

    def _know(self, facts):
        self.alphabet, self.longest = Alphabet(facts), facts["longest"]

    def batch(self, split, rows, draws=None):
        sources = [self.alphabet.source(split.sources[row], split.languages[row]) for row in rows]
        targets = [split.targets[row] for row in rows]
        lengths = torch.tensor([len(source) for source in sources])
        sources = pad_sequence(sources, batch_first=True, padding_value=PAD)
        if None in targets:
            return Batch((sources, torch.full((len(rows), 1), BEGIN), lengths))
        targets = pad_sequence(
            [self.alphabet.target(t) for t in targets], batch_first=True, padding_value=PAD
        )
        return Batch((sources, targets[:, :-1], lengths), targets[:, 1:])

    # ---- training and evaluation ----

    def loss(self, outputs, batch):
        total = F.cross_entropy(
            outputs.flatten(0, 1), batch.targets.flatten(), ignore_index=PAD, reduction="sum",
            label_smoothing=SMOOTHING,
        )  # fmt: skip
        return total, (batch.targets != PAD).sum()

    def metrics(self, facts):
        from torchmetrics import MeanMetric

        return {"exact_match": MeanMetric(), "chrf": MeanMetric()}

    def update(self, metrics, model, outputs, batch):
        said = [self.alphabet.text(row) for row in self.generate(model, batch).tokens.tolist()]
        right = [self.alphabet.text(row) for row in batch.targets.tolist()]
        for name, values in scores_of_each(said, right).items():
            metrics[name].update(torch.tensor(values))

    def generate(self, model, batch):
        source, _, lengths = batch.inputs
        return model.generate(source, lengths, max_length=self.longest, beam_size=self.settings.beam)

    def further_figures(self, model, data):
        """The copy baseline (the source as the answer), and the test split's parts."""
        split = data.splits["test"]
        said = self.translate(model, split)
        figures = {
            "corpus_chrf": scores(said, split.targets)["corpus_chrf"],
            "copy": scores(split.sources, split.targets),
        }
        for name, column in (("by_language", split.languages), ("by_kind", split.kinds)):
            if len(set(column)) < 2:
                continue
            figures[name] = {}
            for value in sorted(set(column)):
                rows = [row for row, other in enumerate(column) if other == value]
                source, answer, right = (
                    [texts[row] for row in rows] for texts in (split.sources, said, split.targets)
                )
                figures[name][value] = {
                    "pairs": len(rows),
                    "exact_match": scores(answer, right)["exact_match"],
                    "copy": scores(source, right)["exact_match"],
                }
        return figures

    @torch.no_grad()
    def translate(self, model, split, size=64):
        """What the model makes of every row of a split: a list of texts."""
        said = []
        for start in range(0, len(split), size):
            batch = self.batch(split, range(start, min(start + size, len(split))))
            said += [self.alphabet.text(row) for row in self.generate(model, batch).tokens.tolist()]
        return said

    # ---- what the user sees ----

    def predict(self, model, batch, facts):
        """[{"text", "score"}]: the best answer of the beam, with the mean log-probability of its tokens."""
        found = self.generate(model, batch)
        texts = [self.alphabet.text(row) for row in found.tokens.tolist()]
        return [{"text": t, "score": score} for t, score in zip(texts, found.scores.tolist(), strict=True)]

    def describe(self, prediction):
        return prediction["text"]

    def draw(self, path, split, names, predictions, facts):
        from cnnrnn_ext.recipes import drawing_translation

        rows = [
            (language, source, said["text"], None)
            for language, source, said in zip(split.languages, split.sources, predictions, strict=True)
        ]
        title = f"{len(rows)} translation(s)"
        drawing_translation.examples(path, title, "Made character by character.", rows[:EXAMPLES])

    def pictures(self, folder, model, data, results):
        """examples.png, a table; attention.png, of the longest of these that is right."""
        from cnnrnn_ext.recipes import drawing_translation

        split, path = data.splits["test"], folder / "examples.png"
        part = split.subset(picked(len(split), self.settings.seed, EXAMPLES))
        said = self.translate(model, part)
        title = f"{results['exact_match']:.1%} translated exactly"
        subtitle = f"{len(part)} of the {len(split)} pairs of the test split, drawn at random."
        table = list(zip(part.languages, part.sources, said, part.targets, strict=True))
        drawing_translation.examples(path, title, subtitle, table)
        chosen = max(range(len(part)), key=lambda row: (said[row] == part.targets[row], len(said[row])))
        self.explain(folder / "attention.png", model, part, chosen, part.sources[chosen], data.facts)
        return [path, folder / "attention.png"]

    def explain(self, path, model, split, row, name, facts):
        """The decoder's attention over the source's characters."""
        from cnnrnn_ext.recipes import drawing_translation

        found = self.generate(model, self.batch(split, [row]))
        text = self.alphabet.text(found.tokens[0].tolist())
        read = [split.languages[row] or "to", *split.sources[row], "end"]
        written = [*text, "end"][: int(found.lengths[0])]
        weights = found.attention[0, : len(written), : len(read)]
        note = "Each row sums to 1: the attention of a written character over those that were read."
        drawing_translation.attention(path, f"{name} → {text}", read, written, weights, note)
        return f"{name} → {text}; each row of the picture: which characters that one was made from"


def facts_of(train, languages):
    """What the model must know of the data: the characters of the training split, languages, longest
    answer."""
    return {
        "characters": sorted({character for text in (*train.sources, *train.targets) for character in text}),
        "languages": sorted(set(languages)),
        "longest": max(map(len, train.targets)) + 1,
    }


def scores_of_each(said, right):
    """{"exact_match", "chrf"}: a list of the scores of each text against the right one, 0 … 1."""
    from sacrebleu.metrics import CHRF

    chrf, pairs = CHRF(), list(zip(said, right, strict=True))
    return {
        "exact_match": [float(a == b) for a, b in pairs],
        "chrf": [chrf.sentence_score(a, [b]).score / 100 for a, b in pairs],
    }


def scores(said, right):
    """The means of :func:`scores_of_each`, and "corpus_chrf", of all texts' n-grams counted together, 0 …
    1."""
    from sacrebleu.metrics import CHRF

    means = {name: sum(values) / max(len(values), 1) for name, values in scores_of_each(said, right).items()}
    return {**means, "corpus_chrf": CHRF().corpus_score(said, [right]).score / 100}
