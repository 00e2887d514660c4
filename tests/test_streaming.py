"""The short way of a stream's step: when it is taken, that it changes no bit, what it says of bad input."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import cnnrnn_ext as cx
from cnnrnn_ext.modules import _streaming

I, H = 7, 6  # noqa: E741
CELLS = {"lstm_cell": cx.LSTMCell, "gru_cell": cx.GRUCell, "rnn_cell": cx.RNNCell}
SEQUENCES = {"lstm": cx.LSTM, "gru": cx.GRU, "rnn": cx.RNN}
KINDS = CELLS | SEQUENCES
OPERATORS = ("rnn", "rnn_layer", "rnn_narrow", "rnn_cell", "rnn_cell_narrow")


@pytest.fixture
def taken(compiled, monkeypatch):
    """The operators that the short way called, in order."""
    calls = []
    for name in OPERATORS:
        operator = getattr(_streaming, name)

        def counted(*args, _operator=operator, _name=name):
            result = _operator(*args)
            calls.append(_name)
            return result

        monkeypatch.setattr(_streaming, name, counted)
    return calls


def make(kind, **options):
    return KINDS[kind](I, H, **options)


def operands(kind, batch=1, steps=1, rows=1, dtype=None):
    """(input, hx)"""
    x = torch.randn(*((batch,) if kind in CELLS else (steps, batch)), I, dtype=dtype)
    shape = (batch, H) if kind in CELLS else (rows, batch, H)
    h, c = torch.randn(2, *shape, dtype=dtype).unbind()
    return x, (h, c) if "lstm" in kind else h


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def equal(a, b):
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in pairs)
    return all(torch.equal(x, y) for x, y in pairs)


def long_way(module, *args):
    with cx.trace():
        return module(*args)


# ---- taken, with the same bits ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_taken_and_equal(taken, kind, bias, batch, dtype):
    module = make(kind, bias=bias, dtype=dtype)
    x, hx = operands(kind, batch, dtype=dtype)
    with torch.no_grad():
        for args in ((x, hx), (x,), (x, None)):
            taken.clear()
            y = module(*args)
            assert taken == ["rnn_cell" if kind in CELLS else "rnn_layer"]
            assert equal(y, long_way(module, *args))
            assert len(taken) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bidirectional": True},
        {"num_layers": 3},
        {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
        {"num_layers": 2, "dropout": 0.5, "training": False},
        {"recurrent_dropout": 0.5, "training": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_layers_directions_and_layouts(taken, kind, sizes, options):
    options = dict(options)
    training = options.pop("training", True)
    module = make(kind, **options).train(training)
    first, second = sizes
    batch, steps = (first, second) if module.batch_first else (second, first)
    _, hx = operands(kind, batch, rows=module.num_layers * (1 + module.bidirectional))
    x = torch.randn(first, second, I)
    with torch.inference_mode():
        for args in ((x, hx), (x,)):
            taken.clear()
            y = module(*args)
            assert taken == ["rnn" if module.bidirectional else "rnn_layer"] * module.num_layers
            assert equal(y, long_way(module, *args))
            assert y[0].shape[:2] == (first, second)
    assert steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_weights(taken, kind, options, dtype):
    options = {} if kind in CELLS else options
    module = make(kind, weight_dtype=dtype, **options)
    rows = 4 if options else 1
    args = operands(kind, 2, rows=rows)
    with torch.no_grad():
        y = module(*args)
        assert taken == ["rnn_cell_narrow" if kind in CELLS else "rnn_narrow"] * (2 if options else 1)
        assert equal(y, long_way(module, *args))
        for p in module.parameters():
            p.mul_(-1)
        z = module(*args)
        assert not equal(y, z)
        assert equal(z, long_way(module, *args))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_with_gradients_enabled(taken, kind):
    module = make(kind).requires_grad_(False)
    module(*operands(kind))
    assert taken


def test_strides_of_every_kind(taken):
    cell = make("lstm_cell")
    x, (h, c) = operands("lstm_cell", 8)
    with torch.no_grad():
        expected = cell(x[::2], (h[::2], c[::2]))
        assert equal(
            cell(x[::2].t().contiguous().t(), (h[::2].clone(), c[::2].t().contiguous().t())), expected
        )
    assert len(taken) == 2


def test_elman_cell_reads_its_nonlinearity_at_the_call(taken):
    cell, (x, h) = make("rnn_cell"), operands("rnn_cell")
    with torch.no_grad():
        cell(x, h)
        cell.nonlinearity = "relu"
        y = cell(x, h)
        assert equal(y, long_way(cell, x, h))
        assert len(taken) == 2
        assert y.min() == 0
        cell.nonlinearity = "sine"
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sine"):
            cell(x, h)


def test_attributes_changed_after_a_call(taken):
    """What the module prepared at its first call follows."""
    module = make("gru", num_layers=2, dropout=0.0).train()
    x, _ = operands("gru", 3, 3)
    with torch.no_grad():
        first = module(x)
        module.batch_first = True
        assert equal(module(x), long_way(module, x))
        assert not equal(module(x), first)
        module.batch_first = False
        taken.clear()
        module.dropout = 0.5
        assert not equal(module(x), module(x))
        module.zoneout, module.dropout = 0.9, 0.0
        assert not equal(module.eval()(x), first)
        assert not taken
        module.zoneout = 0.0
        assert equal(module(x), first)
        assert taken
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            taken.clear()
            assert equal(other(x), first)
            assert taken


# ---- not taken ----


class Tagged(torch.Tensor):
    pass


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def weight_name(module):
    return "weight_hh" if hasattr(module, "weight_hh") else "weight_hh_l0"


def under(context):
    def run(module, x, hx):
        with context():
            return module(x, hx)

    return run


def map_states(function, hx):
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def with_parametrization(module, x, hx):
    parametrize.register_parametrization(module, weight_name(module), Doubled())
    return module(x, hx)


def with_pruning(module, x, hx):
    prune.random_unstructured(module, weight_name(module), 0.5)
    return module(x, hx)


def with_weight_norm(module, x, hx):
    parametrizations.weight_norm(module, weight_name(module))
    return module(x, hx)


def with_vmap(module, x, hx):
    return torch.func.vmap(lambda a: module(a, hx))(x[None])


def with_jvp(module, x, hx):
    return torch.func.jvp(lambda a: module(a, hx), (x,), (x,))[0]


def with_half(module, x, hx):
    return copy.deepcopy(module).bfloat16()(x.bfloat16(), map_states(torch.Tensor.bfloat16, hx))


def with_gradients(module, x, hx):
    with torch.enable_grad():
        return module(x, hx)


def with_gradient_of_state(module, x, hx):
    with torch.enable_grad():
        module.requires_grad_(False)
        return module(x, map_states(lambda s: s.clone().requires_grad_(), hx))


NOT_TAKEN = {
    "gradients": with_gradients,
    "gradient of a state": with_gradient_of_state,
    "reference": under(lambda: cx.backend("reference")),
    "compiled": under(lambda: cx.backend("compiled")),
    "trace": under(cx.trace),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "parametrization": with_parametrization,
    "pruning": with_pruning,
    "weight norm": with_weight_norm,
    "input subclass": lambda module, x, hx: module(x.as_subclass(Tagged), hx),
    "state subclass": lambda module, x, hx: module(x, map_states(lambda s: s.as_subclass(Tagged), hx)),
    "vmap": with_vmap,
    "jvp": with_jvp,
    "half": with_half,
    "unbatched": lambda module, x, hx: module(x.squeeze(-2), map_states(lambda s: s.squeeze(-2), hx)),
}


@pytest.mark.parametrize("how", NOT_TAKEN)
@pytest.mark.parametrize("kind", KINDS)
def test_not_taken(taken, kind, how):
    module, (x, hx) = make(kind), operands(kind)
    with torch.no_grad():
        expected = module(x, hx)
        assert len(taken) == 1
        y = NOT_TAKEN[how](module, x, hx)
        assert len(taken) == 1
    assert all(t.isfinite().all() for t in tensors(y))
    if how in ("gradients", "gradient of a state"):
        assert tensors(y)[0].requires_grad
    if how in ("gradients", "compiled", "trace", "input subclass", "state subclass"):
        assert equal(map_states(torch.Tensor.detach, tuple(tensors(y))), tuple(tensors(expected)))
    if how in ("parametrization", "pruning"):
        assert not equal(y, expected)
    if how == "input subclass":
        assert isinstance(tensors(y)[0], Tagged)


@pytest.mark.parametrize("word", ["lengths", "reset", "return_all"])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_keywords_are_not_dropped(taken, kind, word):
    module, (x, hx) = make(kind), operands(kind, 2, 3)
    value = {
        "lengths": torch.tensor([1, 3]),
        "reset": torch.ones(3, 2, dtype=torch.bool),
        "return_all": True,
    }[word]
    with torch.no_grad():
        y = module(x, hx, **{word: value})
        assert not taken
        plain = module(x, hx)
    assert len(y) == 3 if word == "return_all" else not equal(y, plain)


@pytest.mark.parametrize(
    "options", [{"proj_size": 3}, {"layer_norm": True}, {"zoneout": 0.1}, {"zoneout": (0.0, 0.1)}], ids=str
)
def test_modules_without_a_short_way(taken, options):
    with torch.no_grad():
        make("lstm", **options).eval()(operands("lstm")[0])
    assert not taken


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_the_call(taken, kind):
    module, (x, hx) = make(kind), operands(kind)
    seen = []
    module.register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
    module.register_forward_hook(lambda m, args, result: seen.append(args[0]))
    with torch.no_grad():
        y = module(x, hx)
    assert torch.equal(seen[0], 2 * x)
    with torch.no_grad():
        assert equal(y, module.forward(2 * x, hx))


def test_a_trace_on_another_thread_ends_for_all(taken):
    """While one thread traces, the others take the long way, and the short one again behind it."""
    cell, args = make("lstm_cell"), operands("lstm_cell")
    inside, done = threading.Event(), threading.Event()

    def other():
        with cx.trace(), cx.backend("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with torch.no_grad():
        thread.start()
        inside.wait(10)
        during = cell(*args)
        assert not taken
        done.set()
        thread.join()
        assert equal(cell(*args), during)
    assert len(taken) == 1


# ---- bad input: as the long way tells it ----


BAD = {
    "input width": lambda x, hx: (torch.randn(*x.shape[:-1], I + 1), hx),
    "input rank": lambda x, hx: (torch.randn(1, 1, 1, 1, I), hx),
    "input dtype": lambda x, hx: (x.double(), hx),
    "state width": lambda x, hx: (x, map_states(lambda s: torch.randn(*s.shape[:-1], H + 1), hx)),
    "state batch": lambda x, hx: (x, map_states(lambda s: torch.cat((s, s), -2), hx)),
    "state rank": lambda x, hx: (x, map_states(lambda s: s[None, None], hx)),
    "state dtype": lambda x, hx: (x, map_states(torch.Tensor.double, hx)),
    "state layers": lambda x, hx: (x, map_states(lambda s: torch.cat((s, s), 0), hx)),
    "state device": lambda x, hx: (x, map_states(lambda s: s.to("meta"), hx)),
    "state kind": lambda x, hx: (x, 3 if isinstance(hx, torch.Tensor) else (3, 4)),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_told_as_on_the_long_way(taken, kind, layers, what):
    if layers == 2 and kind in CELLS:
        pytest.skip("cells have no layers")
    module = make(kind, **({} if kind in CELLS else {"num_layers": layers}))
    x, hx = BAD[what](*operands(kind, rows=layers))
    with torch.no_grad():
        with pytest.raises(Exception) as long:  # noqa: PT011 (whatever it is, both ways must raise it)
            long_way(module, x, hx)
        with pytest.raises(type(long.value)) as short:
            module(x, hx)
    assert str(short.value) == str(long.value)
    assert short.value.__context__ is None
    assert type(long.value) in (RuntimeError, ValueError, TypeError, AttributeError)
    assert not taken


@pytest.mark.parametrize("kind", KINDS)
def test_bad_weights_are_told_by_name(taken, kind):
    module, args = make(kind), operands(kind)
    name = weight_name(module)
    with torch.no_grad():
        getattr(module, name).data = torch.randn(2, 3)
        with pytest.raises(RuntimeError, match=r"weight|hx|h_0|h:"):
            module(*args)
    assert not taken


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_holds_the_operator(compiled, kind):
    torch.compiler.reset()
    module, args = make(kind), operands(kind)
    with torch.no_grad():
        y = torch.compile(module, fullgraph=True, backend="aot_eager")(*args)
        assert equal(y, module(*args))
