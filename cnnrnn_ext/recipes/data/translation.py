"""Pairs of strings, English → French, German, Spanish: names from CLDR (Babel) and user interface strings
(Django).

Both come with installed packages: CLDR's data with Babel, the catalogues (made from its ``.po`` files) with
Django. Everything that CLDR or Django's translators left in English on purpose is in too, so that copying the
source is a fair baseline.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cnnrnn_ext.recipes.data.files import split_rows
from cnnrnn_ext.recipes.data.tables import read_rows

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}
NAMES = ("territories", "languages", "scripts", "variants", "currencies")  # attributes of a Babel locale
SHARES = {"train": 0.8, "validation": 0.06, "test": 0.14}
LONGEST = 40  # characters; longer strings are left out


@dataclass(frozen=True)
class Pairs:
    """sources, targets: strings; languages: of the target (a key of ``LANGUAGES``, or "" for own data);
    kinds: where the pair comes from."""

    sources: list
    targets: list
    languages: list
    kinds: list

    def __len__(self):
        return len(self.sources)

    def subset(self, rows):
        return Pairs(*([column[row] for row in rows] for column in vars(self).values()))


def embedded_pairs(longest=LONGEST):
    """:class:`Pairs` of all sources, one target for each source and language: the most frequent one."""
    found = {}
    for language in LANGUAGES:
        for kind, source, target in (*_cldr(language), *_django(language)):
            source, target = " ".join(source.split()), " ".join(target.split())
            if source and target and max(len(source), len(target)) <= longest:
                found.setdefault((source, language), []).append((target, kind))
    rows = []
    for (source, language), candidates in found.items():
        target, _ = Counter(target for target, _ in candidates).most_common(1)[0]
        rows.append((source, target, language, next(kind for t, kind in candidates if t == target)))
    return Pairs(*map(list, zip(*rows, strict=True)))


def _cldr(language):
    """(kind, English, translation) of CLDR's names."""
    from babel import Locale

    english, other = Locale("en"), Locale(language)
    for kind in NAMES:
        names = getattr(other, kind)
        for code, name in getattr(english, kind).items():
            if code in names:
                yield kind, name, names[code]
    tables = (
        ("currencies", english._data["currency_names_plural"], other._data["currency_names_plural"]),
        ("units", english._data["unit_display_names"], other._data["unit_display_names"]),
        ("time zones", english._data["meta_zones"], other._data["meta_zones"]),
        ("time zones", english._data["time_zones"], other._data["time_zones"]),
    )
    for kind, ours, theirs in tables:
        for path, name in _leaves(ours):
            translated = dict(_leaves(theirs.get(path[0], {}), path[:1])).get(path)
            if translated is not None:
                yield kind, name, translated


def _leaves(table, path=()):
    """((key, key, …), string) of nested mappings."""
    if isinstance(table, str):
        yield path, table
    elif table is not None:
        for key in table:
            yield from _leaves(table[key], (*path, key))


def _django(language):
    """(kind, English, translation) of the catalogues in the installed Django package."""
    import django
    from babel.messages.mofile import read_mo

    for path in sorted(Path(django.__file__).parent.rglob(f"locale/{language}/LC_MESSAGES/*.mo")):
        with open(path, "rb") as file:
            for message in read_mo(file):
                if message.id and isinstance(message.id, str):  # not the header, nor plurals
                    yield "interface", message.id, message.string


def gist(source):
    """What two sources share that differ in case, punctuation, placeholders or a plural only: they belong in
    one split, or the test would ask for what training showed."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"%\(\w+\)\w|\{\w*\}|%\w", " ", source.casefold()))
    return " ".join(re.sub(r"(?<=[^s]{2})s$", "", word) for word in words)


def read_pairs(table, longest, bad, known=None):
    """:class:`Pairs` of a table of the user's, one line each: ``source<TAB>target``, and perhaps a third
    column for the target's language. UTF-8; a first line may name the columns (source, target, language),
    which then stand in any order. What cannot be used, pairs of more than ``longest`` characters, and those
    into languages other than ``known``, if given, go to ``bad``."""
    found = Pairs([], [], [], [])
    for place, (source, target, language) in read_rows(table, bad, ("source", "target"), ("language",)):
        length = max(len(source), len(target))
        if length > longest:
            bad.add(place, f"{length} characters (--longest {longest})")
            continue
        if known is not None and language not in known:
            told = f"into {language!r}" if language else "no language"
            bad.add(
                place, f"{told}; the model knows {', '.join(filter(None, known)) or 'one without a name'}"
            )
            continue
        for column, value in zip(vars(found).values(), (source, target, language, "own"), strict=True):
            column.append(value)
    return found


def split_pairs(pairs, seed):
    """{split: Pairs}: all pairs whose sources have the same :func:`gist` in one split."""
    gists = [gist(source) or source for source in pairs.sources]
    unique = list(dict.fromkeys(gists))
    split_of = {
        unique[row]: split
        for split, rows in split_rows([0] * len(unique), seed, SHARES).items()
        for row in rows
    }
    return {
        split: pairs.subset([row for row, words in enumerate(gists) if split_of[words] == split])
        for split in SHARES
    }
