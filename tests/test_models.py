"""What all models keep: formulas, compile, export, state dicts, copies, errors."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from _oracle import compiled_missing
from torch import nn

import cnnrnn_ext as cx
from cnnrnn_ext import models


def clips(*lengths):
    return torch.randn(len(lengths), max(lengths), 2, 12, 12)


MODELS = {
    "cnnrnn": lambda: (
        models.CNNRNN({"a": 3, "b": 2}, 2, (12, 12), (4, 5), 6, readout="attention", bidirectional=True),
        (clips(4, 2, 3), torch.tensor([4, 2, 3])),
    ),
    "rnncnn": lambda: (
        models.RNNCNN(20, 3, 5, 4, channels=6, widths=(2, 3)),
        (torch.randint(1, 20, (3, 7)), torch.tensor([7, 2, 4])),
    ),
    "parallel": lambda: (
        models.ParallelCNNRNN(3, 8, channels=(4, 5), hidden_size=6, fusion="gated"),
        (torch.randn(3, 10, 8), torch.tensor([10, 5, 6])),
    ),
    "seq2seq": lambda: (
        models.Seq2Seq(12, 9, 5, 4),
        (torch.randint(3, 12, (3, 6)), torch.randint(1, 9, (3, 5)), torch.tensor([6, 1, 3])),
    ),
    "multimodal": lambda: (
        models.MultiModal({"video": MODELS["cnnrnn"]()[0], "text": MODELS["rnncnn"]()[0]}, 4, fusion="gated"),
        ({"video": (clips(4, 2, 3), torch.tensor([4, 2, 3])), "text": torch.randint(1, 20, (3, 7))},),
    ),
}


def logits_of(y):
    return list(y.values()) if isinstance(y, dict) else [y]


def run(function, model, inputs):
    model.zero_grad()
    logits = logits_of(function(*inputs))
    sum((y**2).sum() for y in logits).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [y.detach() for y in logits], gradients


# ---- the formulas, as they are written ----


def test_convolution_is_a_valid_cross_correlation(mode):
    """y[k, i, j] = b[k] + sum over c, u, v of W[k, c, u, v] x[c, i + u, j + v], number by number."""
    tensors = [torch.randn(s, dtype=torch.float64) for s in ((2, 5, 6), (3, 2, 3, 3), (3,))]
    x, w, b = (tensor.tolist() for tensor in tensors)
    y = torch.zeros(3, 3, 4, dtype=torch.float64)
    for k in range(3):
        for i in range(3):
            for j in range(4):
                y[k, i, j] = b[k] + sum(
                    w[k][c][u][v] * x[c][i + u][j + v] for c in range(2) for u in range(3) for v in range(3)
                )
    # A pool of one position changes nothing, and has a kernel.
    with cx.backend(mode):
        ours = cx.functional.conv_pool2d(*tensors, activation="none", pool_size=1)
        pooled = cx.functional.conv_pool2d(*tensors)
    torch.testing.assert_close(ours, y)
    for k, i, j in ((k, i, j) for k in range(3) for i in range(1) for j in range(2)):
        window = y[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        torch.testing.assert_close(pooled[k, i, j], window.clamp(min=0).max())


@pytest.mark.parametrize(("rnn", "f"), [("rnn", torch.tanh), ("rnn_relu", torch.relu)])
def test_recurrence(mode, rnn, f):
    """h_t = f(W_h h_{t-1} + W_x x_t + b), from h_0 = 0, in the model: its logits are the head of h_T."""
    model = models.CNNRNN(3, 1, (8, 8), (4,), 5, rnn=rnn).double()
    x = torch.randn(2, 6, 1, 8, 8, dtype=torch.float64)
    w_x, w_h = model.rnn.weight_ih_l0, model.rnn.weight_hh_l0
    b = model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0
    for row in range(2):
        h = torch.zeros(5, dtype=torch.float64)
        for t in range(6):
            h = f(w_h @ h + w_x @ model.cnn(x[row, t : t + 1])[0] + b)
        with cx.backend(mode):
            torch.testing.assert_close(model(x)[row], model.heads.weight @ h + model.heads.bias)


def test_the_seeds_network(compiled):
    """Conv2D(32, 3), MaxPooling2D, Conv2D(64, 3), MaxPooling2D, Flatten, LSTM(128): 1600 features a frame."""
    model = models.CNNRNN(10)
    assert [tuple(p.shape) for p in model.cnn.parameters()] == [(32, 1, 3, 3), (32,), (64, 32, 3, 3), (64,)]
    assert (model.rnn.input_size, model.rnn.hidden_size) == (1600, 128)
    stock = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
    )  # fmt: skip
    for ours, theirs in zip(model.cnn.parameters(), stock.parameters(), strict=True):
        theirs.data.copy_(ours)
    lstm = nn.LSTM(1600, 128, batch_first=True)
    lstm.load_state_dict(model.rnn.state_dict())
    x = torch.rand(3, 16, 1, 28, 28)
    expected = model.heads(lstm(stock(x.flatten(0, 1)).unflatten(0, (3, 16)))[0][:, -1])
    with cx.backend("compiled"):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# ---- every model ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("name", ["cnnrnn", "rnncnn", "parallel", "seq2seq"])
def test_full_graph(name):
    """One graph of torch.compile, with lengths, forward and backward; our operators stand in it."""
    model, inputs = MODELS[name]()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=keep)
    for ours, eager in zip(run(compiled, model, inputs), run(model, model, inputs), strict=True):
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    if compiled_missing() is None:
        names = {str(node.target) for node in graphs[0].graph.nodes}
        assert any("cnnrnn_ext.rnn" in name for name in names)
        assert any("cnnrnn_ext.conv_pool2d" in name for name in names) == (name != "seq2seq")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["cnnrnn", "rnncnn", "parallel", "seq2seq"])
def test_export_with_dynamic_batch(name):
    model, inputs = MODELS[name]()
    model.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False
        )
        more = tuple(torch.cat((x, x)) for x in inputs)
        for a, b in zip(logits_of(program.module()(*more)), logits_of(model(*more)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_copies(name):
    """State dict, deepcopy, pickle and torch.save: the same answers, from memory of their own."""
    model, inputs = MODELS[name]()
    model.eval()
    expected = logits_of(model(*inputs))
    other, _ = MODELS[name]()
    other.eval().load_state_dict(model.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(file, weights_only=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in copies:
        for a, b in zip(logits_of(twin(*inputs)), expected, strict=True):
            assert a.equal(b)


@pytest.mark.parametrize("name", MODELS)
def test_unfused_and_on_the_reference(name):
    """The stock model (unfuse_), and plain PyTorch: the same logits and gradients; stock layers only."""
    model, inputs = MODELS[name]()
    expected = run(model, model, inputs)
    with cx.backend("reference"):
        results = [run(model, model, inputs)]
    stock = copy.deepcopy(model)
    cx.unfuse_(stock)
    with cx.trace() as log:
        results.append(run(stock, stock, inputs))
    assert log == []
    for result in results:
        for ours, theirs in zip(expected, result, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_training_learns(name):
    """Some steps of Adam bring the loss of a batch down: every part is reached by the gradient."""
    model, inputs = MODELS[name]()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = sum(
            F.cross_entropy(y.flatten(0, -2), torch.arange(len(y.flatten(0, -2))) % y.shape[-1])
            for y in logits_of(model(*inputs))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    """Under bfloat16 autocast the models run, padded rows too, and stay near."""
    model, inputs = MODELS[name]()
    expected = logits_of(model(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        result = logits_of(model(*inputs))
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05)


# ---- bad input ----


def cnnrnn(**options):
    return models.CNNRNN(2, 2, (12, 12), (4, 4), 4, **options)


@pytest.mark.parametrize(
    ("build", "kind", "name"),
    [
        (lambda: models.CNNRNN({}), ValueError, "heads"),
        (lambda: models.CNNRNN(0), RuntimeError, "heads"),
        (lambda: models.CNNRNN({"a": 2.5}), TypeError, "heads\\['a'\\]"),
        (lambda: models.CNNRNN(2, frame_size=(6, 6)), ValueError, "frame_size"),
        (lambda: models.CNNRNN(2, frame_size=(3, 9), cnn="vgg"), ValueError, "frame_size"),
        (lambda: cnnrnn(cnn="alexnet"), ValueError, "cnn"),
        (lambda: cnnrnn(cnn=TwoAnswers()), TypeError, "cnn"),
        (lambda: models.CNNRNN(2, channels=()), ValueError, "channels"),
        (lambda: models.CNNRNN(2, channels=(4, 0)), RuntimeError, "channels"),
        (lambda: cnnrnn(rnn="mamba"), ValueError, "rnn"),
        (lambda: cnnrnn(readout="first"), ValueError, "readout"),
        (lambda: cnnrnn(dropout=1.5), ValueError, "dropout"),
        (lambda: models.RNNCNN(9, 2, widths=()), ValueError, "widths"),
        (lambda: models.RNNCNN(9, 2, padding_id=9), ValueError, "padding_id"),
        (lambda: models.RNNCNN(9, 2, embedding=torch.zeros(8, 4)), RuntimeError, "embedding"),
        (lambda: models.ParallelCNNRNN(2, 3), ValueError, "frequencies"),
        (lambda: models.ParallelCNNRNN(2, 8, time_pools=3), ValueError, "time_pools"),
        (lambda: models.ParallelCNNRNN(2, 8, fusion="sum"), ValueError, "fusion"),
        (lambda: models.ParallelCNNRNN(2, 8, output="words"), ValueError, "output"),
        (lambda: models.ParallelCNNRNN(2, 8, readout="last"), ValueError, "readout"),
        (lambda: models.ParallelCNNRNN(2, 8, output="steps", readout="first"), ValueError, "readout"),
    ],
)
def test_bad_arguments(build, kind, name):
    with pytest.raises(kind, match=name):
        build()


class TwoAnswers(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("call", "kind", "name"),
    [
        (lambda: cnnrnn()(torch.randn(2, 3, 1, 12, 12)), RuntimeError, "clips: .*2, 12, 12"),
        (lambda: cnnrnn()(torch.randn(3, 2, 12, 12)), RuntimeError, "clips"),
        (lambda: cnnrnn()([1.0]), TypeError, "clips"),
        (lambda: cnnrnn()(clips(3, 3), torch.tensor([3])), RuntimeError, "lengths"),
        (lambda: cnnrnn()(clips(3, 3), torch.tensor([3, 4])), RuntimeError, "lengths"),
        (lambda: cnnrnn()(clips(3, 3), torch.tensor([3.0, 2.0])), RuntimeError, "lengths"),
        (lambda: cnnrnn().attention(clips(3, 3)), RuntimeError, "readout"),
        (lambda: models.RNNCNN(9, 2)(torch.tensor([[1, 9]])), IndexError, "tokens: .*0 to 8"),
        (lambda: models.RNNCNN(9, 2)(torch.tensor([1, 2])), RuntimeError, "tokens"),
        (lambda: models.RNNCNN(9, 2)(torch.tensor([[1, 2]]), torch.tensor([3])), RuntimeError, "lengths"),
        (lambda: models.ParallelCNNRNN(2, 8)(torch.randn(2, 6, 7)), RuntimeError, "spectrogram"),
        (lambda: models.ParallelCNNRNN(2, 8)(torch.randn(2, 1, 8)), RuntimeError, "spectrogram"),
    ],
)
def test_bad_input(call, kind, name):
    with pytest.raises(kind, match=name):
        call()


def test_pretrained_embedding():
    vectors = torch.randn(9, 5)
    model = models.RNNCNN(9, 2, 64, 4, embedding=vectors, freeze_embedding=True)
    assert model.embedding.weight[1:].equal(vectors[1:])
    assert not model.embedding.weight[0].any()
    assert model.embedding.weight.data_ptr() != vectors.data_ptr()
    model(torch.randint(1, 9, (2, 5))).sum().backward()
    assert model.embedding.weight.grad is None
    assert model.rnn.weight_ih_l0.grad.any()
