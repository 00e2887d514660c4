"""CNNRNN: any module as the network of a frame, frozen or fine-tuned; its BatchNorm and what it may see."""

import copy

import pytest
import torch
from torch import nn

import cnnrnn_ext as cx
from cnnrnn_ext import models


def clips(*lengths):
    return torch.randn(len(lengths), max(lengths), 2, 12, 12)


def backbone(width=6):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, stride=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
    )


def test_any_module_as_cnn():
    """Its features are found by trying, which leaves it as it was; then it is run on every frame."""
    cnn = backbone()
    before, random = copy.deepcopy(cnn.state_dict()), torch.get_rng_state()
    cnn[3].eval()
    model = models.CNNRNN(3, 2, (12, 12), hidden_size=5, cnn=cnn, readout="mean")
    rnn = cx.LSTM(6, 5)
    torch.set_rng_state(random)
    assert model.cnn is cnn
    assert model.rnn.input_size == 6
    assert [m.training for m in cnn.modules()] == [True, True, True, True, False, True]
    for name, value in cnn.state_dict().items():
        assert value.equal(before[name]), name
    model.eval()
    x = clips(4, 4)
    rnn.load_state_dict(model.rnn.state_dict())
    features = torch.stack([cnn(x[:, t]).flatten(1) for t in range(4)])
    torch.testing.assert_close(model(x), model.heads(rnn(features)[0].mean(0)))


def test_feature_size_is_asked_where_frames_have_no_one_size():
    model = models.CNNRNN(3, 2, None, hidden_size=5, cnn=backbone(), feature_size=6).eval()
    for size in (9, 14):
        x = torch.randn(2, 3, 2, size, size + 2)
        torch.testing.assert_close(model(x)[1:], model(x[1:]))
    for arguments in ({"cnn": backbone()}, {"cnn": "seed"}, {"cnn": "seed", "feature_size": 3}):
        with pytest.raises(ValueError, match="frame_size"):
            models.CNNRNN(3, 2, None, **arguments)


@pytest.mark.parametrize("cnn", ["resnet", "module"])
def test_frozen_cnn(cnn):
    """Through train(), of a parent too: BatchNorm keeps its statistics; only frames get a gradient."""
    cnn = backbone() if cnn == "module" else cnn
    model = models.CNNRNN(3, 2, (12, 12), (8, 8), 5, cnn=cnn, freeze_cnn=True)
    parent = models.MultiModal({"video": model}, 3, fusion="late").eval().train()
    norms = [module for module in model.cnn.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in model.cnn.modules())
    assert model.rnn.training
    before = copy.deepcopy(model.cnn.state_dict())
    x = clips(4, 2).requires_grad_()
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1)
    parent({"video": (x, torch.tensor([4, 2]))}).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.cnn.parameters())
    assert model.rnn.weight_ih_l0.grad.any()
    assert x.grad[0].any()
    for name, value in model.cnn.state_dict().items():
        assert value.equal(before[name]), name
    with torch.no_grad():
        assert model(x).equal(model(x))  # no dropout within


def test_fine_tuned_cnn_trains():
    model = models.CNNRNN(3, 2, (12, 12), (8, 8), 5, cnn="resnet").eval().train()
    norm = next(module for module in model.cnn.modules() if isinstance(module, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(clips(4, 4)).square().sum().backward()
    assert not norm.running_mean.equal(before)
    assert all(p.grad is not None for p in model.cnn.parameters())


def test_padding_enters_no_statistics():
    """BatchNorm in training sees the frames before the rows' ends only."""
    x, lengths = clips(4, 4), torch.tensor([4, 1])
    results = []
    for fill in (0.0, 1e6, torch.nan):
        torch.manual_seed(0)
        model = models.CNNRNN(3, 2, (12, 12), (8, 8), 5, cnn="resnet")
        x[1, 1:] = fill
        results.append([model(x, lengths), *model.buffers()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.equal(b)


@pytest.mark.usefixtures("fresh_graphs")
def test_a_graph_refuses_padding_in_statistics():
    """One graph cannot leave padding out; torch.compile that may break it runs that part without a graph."""
    model = models.CNNRNN(3, 2, (12, 12), hidden_size=5, cnn=nn.Sequential(*backbone()[:3]))
    x, lengths = clips(4, 2), torch.tensor([4, 2])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="BatchNorm"):
        torch.compile(model, backend="eager", fullgraph=True)(x, lengths)
    x[1, 2:] = torch.nan
    expected = model(x, lengths)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, lengths), expected)


def library_net(name):
    """A network of torchvision or timm, as its users get it, without its last layer."""
    try:
        if name == "torchvision":
            from torchvision.models import resnet18

            net = resnet18()
            net.fc = nn.Identity()
            return net
        import timm

        return timm.create_model("resnet10t", num_classes=0)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_networks_of_the_libraries(name, freeze):
    model = models.CNNRNN(3, 3, (64, 64), hidden_size=8, cnn=library_net(name), freeze_cnn=freeze)
    before, x = copy.deepcopy(model.cnn.state_dict()), torch.randn(2, 3, 3, 64, 64)
    model(x).square().sum().backward()
    assert all((p.grad is None) == freeze for p in model.cnn.parameters())
    assert all(value.equal(before[key]) for key, value in model.cnn.state_dict().items()) == freeze
    model.eval()
    features = torch.stack([model.cnn(x[:, t]) for t in range(3)])
    torch.testing.assert_close(model(x), model.heads(model.rnn(features)[1][0][-1]))
