"""torch.compile without graph breaks, forward and backward, and torch.export."""

import io

import pytest
import torch
from _oracle import compiled_missing
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.compile_fx import compile_fx

import cnnrnn_ext as cx


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def small_model():
    return cx.models.CNNRNN({"a": 3, "b": 2}, 1, (12, 12), (4, 5), 7)


def loss_and_gradients(function, model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    heads = function(x)
    loss = sum((y.double() ** 2).sum() for y in heads.values())
    loss.backward()
    return [y.detach() for y in heads.values()], [x.grad, *(p.grad.clone() for p in model.parameters())]


def check(function, model, x):
    expected = loss_and_gradients(model, model, x)
    result = loss_and_gradients(function, model, x)
    for ours, eager in zip(result, expected, strict=True):
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_cnnrnn_full_graph_with_inductor():
    """One graph, compiled by inductor, the same losses and gradients; our operators stand in the graph."""
    model = small_model()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    check(torch.compile(model, fullgraph=True, backend=backend), model, torch.randn(2, 3, 1, 12, 12))
    assert len(graphs) == 1
    operators = {str(node.target) for node in graphs[0].graph.nodes if "cnnrnn_ext" in str(node.target)}
    if compiled_missing() is None:
        assert operators == {"cnnrnn_ext.conv_pool2d_train", "cnnrnn_ext.rnn_train"} or operators == {
            "cnnrnn_ext.conv_pool2d_train.default",
            "cnnrnn_ext.rnn_train.default",
        }
    else:
        assert operators == set()


@pytest.mark.filterwarnings("ignore")
def test_dynamic_batch_does_not_recompile():
    model = small_model()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for batch in (4, 5, 7):  # 3 would be taken for the number of frames
        check(compiled, model, torch.randn(batch, 3, 1, 12, 12))
        compilations.append(counter.frame_count)
    assert compilations[0] > 0
    assert compilations[1:] == compilations[:1] * 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: cx.LSTM(5, 6, num_layers=2, bidirectional=True, batch_first=True), (3, 4, 5)),
        (lambda: cx.LSTM(5, 6, proj_size=3), (4, 3, 5)),
        (lambda: cx.GRU(5, 6, num_layers=2, bidirectional=True, batch_first=True), (3, 4, 5)),
        (lambda: cx.RNN(5, 6, nonlinearity="relu"), (4, 3, 5)),
        (lambda: cx.LSTMCell(5, 6), (3, 5)),
        (lambda: cx.GRUCell(5, 6), (3, 5)),
        (lambda: cx.RNNCell(5, 6), (3, 5)),
        (lambda: cx.ConvPool2d(2, 3, 3, padding="same", pool_size=3, pool_stride=2), (2, 2, 9, 9)),
        (lambda: cx.ConvPool1d(2, 3, 3), (2, 2, 9)),
    ],
    ids=["lstm", "lstm proj", "gru", "rnn", "lstm cell", "gru cell", "rnn cell", "conv2d", "conv1d"],
)
def test_module_full_graph(make, shape):
    module = make()

    def tensors(y):
        return [y] if isinstance(y, torch.Tensor) else [t for part in y for t in tensors(part)]

    def run(function, x):
        module.zero_grad()
        outputs = tensors(function(x))
        sum((y**2).sum() for y in outputs).backward()
        return [y.detach() for y in outputs], [p.grad.clone() for p in module.parameters()]

    x = torch.randn(shape)
    expected = run(module, x)
    result = run(torch.compile(module, fullgraph=True, backend="aot_eager"), x)
    for ours, eager in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.no_grad():
        y = tensors(torch.compile(module, fullgraph=True, backend="aot_eager")(x))
    for a, b in zip(y, expected[0], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_export_with_dynamic_batch():
    """The exported program holds our operators, and computes the same at another batch size."""
    model = small_model().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(2, 3, 1, 12, 12),), dynamic_shapes=({0: batch},), strict=False
        )
        clips = torch.randn(5, 3, 1, 12, 12)
        expected, result = model(clips), program.module()(clips)
    for name, y in expected.items():
        torch.testing.assert_close(result[name], y)
    if compiled_missing() is None:
        assert any("cnnrnn_ext" in str(node.target) for node in program.graph.nodes)


# ---- recurrent layers ----


class Sequences(torch.nn.Module):
    """Two recurrent layers of different kinds and a head, over padded input."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first(5, 6, bidirectional=True), second(12, 4)
        self.head = torch.nn.Linear(4, 3)

    def forward(self, x, lengths=None, reset=None):
        y, _ = self.first(x, lengths=lengths, reset=reset)
        y, state = self.second(torch.tanh(y), lengths=lengths, reset=reset)
        return self.head(y), state[0] if isinstance(state, tuple) else state


class Counting:
    """A backend of torch.compile that keeps the graphs, forward and backward, that it is given."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        def keep(part, _):
            self.graphs.append(part)
            return make_boxed_func(part.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    def sizes(self):
        return [len(graph.graph.nodes) for graph in self.graphs]

    def operators(self):
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return [str(node.target) for node in nodes if "cnnrnn_ext" in str(node.target)]


def run_with_gradients(function, module, *inputs):
    module.zero_grad()
    outputs = function(*inputs)
    sum((y**2).sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), *(p.grad.clone() for p in module.parameters())]


LAYERS = {
    "lstm and gru": (cx.LSTM, cx.GRU),
    "gru and lstm": (cx.GRU, cx.LSTM),
    "rnn and gru": (cx.RNN, cx.GRU),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["padded", "lengths and reset"])
@pytest.mark.parametrize("layers", LAYERS)
def test_graphs_do_not_grow_with_time(layers, given):
    """One operator a layer, forward and backward: 400 steps make the graphs of 4, in one piece."""
    model, sizes = Sequences(*LAYERS[layers]), []
    for steps in (4, 400):
        torch.compiler.reset()
        counting, x = Counting(), torch.randn(steps, 3, 5)
        more = [torch.tensor([steps, 1, steps // 2]), torch.rand(steps, 3) < 0.2] if given != "padded" else []
        compiled = torch.compile(model, fullgraph=True, backend=counting, dynamic=False)
        expected = run_with_gradients(model, model, x, *more)
        for a, b in zip(run_with_gradients(compiled, model, x, *more), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert len(counting.graphs) == 2  # forward and backward
        if compiled_missing() is None:
            names = [name.removesuffix(".default").rpartition(".")[2] for name in counting.operators()]
            assert sorted(names) == ["rnn_backward"] * 2 + ["rnn_train"] * 2
            sizes.append(counting.sizes())
    assert sizes[1:] == sizes[:1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", LAYERS)
def test_dynamic_time_and_batch_do_not_recompile(layers):
    model = Sequences(*LAYERS[layers])
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    compilations = []
    for steps, batch in ((7, 3), (9, 4), (40, 11)):
        x, lengths = torch.randn(steps, batch, 5), torch.randint(1, steps + 1, (batch,))
        expected = run_with_gradients(model, model, x, lengths)
        for a, b in zip(run_with_gradients(compiled, model, x, lengths), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0
    assert compilations[1:] == compilations[:1] * 2


@pytest.mark.filterwarnings("ignore")
def test_inductor_runs_recurrent_layers():
    model, x = Sequences(cx.LSTM, cx.GRU), torch.randn(6, 3, 5)
    lengths, reset = torch.tensor([6, 2, 0]), torch.rand(6, 3) < 0.3
    expected = run_with_gradients(model, model, x, lengths, reset)
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(run_with_gradients(compiled, model, x, lengths, reset), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", LAYERS)
def test_export_of_recurrent_layers(layers):
    """Dynamic in time and batch, with lengths; our operators stand in the program, which can be saved."""
    model = Sequences(*LAYERS[layers]).eval()
    steps, batch = torch.export.Dim("steps", min=2, max=4096), torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(
            model,
            (torch.randn(6, 3, 5), torch.tensor([6, 2, 3])),
            dynamic_shapes=({0: steps, 1: batch}, {0: batch}),
            strict=False,
        )
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        x, lengths = torch.randn(50, 7, 5), torch.randint(0, 51, (7,))
        expected = model(x, lengths)
        for loaded in (program, torch.export.load(file)):
            for a, b in zip(loaded.module()(x, lengths), expected, strict=True):
                torch.testing.assert_close(a, b)
    if compiled_missing() is None:
        assert sum("cnnrnn_ext.rnn" in str(node.target) for node in program.graph.nodes) == 2


def test_forward_mode_derivatives_run_on_the_reference():
    """The operators have no forward-mode rule: a tangent must not be dropped in silence."""
    x, w, tangent = torch.randn(2, 1, 6, 6), torch.randn(2, 1, 3, 3), torch.randn(2, 1, 6, 6)

    def function(t):
        return cx.functional.conv_pool2d(t, w)

    with cx.trace() as log:
        result = torch.func.jvp(function, (x,), (tangent,))[1]
    assert [c.backend for c in log] == ["reference"]
    assert compiled_missing() or "forward-mode" in log[0].reason
    step = 1e-3 * tangent
    expected = (function(x + step) - function(x - step)) / 2e-3
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-2)


def test_vmap():
    x, w = torch.randn(3, 2, 1, 6, 6), torch.randn(2, 1, 3, 3)
    result = torch.func.vmap(lambda t: cx.functional.conv_pool2d(t, w))(x)
    torch.testing.assert_close(result, cx.functional.conv_pool2d(x.flatten(0, 1), w).unflatten(0, (3, 2)))
