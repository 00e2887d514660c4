"""Texts as numbers: characters or words."""

import re
from collections import Counter

import torch

PADDING, UNKNOWN, BEGIN, END = range(4)
SPECIAL = 4  # ids that are no piece
BEGINS, ENDS = "⊢", "⊣"  # what stands for them in pictures
WORDS = re.compile(r"\w+|[^\w\s]")
MOST = 20_000  # words of a vocabulary


def pieces(text, kind):
    """The text's characters, or its words and punctuation marks without regard to capitals."""
    return list(text) if kind == "characters" else WORDS.findall(text.casefold())


def vocabulary(texts, kind):
    """The pieces that occur at least twice, the most frequent first."""
    counts = Counter(piece for text in texts for piece in pieces(text, kind))
    return [piece for piece, count in counts.most_common(MOST) if count > 1]


class Encoder:
    """Texts to token ids: BEGIN, the pieces of a ``vocabulary`` (its first has id 4), END."""

    def __init__(self, vocabulary, kind, longest):
        self.kind, self.longest = kind, longest
        self.ids = {piece: number for number, piece in enumerate(vocabulary, SPECIAL)}

    def __len__(self):
        return SPECIAL + len(self.ids)

    def encode(self, text):
        """A list of ids; of at most ``longest`` pieces."""
        found = pieces(text, self.kind)[: self.longest]
        return [BEGIN, *(self.ids.get(piece, UNKNOWN) for piece in found), END]

    def shown(self, text):
        """What stands in a picture for each id of :meth:`encode`: [(piece, whether it has an id)]."""
        found = pieces(text, self.kind)[: self.longest]
        return [(BEGINS, True), *((piece, piece in self.ids) for piece in found), (ENDS, True)]


def padded(rows):
    """(tokens [N, T] int64, lengths [N]) of lists of ids."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), max(map(len, rows))), PADDING)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    return tokens, lengths
