"""The text recipe: no name leaks between splits, the user's own tables, good ones and bad ones."""

import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from _recipes import require, run

from cnnrnn_ext.recipes.base import RecipeError
from cnnrnn_ext.recipes.data import labelled, names, tokens
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.draws import Draws
from cnnrnn_ext.recipes.text import Text

require(Text)


# ---- the embedded names ----


@pytest.fixture(scope="module")
def loaded():
    return names.load(0)


@pytest.fixture(scope="module")
def source():
    """{language: {folded name: [keys]}}, from Babel."""
    from babel import Locale

    found = {}
    for code, language in names.LANGUAGES.items():
        texts = found[language] = {}
        for kind, table in names.KINDS.items():
            for key, text in getattr(Locale(code), table).items():
                texts.setdefault(text.casefold(), []).append((kind, key))
    return found


def test_no_string_is_in_two_splits_or_twice_in_one(loaded):
    splits, _ = loaded
    texts = {name: [text.casefold() for text, _ in pairs] for name, pairs in splits.items()}
    for found in texts.values():
        assert len(found) == len(set(found))
    for one, other in itertools.combinations(texts.values(), 2):
        assert not set(one) & set(other)


def test_no_key_is_in_two_splits(loaded, source):
    splits, _ = loaded
    keys = {
        name: {key for text, language in pairs for key in source[language][text.casefold()]}
        for name, pairs in splits.items()
    }
    assert all(len(found) > 100 for found in keys.values())
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other


def test_strings_of_several_languages_are_left_out_and_counted(loaded, source):
    splits, report = loaded
    shared = {
        text
        for texts in source.values()
        for text in texts
        if sum(text in other for other in source.values()) > 1 and any(letter.isalpha() for letter in text)
    }
    assert report["left_out"]["strings"] == len(shared) > 500
    assert "angola" in shared
    kept = {text.casefold() for pairs in splits.values() for text, _ in pairs}
    assert not kept & shared
    assert {language for text, language in splits["train"]} == set(names.LANGUAGES.values())
    for text, language in splits["test"]:
        assert text.casefold() in source[language]
    assert sum(report["names"].values()) == len(kept) > 9000


def test_splits_are_shares_and_of_the_seed(loaded):
    splits, report = loaded
    total = sum(report["names"].values())
    for name, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(len(splits[name]) / total - share) < 0.02
    assert names.load(0)[0] == splits
    assert names.load(1)[0]["test"] != splits["test"]


# ---- tokens ----


def test_characters_and_words():
    encoder = tokens.Encoder(["a", "b"], "characters", 3)
    assert encoder.encode("abca") == [tokens.BEGIN, 4, 5, tokens.UNKNOWN, tokens.END]
    assert len(encoder) == 6
    shown = [("⊢", True), ("a", True), ("b", True), ("c", False), ("⊣", True)]
    assert encoder.shown("abc") == shown
    assert len(encoder.encode("abc")) == len(shown)
    assert tokens.pieces("Don't stop, É!", "words") == ["don", "'", "t", "stop", ",", "é", "!"]
    assert tokens.vocabulary(["abb", "bcc"], "characters") == ["b", "c"]
    ids, lengths = tokens.padded([[2, 3], [2, 4, 5, 3]])
    assert ids.tolist() == [[2, 3, 0, 0], [2, 4, 5, 3]]
    assert lengths.tolist() == [2, 4]


def test_training_hides_some_characters_and_evaluation_none():
    recipe = Text(SimpleNamespace(data=None, seed=0, quick=True, tokens="characters", longest=200))
    split = recipe.load().splits["train"]
    rows = list(range(100))
    plain, noisy = recipe.batch(split, rows), recipe.batch(split, rows, Draws(0, 0, rows))
    changed = plain.inputs[0] != noisy.inputs[0]
    assert (noisy.inputs[0][changed] == tokens.UNKNOWN).all()
    letters = plain.inputs[0] > tokens.END
    assert not changed[~letters].any()
    assert 0.07 < changed.sum() / letters.sum() < 0.13
    alone = recipe.batch(split, rows[7:8], Draws(0, 0, rows[7:8]))
    assert torch.equal(alone.inputs[0][0], noisy.inputs[0][7, : alone.inputs[1][0]])


# ---- the user's own ----

ANIMALS = {"cat": "meow purr whiskers", "dog": "bark growl wag", "cow": "moo graze milk"}


def rows_of(count=8):
    return [
        (f"{first} {second} {number}", label)
        for label, words in ANIMALS.items()
        for number, (first, second) in enumerate(
            itertools.islice(itertools.cycle(itertools.permutations(words.split(), 2)), count)
        )
    ]


def write(path, rows, header=True):
    mark = "\t" if path.suffix == ".tsv" else ","
    lines = ([("text", "label")] if header else []) + list(rows)
    path.write_text("".join(mark.join(row) + "\n" for row in lines))
    return path


def load(path, choice="refuse", known=None):
    return labelled.load(path, 0, BadFiles(choice), known)


@pytest.mark.parametrize(("name", "header"), [("a.csv", True), ("a.csv", False), ("a.tsv", True)])
def test_tables_are_read(tmp_path, name, header):
    splits, labels, report = load(write(tmp_path / name, rows_of(), header))
    assert labels == ["cat", "cow", "dog"]
    assert report["texts"] == {"cat": 8, "cow": 8, "dog": 8}
    assert sorted(pair for pairs in splits.values() for pair in pairs) == sorted(rows_of())
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 18, "validation": 3, "test": 3}


def test_columns_are_found_by_name_and_quotes_are_understood(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f'{number},{label},"{text}, ""quoted"""' for number, (text, label) in enumerate(rows_of(3))]
    path.write_text("\ufeffid,Label,Text\n" + "\n".join(rows) + "\n", encoding="utf-8")
    splits, _, _ = load(path)
    assert ('meow purr 0, "quoted"', "cat") in [pair for pairs in splits.values() for pair in pairs]


def test_bad_lines_are_named_with_their_reason(tmp_path, capsys):
    path = tmp_path / "a.csv"
    write(path, rows_of())
    good = len(path.read_text().splitlines())
    with open(path, "ab") as file:
        file.write(b"lonely\n")
        file.write(b",cat\n")
        file.write(b"no label,\n")
        file.write(b"caf\xe9,cat\n")
        file.write(b"both,cat\nboth,dog\n")
        file.write(b"meow purr 0,cat\n")  # again, and right: no mistake
        file.write(b'"never ends,cat\n')
    expected = {1: "no label", 2: "empty text", 3: "no label", 4: "not UTF-8", 5: "mislabelled",
                6: "mislabelled", 8: "not CSV"}  # fmt: skip
    _, _, report = load(path, "skip")
    told = {entry["name"]: entry["reason"] for entry in report["skipped"]}
    assert told.keys() == {f"{path}, line {good + line}" for line in expected}
    for line, word in expected.items():
        assert word in told[f"{path}, line {good + line}"]
    assert report["repeated"] == 1
    assert "7 bad" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="7 bad file"):
        load(path)


def test_tables_that_cannot_be_trained_on_are_told(tmp_path):
    with pytest.raises(RecipeError, match="expected a file of texts"):
        load(tmp_path / "missing.csv")
    (tmp_path / "empty.csv").write_text("\n")
    with pytest.raises(RecipeError, match="an empty file"):
        load(tmp_path / "empty.csv")
    with pytest.raises(RecipeError, match="only the label cat"):
        load(write(tmp_path / "one.csv", [row for row in rows_of() if row[1] == "cat"]))
    with pytest.raises(RecipeError, match=r"at least 3 texts; too few: rat \(1\)"):
        load(write(tmp_path / "few.csv", [*rows_of(), ("squeak", "rat")]))
    with pytest.raises(RecipeError, match=r"1 bad file[\s\S]*knows no label 'rat'"):
        load(write(tmp_path / "new.csv", [*rows_of(), ("squeak", "rat")]), known=["cat", "cow", "dog"])


# ---- the whole ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write(folder / "animals.csv", rows_of(20))
    options = ("--epochs", 15, "--rate", 0.02, "--hidden-size", 8, "--channels", 8, "--batch-size", 8)
    train = (
        "train",
        "text",
        "--data",
        folder / "animals.csv",
        "--tokens",
        "words",
        "--output",
        folder / "out",
    )
    assert run(*train, *options, "--threads", 1) == 0
    return folder / "out"


def test_own_texts_are_learnt_and_the_baseline_is_told(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] == 1.0
    assert metrics["figures"]["baseline"]["accuracy"] == 1.0
    assert metrics["data"]["texts"] == {"cat": 20, "cow": 20, "dog": 20}
    assert sorted(path.name for path in trained.iterdir() if path.suffix == ".png") == [
        "confusion.png", "examples.png", "training.png",
    ]  # fmt: skip


def test_predict_reads_texts_standard_input_and_files(trained, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("growl bark\n\nmoo milk\n"))
    (tmp_path / "a.txt").write_text("whiskers purr\n\nwag growl\n")
    write(tmp_path / "a.tsv", [("graze milk", "?")])
    asked = ("predict", "text", "purr meow", "-", "--output", trained, "--json")
    assert run(*asked, "--file", tmp_path / "a.txt") == 0
    found = {entry["name"]: entry["label"]["class"] for entry in json.loads(capsys.readouterr().out)}
    assert found == {
        "purr meow": "cat", "growl bark": "dog", "moo milk": "cow",
        "a.txt, line 1": "cat", "a.txt, line 3": "dog",
    }  # fmt: skip
    assert run("predict", "text", "--file", tmp_path / "a.tsv", "--output", trained) == 0
    assert capsys.readouterr().out.startswith("a.tsv, line 2: cow ")
    assert run("predict", "text", "", "--output", trained) == 1
    assert "no text" in capsys.readouterr().err


def tables_drawn(monkeypatch):
    """The arguments of every table that is drawn from now on."""
    from cnnrnn_ext.recipes import drawing

    drawn, original = [], drawing.table
    monkeypatch.setattr(drawing, "table", lambda *args: (drawn.append(args), original(*args)))
    return drawn


def test_predictions_are_drawn(trained, tmp_path, monkeypatch):
    drawn, picture = tables_drawn(monkeypatch), tmp_path / "said.png"
    assert run("predict", "text", "purr meow", "wag $", "--output", trained, "--draw", picture) == 0
    ((_, title, _, columns, rows),) = drawn
    assert title == "2 text(s)"
    assert [heading for heading, _ in columns] == ["text", "the model"]
    (text, _), (told, _) = rows[0]
    assert text == "purr meow"
    assert told.startswith("cat ")
    assert picture.stat().st_size > 5000


def test_examples_tell_what_is_right(trained, monkeypatch):
    """Of the test split, in the colour of right or wrong; the truth beside a wrong answer alone."""
    from cnnrnn_ext.recipes import checkpoints
    from cnnrnn_ext.recipes.drawing import OURS, RIGHT

    drawn = tables_drawn(monkeypatch)
    recipe, facts, model, _ = checkpoints.restore(trained / "best.ckpt", "text")
    data = recipe.load(facts)
    split = data.splits["test"]
    wrong = {row: (split.labels[row] + 1) % 3 for row in range(0, len(split), 2)}
    for row, label in wrong.items():
        split.labels[row] = label
    recipe.pictures(trained, model, data, {"accuracy": 0.5, "confusion_label": torch.ones(3, 3)})
    ((*_, rows),) = drawn
    told = {text: (color, truth) for (text, _), (_, color), (truth, _) in rows}
    assert len(told) == len(split)
    for row, text in enumerate(split.texts):
        truth = facts["classes"]["label"][split.labels[row]] if row in wrong else ""
        assert told[text] == (OURS if row in wrong else RIGHT, truth)


def test_explain_points_at_the_word_that_decided(trained, capsys, monkeypatch):
    from cnnrnn_ext.recipes import drawing_text

    drawn = []
    original = drawing_text.explanation
    monkeypatch.setattr(drawing_text, "explanation", lambda *args: (drawn.append(args), original(*args)))
    assert run("explain", "text", "purr of 99", "--output", trained) == 0
    assert "cat" in capsys.readouterr().out
    _, _, shown, heat = drawn[0]
    assert shown[1:4] == [("purr", True), ("of", False), ("99", False)]
    values = heat[next(iter(heat))]
    assert max(range(len(values)), key=values.__getitem__) == 1

    from matplotlib.image import imread

    assert imread(trained / "explanation.png")[..., :3].std() > 0.05


def test_embedded_names_quickly(tmp_path):
    assert run("train", "text", "--quick", "--output", tmp_path, "--threads", 1) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["test"]["confusion_label"]) == 12
    assert 0 < metrics["figures"]["baseline"]["accuracy"] < 1
    assert metrics["data"]["left_out"]["strings"] > 500
