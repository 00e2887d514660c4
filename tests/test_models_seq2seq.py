"""Seq2Seq: teacher forcing against torch.nn a step at a time; beam search against an exhaustive search."""

import itertools
import math

import pytest
import torch
from _oracle import running_on
from _stock_models import Seq2Seq, twin

import cnnrnn_ext as cx
from cnnrnn_ext import models
from cnnrnn_ext.models._beam import beam_search

PADDING, BEGIN, END = 0, 1, 2
LENGTHS = torch.tensor([6, 2, 4, 1])
OPTIONS = [
    {"rnn": "lstm", "num_layers": 2},
    {"rnn": "gru"},
    {"rnn": "rnn", "bidirectional": False},
    {"rnn": "lstm", "bidirectional": False, "num_layers": 2},
]


@pytest.mark.parametrize("given", ["lengths", "padding"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_teacher_forcing(mode, options, given):
    """Logits, attention and all gradients of a padded batch, in float64, against each row by itself."""
    ours = models.Seq2Seq(12, 9, 5, 4, **options)
    stock = twin(Seq2Seq(ours), ours)
    sources = [torch.randint(3, 12, (length,)) for length in LENGTHS]
    batch = torch.nn.utils.rnn.pad_sequence(sources, True, 0 if given == "padding" else 5)
    lengths = LENGTHS if given == "lengths" else None
    target = torch.cat((torch.full((4, 1), BEGIN), torch.randint(3, 9, (4, 5))), 1)
    with running_on(mode, options["rnn"]) as log:
        logits = ours(batch, target, lengths)
        assert len(log) == 2  # the encoder and the decoder, each one call of all layers
        loss, weights = 0.0, torch.randn_like(logits)
        maps = ours.attention(batch, target, lengths)
        for row, source in enumerate(sources):
            expected, attention = stock(source, target[row])
            torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(maps[row, :, : len(source)], attention, rtol=1e-9, atol=1e-10)
            assert not maps[row, :, len(source) :].any()
            loss = loss + (weights[row] * expected).sum()
        loss.backward()
        (weights * logits).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = theirs[name].grad.clone()
        if "embedding" in name:
            gradient[PADDING] = 0.0
        assert gradient.any(), name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-9, msg=name)


def peaked(**options):
    """A model whose untrained answers differ from each other and end at different lengths."""
    torch.manual_seed(3)
    model = models.Seq2Seq(30, 5, 8, 12, **options).double().eval()
    for parameter in model.parameters():
        parameter.data *= 3.0
    return model


def log_probabilities(model, source, answer):
    """Of each token of an answer, by teacher forcing."""
    target = torch.tensor([[BEGIN, *answer[:-1]]])
    logits = model(source[None], target)[0].log_softmax(-1)
    return [logits[position, token].item() for position, token in enumerate(answer)]


def all_answers(vocabulary, max_length):
    words = [token for token in range(vocabulary) if token not in (PADDING, BEGIN, END)]
    for length in range(max_length):
        for answer in itertools.product(words, repeat=length):
            yield (*answer, END)
    yield from itertools.product(words, repeat=max_length)


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0, -0.5])
def test_a_wide_beam_finds_the_best_of_all_answers(penalty):
    """Against every sequence of a vocabulary of two words: the same tokens and score in each row."""
    model = peaked()
    sources = torch.randint(3, 30, (6, 5))
    lengths = torch.tensor([5, 1, 3, 2, 5, 4])
    found = model.generate(sources, lengths, max_length=4, beam_size=60, length_penalty=penalty)
    ends = set()
    with torch.no_grad():
        for row, (source, length) in enumerate(zip(sources, lengths, strict=True)):
            ranked = {
                answer: sum(log_probabilities(model, source[:length], answer)) / len(answer) ** penalty
                for answer in all_answers(5, 4)
            }
            best = max(ranked, key=ranked.get)
            size = found.lengths[row].item()
            assert tuple(found.tokens[row, :size].tolist()) == best
            assert found.scores[row].item() == pytest.approx(ranked[best], rel=1e-9)
            assert not found.tokens[row, size:].any()
            ends.add(size)
    assert penalty != 0.7 or len(ends) > 1  # rows end at lengths of their own


def plain_beam_search(model, source, max_length, beam_size, penalty):
    """The same search for one row, with lists, and without stopping early."""

    def rank(hypothesis):
        answer, score = hypothesis
        return score / max(len(answer), 1) ** penalty

    beam = [((), 0.0)]
    for _ in range(max_length):
        candidates = [(answer, score) for answer, score in beam if answer[-1:] == (END,)]
        for answer, score in beam:
            if answer[-1:] == (END,):
                continue
            logits = model(source[None], torch.tensor([[BEGIN, *answer]]))[0, -1].log_softmax(-1)
            candidates += [
                ((*answer, token), score + logits[token].item())
                for token in range(len(logits))
                if token not in (PADDING, BEGIN)
            ]
        beam = sorted(candidates, key=rank, reverse=True)[:beam_size]
    answer, score = max(beam, key=rank)
    return answer, rank((answer, score))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("beam_size", "penalty"), [(1, 1.0), (2, 0.6), (3, 1.0), (3, 0.0), (2, -0.5)])
def test_beam_search(mode, options, beam_size, penalty):
    """Tokens and scores of a batch, against a search of each row by itself; a beam of 1 is the greedy one."""
    model = peaked(**options)
    sources, lengths = torch.randint(3, 30, (7, 5)), torch.tensor([5, 1, 3, 2, 5, 4, 4])
    with running_on(mode, options["rnn"]), torch.no_grad():
        found = model.generate(sources, lengths, max_length=6, beam_size=beam_size, length_penalty=penalty)
        for row, (source, length) in enumerate(zip(sources, lengths, strict=True)):
            answer, score = plain_beam_search(model, source[:length], 6, beam_size, penalty)
            size = found.lengths[row].item()
            assert tuple(found.tokens[row, :size].tolist()) == answer
            assert found.scores[row].item() == pytest.approx(score, rel=1e-9)


def test_beam_of_one_takes_the_likeliest_token_each_time():
    model = peaked()
    sources = torch.randint(3, 30, (5, 4))
    found = model.generate(sources, max_length=6)
    for row, source in enumerate(sources):
        answer = []
        while len(answer) < 6 and answer[-1:] != [END]:
            logits = model(source[None], torch.tensor([[BEGIN, *answer]]))[0, -1].clone()
            logits[[PADDING, BEGIN]] = -math.inf
            answer.append(logits.argmax().item())
        assert found.tokens[row, : found.lengths[row]].tolist() == answer


def test_attention_of_generated_tokens():
    """The maps are those of teacher forcing on what was generated, whatever beam it came through."""
    model = peaked()
    sources, lengths = torch.randint(3, 30, (6, 5)), torch.tensor([5, 1, 3, 2, 5, 4])
    found = model.generate(sources, lengths, max_length=6, beam_size=3)
    for row, size in enumerate(found.lengths.tolist()):
        target = torch.cat((torch.tensor([[BEGIN]]), found.tokens[row : row + 1, : size - 1]), 1)
        expected = model.attention(sources[row : row + 1], target, lengths[row : row + 1])
        torch.testing.assert_close(found.attention[row : row + 1, :size], expected)
        assert not found.attention[row, size:].any()


def test_a_finished_hypothesis_is_kept():
    """A decoder by table: the end comes early in the best answer, while others go on for long."""
    table = torch.full((4, 4), -9.0)
    table[BEGIN, END], table[BEGIN, 3] = math.log(0.6), math.log(0.4)
    table[3, 3], table[3, END] = math.log(0.5), math.log(0.4)

    def step(tokens, state):
        calls.append(tokens.shape)
        return table[tokens], torch.ones(*tokens.shape, 1), state

    def search(penalty, max_length):
        calls.clear()
        return beam_search(
            step, (torch.zeros(1, 2, 1),), 2, "cpu", begin_id=BEGIN, end_id=END, padding_id=PADDING,
            max_length=max_length, beam_size=2, penalty=penalty,
        )  # fmt: skip

    calls = []
    found = search(0.0, 50)
    assert found.tokens.tolist() == [[END]] * 2
    assert found.scores.tolist() == pytest.approx([math.log(0.6)] * 2)
    assert len(calls) == 1  # nothing can overtake it
    # By the mean, log(0.6) is beaten only from -0.511 up; 3 3 3 … comes to log(0.5) at best.
    found = search(1.0, 50)
    assert found.tokens.tolist() == [[END]] * 2
    assert len(calls) < 50
    # A penalty above 1 favours length: the unfinished answer wins after all steps.
    found = search(2.0, 5)
    assert found.tokens.tolist() == [[3, 3, 3, 3, 3]] * 2
    assert found.lengths.tolist() == [5, 5]


def test_generate_leaves_no_graph_and_needs_no_rows():
    model = models.Seq2Seq(9, 7, 4, 4)
    found = model.generate(torch.randint(3, 9, (2, 4)), max_length=3, beam_size=2)
    assert not found.scores.requires_grad
    assert not found.attention.requires_grad
    empty = model.generate(torch.zeros(0, 4, dtype=torch.int64), max_length=3, beam_size=2)
    assert [len(part) for part in empty] == [0, 0, 0, 0]


def test_one_step_calls_run_the_decoder_for_all_hypotheses(mode):
    model = models.Seq2Seq(9, 7, 4, 4, rnn="gru").eval()
    with running_on(mode, "gru") as log:
        found = model.generate(torch.randint(3, 9, (3, 4)), max_length=5, beam_size=4)
    assert 1 + found.lengths.max() <= len(log) <= 1 + 5


def test_bad_arguments():
    for arguments, name in (
        ({"end_id": 7}, "end_id"),
        ({"begin_id": 2}, "begin_id"),
        ({"rnn": "mlp"}, "rnn"),
        ({"padding_id": 9}, "padding_id"),
    ):
        with pytest.raises(ValueError, match=name):
            models.Seq2Seq(9, 7, **arguments)
    model, source = models.Seq2Seq(9, 7, 4, 4), torch.randint(3, 9, (2, 4))
    target = torch.tensor([[1, 3], [1, 4]])
    with pytest.raises(IndexError, match="target"):
        model(source, target + 4)
    with pytest.raises(IndexError, match="source"):
        model(source - 5, target)
    with pytest.raises(RuntimeError, match="source"):
        model(source.float(), target)
    with pytest.raises(TypeError, match="target"):
        model(source, [[1, 2]])
    with pytest.raises(RuntimeError, match="lengths"):
        model(source, target, torch.tensor([5, 1]))
    with pytest.raises(RuntimeError, match="max_length"):
        model.generate(source, max_length=0)
    with pytest.raises(RuntimeError, match="beam_size"):
        model.generate(source, max_length=2, beam_size=0)


def test_unfused_is_the_stock_model():
    """unfuse_ gives torch.nn layers, which compute the same from padded rows, an empty one among them."""
    model = models.Seq2Seq(12, 9, 5, 4, num_layers=2)
    source, target = torch.randint(3, 12, (3, 4)), torch.randint(1, 9, (3, 5))
    lengths = torch.tensor([4, 0, 2])
    expected = model(source, target, lengths)
    cx.unfuse_(model)
    assert isinstance(model.encoder, torch.nn.LSTM)
    torch.testing.assert_close(model(source, target, lengths), expected)
