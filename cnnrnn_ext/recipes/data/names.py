"""The embedded texts: names of places, languages, scripts and currencies in twelve languages, from Unicode's
CLDR, which Babel carries.

A name's key is what it names, the same in all languages ("territory DE"). The split is by key: what the test
asks about, training has seen in no language. Two rules keep the question fair:

- A string that is the same in several of the languages ("Angola") has no right answer: it is left out, in all
  of them, and counted.
- Keys that share a string (a language and a script of one name) go to the same split: no string is in two.
"""

from collections import Counter, defaultdict

from cnnrnn_ext.recipes.data.files import split_rows

LANGUAGES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "it": "Italian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "sv": "Swedish",
}
KINDS = {  # kind: the table's name in Babel
    "territory": "territories",
    "language": "languages",
    "script": "scripts",
    "currency": "currencies",
}
SOURCE = "names of places, languages, scripts and currencies in Unicode's CLDR, as Babel carries them"


def load(seed, quick=False):
    """({split: [(name, language)]}, report). The same key is in one split only, and so is the same string."""
    found = _all_names()
    languages_of = defaultdict(set)
    for _, text, language in found:
        languages_of[_folded(text)].add(language)
    kept = [entry for entry in found if len(languages_of[_folded(entry[1])]) == 1]
    group = _groups(kept)
    groups = sorted(set(group.values()))
    if quick:
        groups = groups[:: len(groups) // 60]
    parts = {
        name: {groups[row] for row in rows}
        for name, rows in split_rows([key.split()[0] for key in groups], seed).items()
    }
    splits = {
        name: _distinct((text, LANGUAGES[language]) for key, text, language in kept if group[key] in chosen)
        for name, chosen in parts.items()
    }
    shared = {text for text, languages in languages_of.items() if len(languages) > 1}
    report = {
        "source": SOURCE,
        "names": {name: len(split) for name, split in splits.items()},
        "languages": dict(Counter(language for split in splits.values() for _, language in split)),
        "left_out": {
            "why": "the same string in several of the languages: no answer would be right",
            "strings": len(shared),
            "names": len(found) - len(kept),
        },
    }
    return splits, report


def _all_names():
    """[(key, text, language code)], in a fixed order."""
    from babel import Locale

    found = []
    for language in LANGUAGES:
        locale = Locale(language)
        for kind, table in KINDS.items():
            for code, text in sorted(getattr(locale, table).items()):
                if any(letter.isalpha() for letter in text):
                    found.append((f"{kind} {code}", text, language))
    return found


def _folded(text):
    """Strings that differ in nothing but capitals are the same."""
    return text.casefold()


def _groups(entries):
    """{key: the group's name}: keys that share a string are of one group, named like its first key."""
    parent = {key: key for key, _, _ in entries}

    def root(key):
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first = {}
    for key, text, _ in entries:
        one, other = sorted((root(key), root(first.setdefault(_folded(text), key))))
        parent[other] = one
    return {key: root(key) for key in parent}


def _distinct(pairs):
    """Without the repetitions of a string, in order."""
    seen = {}
    for text, language in pairs:
        seen.setdefault(_folded(text), (text, language))
    return list(seen.values())
