"""fuse_ and unfuse_: the same outputs, gradients, state dict and parameters."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from _fuse_models import IMAGES, MODELS, Attributes, drawn, each_model, run
from _oracle import check_error
from torch import nn

import cnnrnn_ext as cx


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
