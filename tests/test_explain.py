"""Explanations point at what was planted, and are the same from the kernels and from plain PyTorch."""

import sys

import pytest
import torch
import torch.nn.functional as F
from _oracle import running_on
from torch import nn

pytest.importorskip("captum", reason="captum is not installed")

from cnnrnn_ext import explain, models

STEPS, SIDE, PATCH = 5, 12, 3


def planted_clips(count):
    """Noise, and in half of the clips a bright patch in one place of one frame: (clips, labels, places)."""
    clips = 0.2 * torch.rand(count, STEPS, 1, SIDE, SIDE)
    labels = torch.arange(count) % 2
    places = torch.stack([torch.randint(n, (count,)) for n in (STEPS, SIDE - PATCH, SIDE - PATCH)], 1)
    for clip, label, (t, y, x) in zip(clips, labels.tolist(), places.tolist(), strict=True):
        clip[t, 0, y : y + PATCH, x : x + PATCH] += label
    return clips, labels, places


def trained(model, batch, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        *inputs, labels = batch()
        logits = model(*inputs)
        loss = F.cross_entropy(logits["tone"] if isinstance(logits, dict) else logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2, "the model did not learn what was planted"
    return model


@pytest.fixture(scope="module")
def video():
    """(a model that finds the patch, clips with one, their places)"""
    torch.manual_seed(0)
    model = models.CNNRNN(2, 1, (SIDE, SIDE), (8,), 12, readout="attention", dropout=0.1)
    model = trained(model, lambda: planted_clips(24)[:2])
    clips, labels, places = planted_clips(16)
    return model, clips[labels == 1], places[labels == 1]


def in_patch(place):
    """[T, 1, H, W] bool: where the signal was planted."""
    t, y, x = place.tolist()
    mask = torch.zeros(STEPS, 1, SIDE, SIDE, dtype=torch.bool)
    mask[t, 0, y : y + PATCH, x : x + PATCH] = True
    return mask


def test_integrated_gradients_point_at_the_patch(mode, video):
    model, clips, places = video
    with running_on(mode, "conv_pool2d", "lstm"):
        values = explain.integrated_gradients(model, clips, 1, n_steps=20)
    for value, place in zip(values, places, strict=True):
        mask = in_patch(place)
        assert value.flatten().argmax() in mask.flatten().nonzero()
        # 9 of 720 pixels
        assert value[mask].sum() > 0.5 * value.clamp(min=0).sum()


def test_occlusion_points_at_the_patch(mode, video):
    model, clips, places = video
    with running_on(mode, "conv_pool2d", "lstm"):
        values = explain.occlusion(
            model, clips, 1, window=(1, 1, 4, 4), strides=(1, 1, 2, 2), perturbations_per_eval=16
        )
    for value, place in zip(values, places, strict=True):
        t, _, y, x = torch.unravel_index(value.argmax(), value.shape)
        assert t == place[0]
        assert abs(y - place[1] - 1) <= 3
        assert abs(x - place[2] - 1) <= 3


@pytest.mark.parametrize("method", explain.METHODS)
def test_per_step_relevance_points_at_the_frame(method, video):
    model, clips, places = video
    values = explain.per_step_relevance(model, clips, 1, method=method)
    assert values.shape == (len(clips), STEPS)
    assert values.argmax(1).equal(places[:, 0])


def test_attention_points_at_the_frame(video):
    """What the readout looks at: the patch's frame, or one after it, when the LSTM has seen it."""
    model, clips, places = video
    weights = explain.attention(model, clips)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(clips)))
    before = torch.arange(STEPS) < places[:, :1]
    shares = (weights * ~before).sum(1) / (~before).sum(1)
    later = places[:, 0] > 0
    assert (shares[later] > (weights * before).sum(1)[later] / before.sum(1)[later]).all()


def test_the_same_on_both_backends(compiled, video):
    model, clips, _ = video
    lengths = torch.tensor([5, 3, 4, 1, 5, 2, 2, 5])
    results = {}
    for mode in ("compiled", "reference"):
        with running_on(mode, "conv_pool2d", "lstm"):
            results[mode] = [
                explain.integrated_gradients(model, clips, 1, additional_forward_args=(lengths,)),
                explain.per_step_relevance(
                    model, clips, 1, method="occlusion", additional_forward_args=(lengths,)
                ),
                explain.attention(model, clips, lengths),
            ]
    for ours, reference in zip(*results.values(), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)
    behind = torch.arange(STEPS) >= lengths[:, None]
    for values in results["compiled"]:
        assert not values[behind].any()  # nothing behind a row's end decides anything


def test_attributions_add_up(video):
    """Completeness: they sum to answer(input) - answer(baseline)."""
    model, clips, _ = video
    model.eval()
    values = explain.integrated_gradients(model, clips, 1, n_steps=200, internal_batch_size=64)
    expected = model(clips)[:, 1] - model(torch.zeros_like(clips))[:, 1]
    torch.testing.assert_close(values.flatten(1).sum(1), expected.detach(), rtol=0.02, atol=0.02)


def test_against_a_closed_form():
    """Of a linear answer w · x the attributions are w ⊙ (x - baseline), and of occlusion w ⊙ x."""
    weight = torch.randn(3, 4)
    x = torch.randn(2, 3, 4)

    def model(x, scale):
        return (x * weight).sum((1, 2))[:, None] * scale * torch.tensor([1.0, -2.0])

    scale = torch.tensor([[1.0], [3.0]])
    values = explain.integrated_gradients(model, x, 1, baselines=0.5, additional_forward_args=(scale,))
    torch.testing.assert_close(values, -2 * scale[..., None] * weight * (x - 0.5))
    values = explain.occlusion(model, x, 0, window=(1, 1), additional_forward_args=(scale,))
    torch.testing.assert_close(values, scale[..., None] * weight * x)
    for method in explain.METHODS:
        steps = explain.per_step_relevance(model, x, 0, method=method, additional_forward_args=(scale,))
        torch.testing.assert_close(steps, (scale[..., None] * weight * x).sum(2))


# ---- tokens ----

SIGNAL = 7


def planted_tokens(count):
    tokens = torch.randint(8, 20, (count, 9))
    lengths = torch.randint(2, 10, (count,))
    labels = torch.arange(count) % 2
    places = (torch.rand(count) * lengths).long()
    rows = torch.arange(count)
    tokens[rows, places] = torch.where(labels == 1, SIGNAL, tokens[rows, places])
    return tokens, lengths, labels, places


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    model = models.RNNCNN(20, 2, 8, 8, channels=8, widths=(1, 2))
    model = trained(model, lambda: planted_tokens(32)[:3])
    tokens, lengths, labels, places = planted_tokens(24)
    here = labels == 1
    return model, tokens[here], lengths[here], places[here]


@pytest.mark.parametrize("method", explain.METHODS)
def test_the_planted_token_is_found(mode, text, method):
    model, tokens, lengths, places = text
    with running_on(mode, "conv_pool2d", "lstm"):
        values = explain.per_step_relevance(
            model, tokens, 1, method=method, additional_forward_args=(lengths,)
        )
    assert values.shape == tokens.shape
    assert values.argmax(1).equal(places)
    assert not values[torch.arange(9) >= lengths[:, None]].any()


def test_token_attributions_add_up(text):
    model, tokens, lengths, _ = text
    values = explain.integrated_gradients(model, tokens, 1, n_steps=200, additional_forward_args=(lengths,))
    model.eval()
    expected = model(tokens, lengths)[:, 1] - model(torch.zeros_like(tokens), lengths)[:, 1]
    torch.testing.assert_close(values.sum(1), expected.detach(), rtol=0.05, atol=0.05)


def test_a_step_of_a_translation():
    """Seq2Seq: the source tokens that one target step was made from; attention maps beside it."""
    model = models.Seq2Seq(12, 9, 6, 8)
    source, target = torch.randint(3, 12, (2, 5)), torch.randint(3, 9, (2, 4))
    lengths = torch.tensor([5, 3])

    def logits(source):
        return model(source, target.repeat(len(source) // 2, 1), lengths.repeat(len(source) // 2))

    values = explain.integrated_gradients(
        model, source, (2, 4), n_steps=100, additional_forward_args=(target, lengths)
    )
    difference = logits(source)[:, 2, 4] - logits(torch.zeros_like(source))[:, 2, 4]
    torch.testing.assert_close(values.sum(1), difference.detach(), rtol=0.02, atol=1e-3)
    assert not values[1, 3:].any()
    weights = explain.attention(model, source, target, lengths)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 4))


# ---- spectrograms, several inputs, named heads ----


def test_time_frequency_region(mode):
    """ParallelCNNRNN with named heads: a tone in one region of time and frequency decides."""
    torch.manual_seed(0)
    model = models.ParallelCNNRNN({"tone": 2}, 12, channels=(8,), hidden_size=8, fusion="gated")

    def batch(count=32):
        x, labels = 0.1 * torch.rand(count, 10, 12), torch.arange(count) % 2
        x[labels == 1, 4:7, 8:10] += 1.0
        return x, labels

    trained(model, batch, 40)
    x, labels = batch(4)
    with running_on(mode, "conv_pool2d", "gru"):
        values = explain.integrated_gradients(model, x, 1, head="tone")
    for value in values[labels == 1]:
        assert value[4:7, 8:10].sum() > 0.5 * value.clamp(min=0).sum()
    with pytest.raises(ValueError, match=r"head: .*'tone'"):
        explain.integrated_gradients(model, x, 1)


def test_several_inputs_of_one_function():
    """A MultiModal model through a function of tensors: an attribution for each input."""
    video, audio = torch.randn(2, 3, 1, 12, 12), torch.randn(2, 6, 8)
    model = models.MultiModal(
        {
            "video": models.CNNRNN(2, 1, (12, 12), (4,), 5),
            "audio": models.ParallelCNNRNN(2, 8, channels=(4,)),
        },
        3,
        fusion="gated",
    )

    def answer(video, audio):
        return model({"video": video, "audio": audio})

    values = explain.integrated_gradients(answer, (video, audio), 2, n_steps=200)
    assert [value.shape for value in values] == [video.shape, audio.shape]
    expected = answer(video, audio)[:, 2] - answer(torch.zeros_like(video), torch.zeros_like(audio))[:, 2]
    added = sum(value.flatten(1).sum(1) for value in values)
    torch.testing.assert_close(added, expected.detach(), rtol=0.02, atol=1e-3)


# ---- what a call leaves behind ----


def test_modes_and_gradients_are_as_before():
    model = models.CNNRNN(2, 1, (12, 12), (4,), 5, dropout=0.9, readout="attention").train()
    model.cnn.eval()
    model.heads.weight.grad = torch.full_like(model.heads.weight, 3.0)
    x = torch.randn(2, 3, 1, 12, 12)
    calls = (
        lambda: explain.integrated_gradients(model, x, 0, n_steps=5),
        lambda: explain.occlusion(model, x, 0, window=(1, 1, 12, 12)),
        lambda: explain.attention(model, x),
    )
    for call in calls:
        first = call()
        assert first.equal(call())  # no dropout
        assert not first.requires_grad
        assert model.training
        assert not model.cnn.training
    assert (model.heads.weight.grad == 3.0).all()
    assert model.rnn.weight_ih_l0.grad is None
    assert not x.requires_grad


def test_modes_come_back_after_an_error():
    model = models.CNNRNN(2, 1, (12, 12), (4,), 5)
    with pytest.raises(RuntimeError, match="clips"):
        explain.integrated_gradients(model, torch.randn(2, 3, 1, 5, 5), 0)
    assert model.training


def test_without_captum_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install cnnrnn_ext\[recipes\]"):
        explain.integrated_gradients(nn.Linear(2, 2), torch.randn(1, 2), 0)


def test_bad_arguments():
    model, x = models.CNNRNN(2, 1, (12, 12), (4,), 5), torch.randn(2, 3, 1, 12, 12)
    with pytest.raises(ValueError, match="method"):
        explain.per_step_relevance(model, x, 0, method="guess")
    with pytest.raises(ValueError, match="head"):
        explain.integrated_gradients(model, x, 0, head="a")
    with pytest.raises(TypeError, match="inputs"):
        explain.integrated_gradients(model, [1.0], 0)
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        explain.occlusion(model, (x, None), 0, window=(1, 1, 4, 4))
    with pytest.raises(RuntimeError, match="inputs"):
        explain.per_step_relevance(model, x[0, 0, 0, 0], 0)
    with pytest.raises(ValueError, match="layer"):
        explain.integrated_gradients(model, torch.ones(2, 3, dtype=torch.int64), 0)
    with pytest.raises(RuntimeError, match="readout"):
        explain.attention(model, x)
