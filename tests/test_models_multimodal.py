"""MultiModal: the fusion's formulas, and that a missing input contributes nothing at all."""

import pytest
import torch
from _stock_models import fuse, fusion_of, twin
from torch import nn

from cnnrnn_ext import models
from cnnrnn_ext.models._fusion import Fusion

PRESENT = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
LENGTHS = torch.tensor([4, 2, 3, 1])


def build(fusion, **options):
    branches = {
        "video": models.CNNRNN(9, 1, (12, 12), (4, 4), 5),
        "audio": models.ParallelCNNRNN(9, 8, channels=(4,), hidden_size=3),
    }
    return models.MultiModal(branches, {"a": 3, "b": 2}, fusion=fusion, **options).double()


def inputs():
    return {
        "video": (torch.randn(4, 4, 1, 12, 12, dtype=torch.float64), LENGTHS),
        "audio": torch.randn(4, 6, 8, dtype=torch.float64),
    }


def present():
    return {"video": PRESENT[:, 0], "audio": PRESENT[:, 1]}


@pytest.mark.parametrize("kind", ["concatenate", "gated", "attention"])
def test_fusion_formulas(kind):
    """Against the formulas row by row, gradients too; NaN stands in what is missing."""
    ours = Fusion(kind, (3, 4, 2), 5).double()
    theirs = twin(fusion_of(ours), ours)
    vectors = [torch.randn(6, size, dtype=torch.float64) for size in (3, 4, 2)]
    here = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, 1]]).bool()
    expected = torch.stack(
        [fuse(theirs, kind, [v[row] for v in vectors], here[row].tolist()) for row in range(6)]
    )
    vectors = [
        v.masked_fill(~here[:, column, None], torch.nan).requires_grad_() for column, v in enumerate(vectors)
    ]
    result = ours(vectors, here)
    torch.testing.assert_close(result, expected)
    weights = torch.randn_like(result)
    (result * weights).sum().backward()
    (expected * weights).sum().backward() if kind != "concatenate" else None
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for column, v in enumerate(vectors):
        assert v.grad[here[:, column]].any()
        assert not v.grad[~here[:, column]].any()
    nothing = ours(vectors, torch.zeros(6, 3, dtype=torch.bool))
    assert nothing.equal(torch.zeros_like(nothing))
    if kind != "concatenate":
        shares = ours.weights(vectors, here)
        torch.testing.assert_close(shares.sum(1), torch.ones(6, dtype=torch.float64))
        assert not shares[~here].any()


def test_two_gates_are_one_sigmoid():
    """For two branches the gates are Arevalo's: z = σ(V x) and 1 - z."""
    fusion = Fusion("gated", (3, 4), 5)
    a, b = torch.randn(2, 3), torch.randn(2, 4)
    scores = fusion.gate(torch.cat((a, b), 1)).view(2, 5, 2)
    z = torch.sigmoid(scores[..., 0] - scores[..., 1])
    p, q = torch.tanh(fusion.project[0](a)), torch.tanh(fusion.project[1](b))
    torch.testing.assert_close(fusion([a, b]), z * p + (1 - z) * q)


@pytest.mark.parametrize("fusion", ["late", "gated"])
def test_answers(fusion):
    """Each row alone, from what it has: the mean of its branches' answers, or the gated mixture of them."""
    model, given = build(fusion), inputs()
    result = model(given, present())
    vectors = {name: model.branches[name].features(*_tuple(given[name])) for name in given}
    for row in range(4):
        here = [name for name, there in zip(given, PRESENT[row].tolist(), strict=True) if there]
        alone = {
            name: tuple(a[row : row + 1] for a in _tuple(given[name])) if name in here else None
            for name in given
        }
        for head, answer in model(alone).items():
            torch.testing.assert_close(result[head][row], answer[0])
            if fusion == "late":
                expected = torch.stack(
                    [
                        heads[head](vectors[name][row])
                        for name, heads in zip(given, model.branch_heads, strict=True)
                        if name in here
                    ]
                ).mean(0)
            else:
                theirs = twin(fusion_of(model.fusion), model.fusion)
                parts = [vectors[name][row] for name in given]
                expected = model.heads[head](fuse(theirs, "gated", parts, PRESENT[row].tolist()))
            torch.testing.assert_close(answer[0], expected)
    shares = model.branch_weights(given, present())
    torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]))
    assert not shares[~PRESENT].any()


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("fusion", ["late", "gated"])
def test_what_is_missing_is_not_read(fusion):
    """NaN in rows that are not present: the same answers and gradients to the last bit, none of them NaN."""
    model, given, results = build(fusion), inputs(), []
    for fill in (0.0, torch.nan):
        given["video"][0][~PRESENT[:, 0]] = fill
        given["audio"][~PRESENT[:, 1]] = fill
        model.zero_grad()
        answer = model(given, present())
        sum(y.square().sum() for y in answer.values()).backward()
        results.append(
            [*answer.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert a.equal(b)


@pytest.mark.parametrize("fusion", ["late", "gated"])
def test_missing_for_the_whole_batch(fusion):
    """None, no entry and present=False everywhere are the same, and that branch does not run."""
    model, given = build(fusion), inputs()
    calls = []
    model.branches["video"].cnn.register_forward_hook(lambda *_: calls.append(1))
    nobody = torch.zeros(4, dtype=torch.bool)
    answers = [
        model({"audio": given["audio"]}),
        model({"audio": given["audio"], "video": None}),
        model(given, {"video": nobody}),
    ]
    assert calls == []
    for other in answers[1:]:
        for head in other:
            torch.testing.assert_close(other[head], answers[0][head])
    nothing = model(given, {"video": nobody, "audio": nobody})
    for head, y in nothing.items():
        expected = torch.zeros_like(y) if fusion == "late" else model.heads[head].bias.expand_as(y)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("fusion", ["late", "gated"])
def test_each_alone(fusion):
    """The answers of the subsets of one, in the rows that have them; each branch runs once for all."""
    model, given, calls = build(fusion), inputs(), []
    for name, branch in model.branches.items():
        branch.rnn.register_forward_hook(lambda *_, name=name: calls.append(name))
    answer, alone = model.with_each_alone(given, present())
    assert calls == ["video", "audio"]
    expected = model(given, present())
    for head, y in expected.items():
        torch.testing.assert_close(answer[head], y)
    assert list(alone) == ["video", "audio"]
    for name, (logits, here) in alone.items():
        assert here.equal(present()[name])
        expected = model({name: given[name]}, {name: here})
        for head, y in expected.items():
            torch.testing.assert_close(logits[head][here], y[here])
            assert (y[here] - answer[head][here])[0].abs().max() > 1e-4


def test_branch_dropout():
    """In training only, each row loses branches at random, never all: its answer is one of its subsets'."""
    model, given = build("late", branch_dropout=0.5), inputs()
    model.eval()
    one = {name: model({name: value})["a"] for name, value in given.items()}
    subsets = torch.stack([one["video"], one["audio"], (one["video"] + one["audio"]) / 2])
    torch.testing.assert_close(model(given)["a"], subsets[2])
    model.train()
    counts = torch.zeros(3)
    for _ in range(40):
        distance = (model(given)["a"] - subsets).abs().amax(-1)
        assert (distance.amin(0) < 1e-9).all()
        counts += torch.bincount(distance.argmin(0), minlength=3)
    # one alone: 1/4 each; both: 1/4, and 1/4 where all would have gone
    shares = counts / counts.sum()
    assert ((shares - torch.tensor([0.25, 0.25, 0.5])).abs() < 0.15).all()
    only = {"video": PRESENT.new_ones(4), "audio": PRESENT.new_zeros(4)}
    torch.testing.assert_close(model(given, only)["a"], one["video"])


def test_three_branches_with_text():
    branches = {
        "video": models.CNNRNN(2, 1, (12, 12), (4, 4), 5),
        "text": models.RNNCNN(9, 2, 4, 4, channels=3),
        "audio": models.ParallelCNNRNN(2, 8, channels=(4,), hidden_size=3),
    }
    model = models.MultiModal(branches, 4, fusion="gated", features=7)
    y = model({"text": torch.tensor([[1, 2, 0], [3, 4, 5]]), "audio": (torch.randn(2, 4, 8), None)})
    y.sum().backward()
    assert y.shape == (2, 4)
    assert branches["text"].rnn.weight_ih_l0.grad.any()
    assert branches["video"].rnn.weight_ih_l0.grad is None


def test_bad_input():
    model, given = build("late"), inputs()
    for call, kind, name in (
        (lambda: models.MultiModal({}, 2), ValueError, "branches"),
        (lambda: models.MultiModal({"a": nn.Linear(2, 2)}, 2), TypeError, "branches\\['a'\\]"),
        (lambda: build("sum"), ValueError, "fusion"),
        (lambda: build("late", branch_dropout=-0.1), ValueError, "branch_dropout"),
        (lambda: model(given["audio"]), TypeError, "inputs"),
        (lambda: model({"audio": None}), ValueError, "inputs"),
        (lambda: model({"smell": given["audio"]}), ValueError, "smell"),
        (lambda: model({**given, "audio": given["audio"][:3]}), RuntimeError, "inputs\\['audio'\\]"),
        (lambda: model(given, {"smell": PRESENT[:, 0]}), ValueError, "smell"),
        (lambda: model(given, {"audio": PRESENT[:3, 0]}), RuntimeError, "present\\['audio'\\]"),
        (lambda: model(given, {"audio": torch.ones(4)}), RuntimeError, "present\\['audio'\\]"),
    ):
        with pytest.raises(kind, match=name):
            call()
    steps = models.CNNRNN(2, 1, (12, 12), (4, 4), 5, readout="steps")
    with pytest.raises(RuntimeError, match=r"branches\['video'\].*features"):
        models.MultiModal({"video": steps}, 2)({"video": torch.randn(2, 3, 1, 12, 12)})
