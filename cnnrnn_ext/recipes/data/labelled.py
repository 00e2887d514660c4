"""The user's own texts: a table text, label as CSV or TSV.

With a header that names a column ``text`` and one ``label``, in any order and among others, or without a
header: then the first column is the text and the second the label. UTF-8; ``.tsv`` and ``.tab`` are split at
tabs, all else at commas, with double quotes around what contains them.
"""

import csv
from collections import defaultdict
from pathlib import Path

from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.data.files import short, split_rows

FEWEST = 3  # texts of a label: one for each split


def load(path, seed, bad, known=None):
    """({split: [(text, label)]}, labels, report).

    The same text is there once; a text of several labels is a bad line: nobody knows which is right. bad:
    files.BadFiles. known: the labels of a trained model; others are bad lines, and few texts will do.
    """
    path = Path(path)
    entries = _read(path, bad)
    lines = defaultdict(list)
    for line, text, label in entries:
        if known and label not in known:
            bad.add(f"{path}, line {line}", f"the model knows no label {label!r}")
        else:
            lines[text].append((line, label))
    kept, repeated = [], 0
    for text, found in lines.items():
        labels = sorted({label for _, label in found})
        if len(labels) > 1:
            for line, label in found:
                told = f"mislabelled: {short(text)} is {label!r} here, and elsewhere another of {labels}"
                bad.add(f"{path}, line {line}", told)
        else:
            kept.append((text, labels[0]))
            repeated += len(found) - 1
    report = {"source": str(path), "repeated": repeated, "skipped": bad.settle()}
    labels = known or sorted({label for _, label in kept})
    counts = {label: sum(label == other for _, other in kept) for label in labels}
    if not kept:
        raise RecipeError(f"{path}: no usable line of a known label")
    if known is None:
        _check(path, counts)
    parts = split_rows([label for _, label in kept], seed)
    splits = {name: [kept[row] for row in rows] for name, rows in parts.items()}
    return splits, labels, {**report, "texts": counts}


def lines_of(path, bad):
    """[(name, text)] of a plain text file, one a line; of a CSV or TSV table, its column of texts."""
    if path.suffix.lower() in (".csv", ".tsv", ".tab"):
        return [(f"{path.name}, line {line}", text) for line, text, _ in _read(path, bad, label=False)]
    lines = enumerate(_content(path).splitlines(), 1)
    return [(f"{path.name}, line {number}", line.strip()) for number, line in lines if line.strip()]


def _content(path):
    """The file's text; what is not UTF-8 becomes lone surrogates, which :func:`_broken` finds."""
    try:
        return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise RecipeError(f"{path}: expected a file of texts: {error.strerror}") from error


def _broken(text):
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _read(path, bad, label=True):
    """[(line, text, label)] of the usable lines; without ``label`` a text alone will do."""
    content = _content(path)
    if not content.strip():
        raise RecipeError(f"{path}: an empty file")
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    rows = csv.reader(content.splitlines(keepends=True), delimiter=delimiter, strict=True)
    found, columns = [], None
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            bad.add(f"{path}, line {rows.line_num}", f"not {path.suffix[1:].upper()}: {error}")
            continue
        if row is None:
            return found
        if columns is None:
            names = [name.strip().lower() for name in row]
            columns = (0, 1)
            if "text" in names and (not label or "label" in names):
                columns = (names.index("text"), names.index("label") if "label" in names else None)
                continue
        if not row:
            continue
        place = f"{path}, line {rows.line_num}"
        text, given = (row[i].strip() if i is not None and i < len(row) else None for i in columns)
        if _broken("".join(row)):
            bad.add(place, "not UTF-8")
        elif not text:
            bad.add(place, "an empty text")
        elif label and not given:
            bad.add(place, f"no label for {short(text)}")
        else:
            found.append((rows.line_num, text, given))


def _check(path, counts):
    if len(counts) < 2:
        raise RecipeError(f"{path}: only the label {', '.join(counts)}; at least two are needed")
    few = [f"{label} ({count})" for label, count in counts.items() if count < FEWEST]
    if few:
        raise RecipeError(f"{path}: each label needs at least {FEWEST} texts; too few: {', '.join(few)}")
