"""Connectionist temporal classification: from a label or blank at each step to a row of labels.

A. Graves et al., "Connectionist temporal classification", ICML 2006. Class 0 is the blank; label ``k`` of a
recipe's list is class ``k + 1``.
"""

import itertools
from typing import NamedTuple

from torch.nn import functional as F

BLANK = 0


class Decoded(NamedTuple):
    """labels: classes, without blanks and repetitions; steps: where each begins; probabilities: the highest
    that the model gives it in its run of steps."""

    labels: list
    steps: list
    probabilities: list


def loss(logits, lengths, labels, counts):
    """The sum over rows of -log p(labels), each divided by the number of its labels.

    logits [N, T, C]; lengths [N], steps of each row; labels [N, L], classes, padded; counts [N], labels of
    each row. A row's steps must be as many as :func:`steps_needed`, else its loss is infinite.
    """
    log_probabilities = logits.log_softmax(-1).transpose(0, 1)
    each = F.ctc_loss(log_probabilities, labels, lengths, counts, BLANK, reduction="none")
    return (each / counts.clamp(min=1)).sum()


def steps_needed(labels):
    """The fewest steps that can say a list of labels: a blank must part two equal neighbours."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def likeliest(logits, lengths):
    """[:class:`Decoded`] with the one label of each row, blanks apart, that had the highest probability: what
    comes nearest where :func:`greedy` finds none. Every row needs a step."""
    found = []
    for row, length in zip(logits.softmax(-1)[..., 1:], lengths.tolist(), strict=True):
        probability, place = row[:length].flatten().max(0)
        step, label = divmod(int(place), row.shape[1])
        found.append(Decoded([label + 1], [step], [probability.item()]))
    return found


def greedy(logits, lengths):
    """[:class:`Decoded`] of logits [N, T, C]: the likeliest class of each step, runs merged, blanks
    dropped."""
    found = []
    top = logits.softmax(-1).max(-1)
    for values, classes, length in zip(
        top.values.tolist(), top.indices.tolist(), lengths.tolist(), strict=True
    ):
        decoded, before = Decoded([], [], []), BLANK
        for step in range(length):
            label, probability = classes[step], values[step]
            if label == before != BLANK:
                decoded.probabilities[-1] = max(decoded.probabilities[-1], probability)
            elif label != BLANK:
                for column, value in zip(decoded, (label, step, probability), strict=True):
                    column.append(value)
            before = label
        found.append(decoded)
    return found
