"""fuse_ leaves what it must not touch, and says why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _fuse_models import IMAGES, Recurrent
from torch import nn

import cnnrnn_ext as cx


class Tapped(nn.Module):
    """Reads a map between convolution and ReLU, as perceptual losses do."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())

    def forward(self, x):
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == 0:
                taps.append(x)
        return taps[0].sum() + x.sum()


class ByMode(nn.Module):
    """Pools only in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.act(self.conv(x))
        return x.mean() if self.training else self.pool(x).mean()


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(F.relu(self.conv(x)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(self.act(self.conv(x))))


class Watching(nn.Module):
    """Writes to itself while it computes."""

    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.last, self.calls = None, 0

    def forward(self, x):
        self.calls += 1
        self.last = self.act(self.conv(x))
        return self.last


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    return model


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU())


def overridden():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].forward = lambda x: x
    return model


def shared():
    conv = nn.Conv2d(3, 3, 3)
    return nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU())


def other_slope():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Functions, "relu follows, no module"),
        (Twice, "it is called several times"),
        (hooked, "ReLU follows and has hooks"),
        (weight_normed, "it is parametrized"),
        (overridden, "it has a forward of its own"),
        (shared, "it stands in the model under several names"),
        (other_slope, "LeakyReLU follows"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU()), None),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).requires_grad_(False)), "fused"),
    ],
)
def test_reasons(build, reason):
    report = cx.fuse_(build())
    if reason == "fused":
        assert len(report.changed) == 1
        return
    assert report.changed == []
    assert [why for _, _, why in report.skipped] == ([] if reason is None else [reason])


def test_a_map_that_is_read_in_between_stays():
    model = Tapped()
    stock = copy.deepcopy(model)
    report = cx.fuse_(model)
    assert report.skipped == [("features.0", "Conv2d", "its output is used several times")]
    assert [name for name, _, _ in report.changed] == ["features.2"]
    x = torch.randn(IMAGES)
    torch.testing.assert_close(model(x), stock(x))


def test_only_what_both_modes_do_is_fused():
    model = ByMode()
    stock = copy.deepcopy(model)
    assert cx.fuse_(model).changed == [("conv", "Conv2d + ReLU", "cnnrnn_ext.ConvPool2d")]
    x = torch.randn(IMAGES)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), stock.train(training)(x))


def test_following_a_forward_leaves_no_trace_in_the_model():
    model = Watching()
    assert len(cx.fuse_(model).changed) == 1
    assert (model.last, model.calls) == (None, 0)


def test_dry_run_and_filter():
    model = Recurrent()
    before = repr(model)
    report = cx.fuse_(model, dry_run=True)
    assert repr(model) == before
    assert len(report.changed) == 5
    assert "5 would change" in str(report)
    assert "lstm: LSTM -> cnnrnn_ext.LSTM" in str(report)
    asked = []
    report = cx.fuse_(model, lambda name, module: asked.append((name, type(module))) or name == "cell")
    assert [name for name, _, _ in report.changed] == ["cell"]
    assert ("lstm", nn.LSTM) in asked
    assert ("lstm", "LSTM", "filter_fn") in report.skipped


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        cx.fuse_("model")
    with pytest.raises(TypeError, match="filter_fn"):
        cx.fuse_(nn.Sequential(), filter_fn="conv")
    with pytest.raises(ValueError, match="model: it is itself an LSTM"):
        cx.fuse_(nn.LSTM(2, 3))
    with pytest.raises(ValueError, match="model: it is itself a ConvPool2d"):
        cx.unfuse_(cx.ConvPool2d(2, 3, 3))
    model = nn.ModuleDict({"a": cx.LSTM(2, 3), "b": cx.LSTM(2, 3, layer_norm=True, zoneout=0.1)})
    with pytest.raises(ValueError, match="b has zoneout, layer_norm"):
        cx.unfuse_(model)
    assert type(model["a"]) is cx.LSTM
