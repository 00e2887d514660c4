"""What all readers of the user's own files share: the record of bad ones, the split."""

import sys
from collections import defaultdict

from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.draws import order

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # shares of each class
SHOWN = 20  # bad files named one by one


class BadFiles:
    """Collects what cannot be used, by name and reason; ``choice``, the option --bad-files, decides at last.

    "refuse": :meth:`settle` raises RecipeError; "skip": it names them on stderr, and the rest is used.
    """

    def __init__(self, choice):
        self.choice = choice
        self.found = []

    def add(self, name, reason):
        """name: a path, or a place in a file ("names.csv, line 3")."""
        self.found.append((str(name), reason))

    def settle(self):
        """The report [{"name", "reason"}] of what was skipped. Raises RecipeError on "refuse" if anything was
        found."""
        if self.found:
            lines = [f"  {name}: {reason}" for name, reason in self.found[:SHOWN]]
            if len(self.found) > SHOWN:
                lines.append(f"  … and {len(self.found) - SHOWN} more")
            text = "\n".join(lines)
            if self.choice == "refuse":
                raise RecipeError(
                    f"{len(self.found)} bad file(s) or line(s); nothing was written "
                    f"(--bad-files skip leaves them out):\n{text}"
                )
            print(f"Skipped, {len(self.found)} bad file(s) or line(s):\n{text}", file=sys.stderr)
        return [{"name": name, "reason": reason} for name, reason in self.found]


def short(text):
    """The text as a message quotes it: at most its first 30 characters."""
    return repr(text if len(text) <= 30 else text[:29] + "…")


def unambiguous(names, labels, contents, what, bad):
    """The rows whose content is there once, or first of several with the same label.

    Of several labels at least one is wrong, and nobody knows which: all of them go to ``bad``. Of one label
    the copies do: one of them could be trained on and another tested with.

    Args:
        names, labels, contents: of each row; texts, and anything that can be hashed.
        what: such a row is called in messages ("clip").
        bad: :class:`BadFiles`.
    """
    rows_of = defaultdict(list)
    for row, content in enumerate(contents):
        rows_of[content].append(row)
    kept = []
    for same in rows_of.values():
        said = sorted({labels[row] for row in same})
        if len(said) > 1:
            places = list(dict.fromkeys(names[row] for row in same))  # a table can name a file twice
            for name in places:
                others = ", ".join(other for other in places if other != name)
                told = f"mislabelled: the same {what} has the labels {', '.join(map(short, said))}"
                bad.add(name, f"{told} ({others})" if others else told)
            continue
        kept.append(same[0])
        for row in same[1:]:
            bad.add(names[row], f"a copy of {names[same[0]]}")
    return kept


def split_rows(labels, seed, shares=SPLITS):
    """{split: sorted rows}: the same share of every label in each split, drawn from ``seed``.

    labels: one hashable value a row. Of a label with few rows the last split of ``shares`` gets one at least,
    then the one before it; the first has the rest, at least one.
    """
    rows_of = defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    parts = {name: [] for name in shares}
    names = list(shares)
    for number, rows in enumerate(rows_of.values()):
        rows = [rows[i] for i in order(len(rows), seed, number)]
        counts = {}
        for name in reversed(names[1:]):  # the first split has the rest: at least a row, like each of them
            left = len(rows) - sum(counts.values()) - 1
            counts[name] = min(left, max(1, int(shares[name] * len(rows))))
        counts[names[0]] = len(rows) - sum(counts.values())
        start = 0
        for name in names:
            parts[name] += rows[start : start + counts[name]]
            start += counts[name]
    return {name: sorted(rows) for name, rows in parts.items()}
