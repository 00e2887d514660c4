"""The translation recipe: pairs and their splits, tokens, metrics, the command line."""

import json
from types import SimpleNamespace

import pytest
import torch
from _recipes import require, run, settings_of

from cnnrnn_ext.recipes.base import Batch
from cnnrnn_ext.recipes.data import translation as data
from cnnrnn_ext.recipes.data.files import BadFiles
from cnnrnn_ext.recipes.translation import BEGIN, END, PAD, UNKNOWN, Alphabet, Translation, facts_of, scores

require(Translation)

FACTS = {"languages": ["de", "fr"], "characters": list(" abcdeé"), "longest": 12}


@pytest.fixture(scope="module")
def pairs():
    return data.embedded_pairs()


def test_the_pairs_are_translations(pairs):
    known = set(zip(pairs.sources, pairs.targets, pairs.languages, strict=True))
    for pair in (
        ("Germany", "Allemagne", "fr"),
        ("Germany", "Alemania", "es"),
        ("Spanish", "Spanisch", "de"),
        ("kilometers", "Kilometer", "de"),
        ("US dollars", "dollars des États-Unis", "fr"),
        ("Enter a valid value.", "Saisissez une valeur valide.", "fr"),
    ):
        assert pair in known
    assert {"territories", "languages", "scripts", "currencies", "units", "time zones", "interface"} <= set(
        pairs.kinds
    )
    both = list(zip(pairs.sources, pairs.languages, strict=True))
    assert len(both) == len(set(both)) > 7000
    assert max(map(len, (*pairs.sources, *pairs.targets))) <= data.LONGEST


def test_what_a_reader_of_the_training_split_would_know_is_not_in_the_test(pairs):
    splits = data.split_pairs(pairs, 0)
    assert sum(map(len, splits.values())) == len(pairs)
    for name, share in data.SHARES.items():
        assert len(splits[name]) == pytest.approx(share * len(pairs), rel=0.15)
    sources = {
        name: {data.gist(source) or source for source in part.sources} for name, part in splits.items()
    }
    assert not sources["train"] & sources["test"]
    assert not sources["train"] & sources["validation"]
    assert not sources["validation"] & sources["test"]
    assert data.split_pairs(pairs, 0)["test"].sources == splits["test"].sources
    assert data.split_pairs(pairs, 1)["test"].sources != splits["test"].sources


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Croatian Dinar", "Croatian dinars"),
        ("Bolivian peso (1863–1963)", "Bolivian peso"),
        ("%(count)s days", "{0} day"),
        ("Add %(name)s", "add"),
    ],
)
def test_the_gist_of_near_copies_is_the_same(one, other):
    assert data.gist(one) == data.gist(other) != ""


def test_the_gist_tells_different_sources_apart():
    assert data.gist("Swiss francs") != data.gist("French francs")
    assert data.gist("glass") == "glass"  # no plural


def test_rows_of_a_table(tmp_path):
    table = tmp_path / "pairs.tsv"
    table.write_bytes(
        b"\xef\xbb\xbfcat\tchat\tfr\r\n# remark\n\ndog\tHund\nonly one\n\tempty\nx\t\xff\nlong\t"
        + b"n" * 30
        + b"\n"
    )
    bad = BadFiles("skip")
    found = data.read_pairs(table, 20, bad)
    assert (found.sources, found.targets, found.languages) == (["cat", "dog"], ["chat", "Hund"], ["fr", ""])
    assert [(name.rsplit(" ", 1)[-1], reason.split(";")[0]) for name, reason in bad.found] == [
        ("5", "expected source, target, perhaps language, tabs between"),
        ("6", "no source"),
        ("7", "not UTF-8"),
        ("8", "30 characters (--longest 20)"),
    ]


def test_a_table_may_name_its_columns(tmp_path):
    table = tmp_path / "pairs.tsv"
    table.write_text("Target\tnote\tSource\tlanguage\nja\t\tyes\tde\noui\tx\tyes\tfr\n", encoding="utf-8")
    bad = BadFiles("refuse")
    found = data.read_pairs(table, 40, bad)
    assert (found.sources, found.targets, found.languages) == (["yes", "yes"], ["ja", "oui"], ["de", "fr"])
    assert bad.found == []


def test_a_language_the_model_does_not_know_is_named_with_its_line(tmp_path):
    table = tmp_path / "pairs.tsv"
    table.write_text("yes\tja\tde\nyes\tsi\tit\nyes\toui\n", encoding="utf-8")
    bad = BadFiles("skip")
    found = data.read_pairs(table, 40, bad, ["de", "fr"])
    assert found.targets == ["ja"]
    assert bad.found == [
        (f"{table}, line 2", "into 'it'; the model knows de, fr"),
        (f"{table}, line 3", "no language; the model knows de, fr"),
    ]


def test_tokens_and_back():
    alphabet = Alphabet(FACTS)
    source = alphabet.source("déx", "fr").tolist()
    assert source[0] == UNKNOWN + 2  # the second language
    assert source[-1] == END
    assert source[3] == UNKNOWN
    target = alphabet.target("bé a").tolist()
    assert target[0] == BEGIN
    assert alphabet.text(target[1:]) == "bé a"
    assert alphabet.text([*target[1:], PAD, PAD, 9]) == "bé a"
    assert alphabet.text([UNKNOWN]) == "?"
    assert len(alphabet) == 4 + 2 + 7
    assert len(set(alphabet.ids.values())) == 7


def recipe_of(**changes):
    recipe = Translation(settings_of(Translation, **changes))
    return recipe, recipe.build(FACTS)


SPLIT = data.Pairs(["abc", "dd"], ["é", "ceda"], ["fr", "de"], ["own", "own"])


def test_the_loss_reads_no_padding():
    """A row's loss is the same alone and beside a longer one."""
    recipe, model = recipe_of()
    model.eval()
    losses = []
    for rows in ([0, 1], [0], [1]):
        batch = recipe.batch(SPLIT, rows)
        losses.append(recipe.loss(recipe.forward(model, batch), batch))
    torch.testing.assert_close(losses[0][0], losses[1][0] + losses[2][0])
    assert [int(count) for _, count in losses] == [2 + 5, 2, 5]


class Oracle:
    """Answers with what it was told, and keeps how it was asked."""

    def __init__(self, tokens):
        self.tokens = tokens

    def generate(self, source, lengths, **options):
        self.options = options
        return SimpleNamespace(tokens=self.tokens)


def test_metrics_count_whole_answers_and_are_sacrebleus():
    recipe, _ = recipe_of(beam=3)
    batch = recipe.batch(SPLIT, [0, 1])
    said = torch.stack([batch.targets[0], torch.full_like(batch.targets[1], END)])
    said[1, :4] = Alphabet(FACTS).target("ced")[1:]
    oracle, metrics = Oracle(said), recipe.metrics(FACTS)
    recipe.update(metrics, oracle, None, batch)
    assert oracle.options == {"max_length": 12, "beam_size": 3}
    found = recipe.results(metrics)
    assert found["exact_match"] == 0.5
    # "ced" of "ceda": 3 of 3 and of 4 letters, 2 of 2 and 3 pairs, 1 of 1 and 2 triples; F with beta = 2,
    # of the mean precision and recall over the orders that both have.
    precision, recall = 1.0, (3 / 4 + 2 / 3 + 1 / 2) / 3
    expected = 5 * precision * recall / (4 * precision + recall)
    assert found["chrf"] == pytest.approx((1 + expected) / 2, abs=1e-6)
    assert scores(["é", "ced"], ["é", "ceda"])["chrf"] == pytest.approx(found["chrf"])
    assert 0 < scores(["é", "ced"], ["é", "ceda"])["corpus_chrf"] < 1


def test_predictions_need_no_targets():
    recipe, model = recipe_of()
    batch = recipe.batch(data.Pairs(["abc"], [None], ["de"], [""]), [0])
    assert batch == Batch(batch.inputs, None)
    (said,) = recipe.predict(model.eval(), batch, FACTS)
    assert said["score"] <= 0
    assert len(said["text"]) <= FACTS["longest"]


def test_facts_come_from_the_training_split():
    facts = facts_of(SPLIT, ["fr", "de", "fr"])
    assert facts == {"languages": ["de", "fr"], "characters": list("abcdeé"), "longest": 5}


def test_a_cipher_is_learned_from_a_users_table(tmp_path, capsys):
    """Every letter has its translation: after a short training whole words come out right, of which none was
    seen."""
    random = torch.Generator().manual_seed(0)
    words = {"".join("abcdefgh"[i] for i in torch.randint(8, (4,), generator=random)) for _ in range(500)}
    table, out = tmp_path / "cipher.tsv", tmp_path / "out"
    lines = [f"{word}\t{word.translate(str.maketrans('abcdefgh', 'stuvwxyz'))}" for word in sorted(words)]
    table.write_text("\n".join(lines), encoding="utf-8")
    command = [
        "train",
        "translation",
        "--data",
        str(table),
        "--hidden",
        "48",
        "--epochs",
        "20",
        "--patience",
        "20",
    ]
    assert run(*command, "--batch-size", "16", "--rate", "0.01", "--output", str(out), "--threads", "1") == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["test"]["exact_match"] >= 0.5
    assert metrics["figures"]["copy"]["exact_match"] == 0
    assert metrics["figures"].keys() == {"corpus_chrf", "copy"}  # one language, one source: no parts
    assert {path.name for path in out.glob("*.png")} == {"training.png", "examples.png", "attention.png"}
    capsys.readouterr()
    assert run("predict", "translation", "abba", "dada", "--output", str(out), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in said] == ["abba", "dada"]
    assert all(set(row["text"]) <= set("stuvwxyz") for row in said)
    assert run("predict", "translation", "abba", "--to", "fr", "--output", str(out)) == 1
    assert "--to fr" in capsys.readouterr().err
    assert run("explain", "translation", "abba", "--output", str(out)) == 0
    assert (out / "explanation.png").stat().st_size > 10000


def test_bad_tables_are_refused(tmp_path, capsys):
    table = tmp_path / "pairs.tsv"
    table.write_text("a\tb\nc\n", encoding="utf-8")
    command = ["train", "translation", "--output", str(tmp_path / "out"), "--data"]
    assert run(*command, str(table)) == 1
    assert "pairs.tsv, line 2: expected source, target" in capsys.readouterr().err
    assert run(*command, str(tmp_path / "none.tsv")) == 1
    assert "No such file" in capsys.readouterr().err
