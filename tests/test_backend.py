"""backend() and trace(): what they promise, and that a trace tells the truth."""

import threading

import pytest
import torch
from _oracle import compiled_missing, expected_kernel

import cnnrnn_ext as cx
from cnnrnn_ext import _library

OPERATORS = [schema.split("(")[0] for schema in _library.schemas()]


def calls():
    """One call of each public function that has kernels."""
    x, w = torch.randn(1, 1, 6, 6), torch.randn(2, 1, 3, 3)
    return {
        "conv_pool2d": lambda: cx.functional.conv_pool2d(x, w),
        "lstm": lambda: cx.LSTM(3, 4)(torch.randn(2, 1, 3)),
        "gru": lambda: cx.GRU(3, 4)(torch.randn(2, 1, 3)),
        "rnn": lambda: cx.RNN(3, 4)(torch.randn(2, 1, 3)),
        "lstm_cell": lambda: cx.LSTMCell(3, 4)(torch.randn(1, 3)),
        "gru_cell": lambda: cx.GRUCell(3, 4)(torch.randn(1, 3)),
        "rnn_cell": lambda: cx.RNNCell(3, 4)(torch.randn(1, 3)),
    }


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_means_a_kernel_of_the_library(compiled, name):
    """A trace says "compiled" for this operator: so the dispatcher must hold a CPU kernel of its own,
    not the plain PyTorch that is registered for devices without one."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cnnrnn_ext::{name}", "CPU")


def test_compiled_runs_no_torch_operator(compiled):
    """While an inference call runs, torch's dispatcher sees our operator and no convolution or product."""
    for name, call in calls().items():
        with torch.profiler.profile() as profile, cx.backend("compiled"), torch.no_grad():
            call()
        events = {event.key for event in profile.key_averages()}
        assert f"cnnrnn_ext::{_library.COVERAGE[name][0]}" in events
        heavy = ("conv2d", "addmm", "linear", "::mm", "max_pool", "sigmoid", "::lstm_cell_out")
        assert not [e for e in events if e.startswith("aten::") and any(h in e for h in heavy)]


def test_reference_runs_no_operator_of_ours():
    for call in calls().values():
        with torch.profiler.profile() as profile, cx.backend("reference"):
            call()
        assert not [e.key for e in profile.key_averages() if e.key.startswith("cnnrnn_ext::")]


@pytest.mark.parametrize("name", _library.COVERAGE)
@pytest.mark.parametrize("mode", ["auto", "compiled"])
def test_trace_of_a_compiled_call(compiled, mode, name):
    with cx.backend(mode), cx.trace() as log:
        calls()[name]()
    (call,) = log
    assert (call.op, call.backend, call.kernel, call.reason) == (name, "compiled", expected_kernel(), None)


@pytest.mark.pure
@pytest.mark.parametrize("name", _library.COVERAGE)
def test_trace_of_a_reference_call(name):
    with cx.backend("reference"), cx.trace() as log:
        calls()[name]()
    (call,) = log
    assert (call.op, call.backend, call.kernel) == (name, "reference", None)
    assert call.reason


UNCOVERED = {
    "pool": lambda: cx.functional.conv_pool2d(torch.randn(1, 2, 6, 6), torch.randn(2, 2, 3, 3), pool="avg"),
    "depthwise": lambda: cx.ConvPool2d(2, 2, 3, groups=2, activation="tanh")(torch.randn(1, 2, 6, 6)),
    "return_indices": lambda: cx.ConvPool2d(1, 2, 3, activation="tanh", return_indices=True)(
        torch.randn(1, 1, 6, 6)
    ),
    "proj_size": lambda: cx.LSTM(3, 4, proj_size=2)(torch.randn(2, 1, 3)),
    "zoneout": lambda: cx.GRU(3, 4, zoneout=0.1)(torch.randn(2, 1, 3)),
    "recurrent_dropout": lambda: cx.RNN(3, 4, recurrent_dropout=0.1)(torch.randn(2, 1, 3)),
    "layer_norm": lambda: cx.LSTM(3, 4, layer_norm=True)(torch.randn(2, 1, 3)),
    "float16": lambda: cx.ConvPool2d(1, 2, 3, dtype=torch.float16)(torch.randn(1, 1, 6, 6).half()),
    "meta": lambda: cx.LSTMCell(3, 4, device="meta")(torch.empty(1, 3, device="meta")),
}


@pytest.mark.parametrize("word", UNCOVERED)
def test_compiled_raises_instead_of_falling_back(compiled, word):
    """And the message, as the trace's reason in "auto", says what is not covered."""
    with cx.backend("compiled"), pytest.raises(RuntimeError, match=word):
        UNCOVERED[word]()
    with cx.trace() as log:
        UNCOVERED[word]()
    (call,) = log
    assert call.backend == "reference"
    assert call.kernel is None
    assert word in call.reason


@pytest.mark.pure
def test_compiled_raises_without_kernels():
    if compiled_missing() is None:
        pytest.skip("this install has compiled kernels")
    for call in calls().values():
        with cx.backend("compiled"), pytest.raises(RuntimeError, match=r'backend\("compiled"\)'):
            call()
        with cx.trace() as log:
            call()
        assert [c.backend for c in log] == ["reference"]
        assert log[0].reason == compiled_missing()


@pytest.mark.pure
def test_modes_nest_and_end():
    x, w = torch.randn(1, 1, 6, 6), torch.randn(2, 1, 3, 3)
    with cx.trace() as log:
        with cx.backend("reference"):
            cx.functional.conv_pool2d(x, w)
            with cx.backend("auto"):
                cx.functional.conv_pool2d(x, w)
            cx.functional.conv_pool2d(x, w)
        with pytest.raises(ZeroDivisionError), cx.backend("reference"):
            raise ZeroDivisionError
        cx.functional.conv_pool2d(x, w)
    usual = "reference" if compiled_missing() else "compiled"
    assert [c.backend for c in log] == ["reference", usual, "reference", usual]


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode"), cx.backend("fast"):
        pass


def test_mode_belongs_to_its_thread():
    seen = []

    def other():
        with cx.trace() as log:
            calls()["lstm_cell"]()
        seen.extend(log)

    with cx.backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert [c.backend for c in seen] == ["reference" if compiled_missing() else "compiled"]


def test_traces_nest():
    with cx.trace() as outer:
        calls()["lstm"]()
        with cx.trace() as inner:
            calls()["lstm_cell"]()
        calls()["conv_pool2d"]()
    calls()["lstm"]()
    assert [c.op for c in inner] == ["lstm_cell"]
    assert [c.op for c in outer] == ["lstm", "lstm_cell", "conv_pool2d"]


def test_each_layer_is_recorded():
    with cx.trace() as log:
        cx.LSTM(3, 4, num_layers=2)(torch.randn(2, 1, 3))
        cx.models.CNNRNN({"a": 2}, 1, (10, 10), (2, 3), 4)(torch.randn(1, 2, 1, 10, 10))
    assert {c.op for c in log} == {"conv_pool2d", "lstm"}
    assert [c.op for c in log].count("conv_pool2d") == 2
