"""Training of cells in eager mode: when the short gradient is taken, and that it is the registered one."""

import contextlib
import gc

import pytest
import torch
from _oracle import CELLS, GATES, cell_class, nonlinearity
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import cnnrnn_ext as cx
from cnnrnn_ext._autograd_rnn import CellStep

operators = torch.ops.cnnrnn_ext


@pytest.fixture
def taken(compiled, monkeypatch):
    calls, backward = [], CellStep.backward
    forward = CellStep.forward

    def counted(ctx, cell, *tensors):
        calls.append(cell)
        return forward(ctx, cell, *tensors)

    monkeypatch.setattr(CellStep, "forward", staticmethod(counted))
    assert CellStep.backward is backward
    return calls


def operands(cell, n=3, i=4, h=5, dtype=torch.float64, bias=True, state=True):
    """x, h, c, weight_ih, weight_hh, bias_ih, bias_hh; all want a gradient."""
    rows = GATES[cell] * h

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    states = (random(n, h), random(n, h) if cell == "lstm" else None) if state else (None, None)
    biases = (random(rows), random(rows)) if bias else (None, None)
    return random(n, i), *states, random(rows, i), random(rows, h), *biases


def tensors(value):
    return [value] if isinstance(value, torch.Tensor) else [t for t in value if t is not None]


def call(cell, args):
    """As a list of states, through CellStep."""
    return tensors(CellStep.apply(cell, *args))


def registered(cell, args):
    return list(operators.rnn_cell_train(cell, *args)[: 2 if cell == "lstm" else 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 3, 40])
@pytest.mark.parametrize(("bias", "state"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_as_the_registered_gradient(compiled, cell, bias, state, n, dtype):
    args = operands(cell, n, dtype=dtype, bias=bias, state=state)
    leaves = tensors(args)
    ours, expected = call(cell, args), registered(cell, args)
    upstream = [torch.randn_like(y) for y in ours]
    for outputs in (slice(None), slice(0, 1), slice(-1, None)):
        a, b = (
            torch.autograd.grad(y[outputs], leaves, upstream[outputs], retain_graph=True)
            for y in (ours, expected)
        )
        assert all(map(torch.equal, a, b))
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("n", [1, 3])
def test_gradient_that_is_not_contiguous(compiled, cell, n):
    args = operands(cell, n, dtype=torch.float32)
    (expanded,) = (torch.ones(1, 1).expand(n, 5),)
    a, b = (torch.autograd.grad(f(cell, args)[0], tensors(args), expanded) for f in (call, registered))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(compiled, cell):
    args = operands(cell)
    inputs = tensors(args)

    def function(*inputs):
        rest = iter(inputs)
        return tuple(call(cell, [None if a is None else next(rest) for a in args]))

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", range(7))
def test_any_subset_of_gradients(compiled, frozen):
    args = operands("lstm", dtype=torch.float32)
    for wanted in ([frozen], [i for i in range(7) if i != frozen]):
        some = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(args)]
        results = []
        for function in (call, registered):
            sum(y.sum() for y in function("lstm", some)).backward()
            results.append([a.grad for a in some])
            for a in some:
                a.grad = None
        assert [g is not None for g in results[0]] == [i in wanted for i in range(7)]
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_modules_and_functions_take_it(taken, cell):
    module = cell_class(cx, cell)(4, 5, **nonlinearity(cell))
    x = torch.randn(3, 4)
    module(x)
    module(x[0])
    with cx.trace():
        module(x)
    assert len(taken) == 3
    with torch.no_grad():
        module(x)
    assert len(taken) == 3


class Onlooker(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Tagged(torch.nn.Parameter):
    pass


def with_subclass(module, x):
    module.weight_ih = Tagged(module.weight_ih.detach())
    return module(x)


def with_jvp(module, x):
    return torch.func.jvp(module, (x,), (x,))[0]


def with_dual(module, x):
    with forward_ad.dual_level():
        return module(forward_ad.make_dual(x, x))


def with_grad_transform(module, x):
    return torch.func.grad(lambda a: module(a)[0].sum())(x)


def with_graph(module, x):
    torch.compiler.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")(x)


def with_reference(module, x):
    with cx.backend("reference"):
        return module(x)


WAYS = (with_subclass, with_jvp, with_dual, with_grad_transform, with_graph, with_reference)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_not_taken(taken, way):
    module, x = cx.LSTMCell(4, 5), torch.randn(3, 4)
    result = tensors(way(module, x))
    assert not taken
    assert all(y.isfinite().all() for y in result)


def test_a_mode_sees_the_operators(taken):
    module, x = cx.LSTMCell(4, 5), torch.randn(3, 4)
    with Onlooker() as mode:
        module(x)[0].sum().backward()
    assert not taken
    assert {"cnnrnn_ext.rnn_cell_train.default", "cnnrnn_ext.rnn_cell_backward.default"} <= set(mode.seen)


def test_through_time_as_stock(taken):
    """Steps in a row, some outputs unused, a state that wants its gradient, gradients that add up."""
    ours, stock = cx.LSTMCell(4, 5), torch.nn.LSTMCell(4, 5)
    stock.load_state_dict(ours.state_dict())
    xs, start = torch.randn(6, 3, 4), torch.randn(2, 3, 5)
    results = []
    for module in (ours, stock):
        first = start.clone().requires_grad_()
        state, loss = tuple(first.unbind()), 0
        for t, x in enumerate(xs):
            state = module(x, state)
            if t % 2:
                loss = loss + state[0].square().mean()
        loss.backward()
        results.append([first.grad, *(p.grad for p in module.parameters())])
    assert len(taken) == 6
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_and_saved_tensor_hooks(taken):
    module, x = cx.GRUCell(4, 5), torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(module(x).sum(), x)[0]
    again = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.sum(), x)[0], expected)
    with torch.autograd.graph.save_on_cpu():
        assert torch.equal(torch.autograd.grad(module(x).sum(), x)[0], expected)
    assert len(taken) == 4


def test_a_weight_changed_before_the_backward_is_refused(taken):
    module, x = cx.GRUCell(4, 5), torch.randn(3, 4)
    y = module(x)
    with torch.no_grad():
        module.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bad_operands_are_told_as_without_gradients(taken):
    module = cx.LSTMCell(4, 5)
    for args in ((torch.randn(3, 5),), (torch.randn(3, 4), (torch.randn(2, 5), torch.randn(3, 5)))):
        messages = []
        for context in (torch.no_grad, contextlib.nullcontext):
            with context(), pytest.raises(RuntimeError) as error:
                module(*args)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("name", ["rnn_train", "rnn_cell_train", "rnn_cell", "conv_pool2d"])
def test_strings_do_not_leak(compiled, name):
    """A typed std::string argument loses a copy in torch's own headers; double goes the typed way."""
    if name == "conv_pool2d":
        config = ([1, 1], [0, 0], [1, 1], 1, "relu", "max", [1, 1], [1, 1], [0, 0], False)
        args = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1), None, *config
    else:
        w, h = torch.randn(4, 1).double(), torch.randn(1, 1).double()
        listed = name == "rnn_train"
        args = "lstm", h[None] if listed else h, None, None, *([[w]] * 2 if listed else [w] * 2)
        args = *args, *([[], [], None, None, None] if listed else [None, None])
    operator = getattr(operators, name)
    growth = []
    with torch.no_grad():
        for _ in range(4):  # the heap of a process that did much before may grow once or twice by itself
            gc.collect()
            before = resident()
            for _ in range(40_000):
                operator(*args)
            growth.append(resident() - before)
    assert min(growth) < 1 << 19  # a lost std::string is 32 bytes: 1.3 MB
