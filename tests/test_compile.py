"""torch.compile without graph breaks, forward and backward, and torch.export."""

import pytest
import torch
from _oracle import compiled_missing
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
        (lambda: cx.LSTMCell(5, 6), (3, 5)),
        (lambda: cx.ConvPool2d(2, 3, 3, padding="same", pool_size=3, pool_stride=2), (2, 2, 9, 9)),
        (lambda: cx.ConvPool1d(2, 3, 3), (2, 2, 9)),
    ],
    ids=["lstm", "lstm proj", "cell", "conv2d", "conv1d"],
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
