"""fuse_ and unfuse_: the same outputs, gradients, state dict and parameters; a reason for what stays."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from _oracle import check_error
from torch import nn

import cnnrnn_ext as cx

IMAGES = (3, 3, 33, 30)


def drawn(model, dtype=torch.float32):
    """The model with BatchNorms as training leaves them, scales of both signs among them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.to(dtype)


class Attributes(nn.Module):
    """The way most people write it: modules as attributes, a forward that joins them."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(16, 24, 3, padding="same")
        self.act2 = nn.LeakyReLU()
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.act2(self.conv2(x)).mean((2, 3)))


class Residual(nn.Module):
    """A block that calls one ReLU twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.relu = nn.ReLU()
        self.shortcut = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class Recurrent(nn.Module):
    """A CNN, an LSTM, a GRU cell; the forward looks at values, so that it cannot be followed."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh()
        )
        self.lstm = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True, proj_size=6)
        self.cell = nn.GRUCell(12, 7)
        self.elman = nn.RNN(7, 5, nonlinearity="relu")

    def forward(self, x):
        if x.sum() > 1e30:
            raise ValueError("too bright")
        y, _ = self.lstm(self.cnn(x).flatten(2).mT)
        return self.elman(self.cell(y[:, -1])[None])[0]


def sequences():
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.AvgPool1d(2),
        nn.Conv1d(8, 8, 3, stride=2), nn.MaxPool1d(2), nn.ReLU(),
        nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect"), nn.Dropout(0.0), nn.ReLU(),
    )  # fmt: skip


def images():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, groups=2), nn.BatchNorm2d(16, track_running_stats=False), nn.GELU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.AvgPool2d(2, ceil_mode=True),
    )  # fmt: skip


MODELS = {
    "attributes": (Attributes, IMAGES, ["conv1", "conv2"]),
    "residual": (Residual, IMAGES, ["conv1", "conv2"]),
    "recurrent": (Recurrent, IMAGES, ["cnn.0", "cnn.3", "lstm", "cell", "elman"]),
    "sequences": (sequences, (2, 3, 61), ["0", "4"]),
    "images": (images, IMAGES, ["0", "3", "6"]),
}
each_model = pytest.mark.parametrize("kind", list(MODELS))


def run(model, x):
    """(output, {name: gradient}) of a fixed random loss."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights.cos()).sum().backward()
    return y.detach(), {"input": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@each_model
@pytest.mark.parametrize("training", [False, True])
def test_fused_model_equals_the_model_it_was(kind, training, mode):
    build, shape, changed = MODELS[kind]
    model = drawn(build()).train(training)
    exact, stock = copy.deepcopy(model).double(), copy.deepcopy(model)
    report = cx.fuse_(model)
    assert [name for name, _, _ in report.changed] == changed
    x = torch.randn(shape)
    with cx.backend(mode) if mode == "reference" else cx.backend("auto"), cx.trace() as log:
        ours, our_gradients = run(model, x)
    assert log
    if mode == "reference":
        assert {call.backend for call in log} == {"reference"}
    theirs, their_gradients = run(stock, x)
    oracle, exact_gradients = run(exact, x.double())
    check_error("output", ours, theirs, oracle)
    scale = max(g.abs().max().item() for g in exact_gradients.values())
    for name, gradient in exact_gradients.items():
        check_error(name, our_gradients[name], their_gradients[name], gradient, scale=scale)
    for ours, theirs in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fused_blocks_run_on_one_kernel_each(compiled):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    cx.fuse_(model)
    with cx.backend("compiled"), cx.trace() as log:
        model(torch.randn(2, 3, 20, 20))
    assert [(call.op, call.backend) for call in log] == [("conv_pool2d", "compiled")]


@each_model
def test_state_dict_and_parameters_stay(kind):
    model = drawn(MODELS[kind][0]())
    stock = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    cx.fuse_(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    other = drawn(MODELS[kind][0]())
    model.load_state_dict(other.state_dict(), strict=True)
    stock.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(MODELS[kind][1])
    torch.testing.assert_close(model.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-5)


@each_model
def test_unfuse_gives_the_stock_model_back(kind):
    model = drawn(MODELS[kind][0]()).eval()
    stock = copy.deepcopy(model)
    cx.fuse_(model)
    model.train()
    cx.unfuse_(model)
    assert repr(model) == repr(stock)
    assert all(module.training for module in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    x = torch.randn(MODELS[kind][1])
    torch.testing.assert_close(model.eval()(x), stock(x), rtol=0, atol=0)


def test_training_goes_on_with_the_optimizer_of_before():
    model = drawn(Attributes())
    stock = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, stock)]
    cx.fuse_(model)
    for _ in range(3):
        x = torch.randn(IMAGES)
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            run(m, x)
            optimizer.step()
    for (name, ours), theirs in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def _update(model):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def _running(model):
    model.train()(torch.randn(IMAGES) * 3)
    model.eval()


def _load(model):
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model.load_state_dict(drawn(fresh).state_dict())


def _assign(model):
    model[1].weight = nn.Parameter(torch.randn(8))


def _buffer(model):
    model[1].running_var = torch.rand(8) + 0.5


@pytest.mark.parametrize("change", [_update, _running, _load, _assign, _buffer])
def test_folded_weights_are_never_stale(change):
    model = drawn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval()
    cx.fuse_(model)
    x = torch.randn(IMAGES)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(model(x), before)
    change(model)
    parameters = model.state_dict()
    y = F.conv2d(x, parameters["0.weight"], parameters["0.bias"])
    statistics = parameters["1.running_mean"], parameters["1.running_var"]
    expected = F.batch_norm(y, *statistics, parameters["1.weight"], parameters["1.bias"]).relu()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_frozen_norm_in_a_training_model_is_folded_with_gradients():
    model = drawn(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)))
    stock = copy.deepcopy(model)
    cx.fuse_(model)
    for m in (model, stock):
        m.train()
        m[1].eval()
    x = torch.randn(IMAGES)
    with cx.trace() as log:
        ours, gradients = run(model, x)
    assert "conv_pool2d" in {call.op for call in log}
    theirs, stock_gradients = run(stock, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, gradient in stock_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "double"])
def test_copies_and_conversions_stay_joined(copied):
    model = drawn(Attributes()).eval()
    cx.fuse_(model)
    x = torch.randn(IMAGES)
    with torch.no_grad():
        before = model(x)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other, x = copy.deepcopy(model).double(), x.double()
    with torch.no_grad():
        torch.testing.assert_close(other(x).float(), before, rtol=1e-4, atol=1e-5)
        other.bn1.bias.add_(1)  # the convolution must see the copy's own norm, and the first not at all
        assert not torch.allclose(other(x).float(), before, atol=1e-3)
        torch.testing.assert_close(model(x.float()), before)
    cx.unfuse_(other)
    assert type(other.bn1) is nn.BatchNorm2d


def test_torch_save_of_the_whole_model():
    model = drawn(Attributes()).eval()
    cx.fuse_(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(IMAGES)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x))


def test_compiles_as_one_graph():
    model = drawn(Attributes()).eval()
    cx.fuse_(model)
    x = torch.randn(IMAGES)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, model(x))


# ---- what stays, and why ----


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


# ---- our own modules as stock ones ----


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("layer", [cx.LSTM, cx.GRU, cx.RNN])
def test_unfused_layers_take_lengths(layer, batch_first):
    model = nn.ModuleList([layer(5, 6, 2, batch_first=batch_first, bidirectional=True)])
    x, lengths = torch.randn((4, 7, 5) if batch_first else (7, 4, 5)), torch.tensor([4, 7, 0, 1])
    h_0 = torch.randn(4, 4, 6)
    states = (None, (h_0, torch.randn(4, 4, 6)) if layer is cx.LSTM else h_0)
    expected = [model[0](x, hx, lengths=lengths) for hx in states]
    cx.unfuse_(model)
    assert isinstance(model[0], getattr(nn, layer.__name__))
    torch.testing.assert_close([model[0](x, hx, lengths=lengths) for hx in states], expected)


@pytest.mark.parametrize("pool", ["max", "avg", "none"])
@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
def test_unfused_conv_pool(activation, pool):
    options = {"activation": activation, "pool": pool, "pool_size": 3, "pool_stride": 2, "pool_padding": 1}
    model = nn.Sequential(
        cx.ConvPool2d(3, 4, 3, 2, 1, padding_mode="circular", **options),
        nn.Flatten(2),
        cx.ConvPool1d(4, 5, 3, bias=False, **options),
    )
    x = torch.randn(2, 3, 24, 20)
    expected, names = model(x), list(model.state_dict())
    cx.unfuse_(model)
    assert not any(type(m).__module__.startswith("cnnrnn_ext.modules") for m in model.modules())
    assert isinstance(model[0], nn.Conv2d)
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == names
