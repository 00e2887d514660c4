"""recompute_gates: training that keeps h and c alone has the same gradients."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import cnnrnn_ext as cx

T, N, INPUT, H = 7, 5, 3, 6
KINDS = {"LSTM": cx.LSTM, "GRU": cx.GRU, "RNN": cx.RNN}
# Values that a unit keeps of a step, beside what follows from the gates: reserve of the kernels
STATES, GATES = {"LSTM": 2, "GRU": 1, "RNN": 1}, {"LSTM": 4, "GRU": 4, "RNN": 0}


def _gradients(module, *inputs, **options):
    """Results and gradients of everything, and the elements that autograd keeps beside inputs and weights."""
    module, kept = copy.deepcopy(module), {}
    given = {t.data_ptr() for t in (*module.parameters(), *(i for i in inputs if torch.is_tensor(i)))}

    def keep(tensor):
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cx.trace() as log:
        output, states = module(*inputs, **options)
    data = output if torch.is_tensor(output) else output.data
    states = states if isinstance(states, tuple) else (states,)
    leaves = [t for t in (*module.parameters(), *inputs) if torch.is_tensor(t) and t.requires_grad]
    grads = torch.autograd.grad(data.square().sum() + sum(s.sin().sum() for s in states), leaves)
    return [data, *states, *grads], sum(kept.values()), log[0].backend


def _rows(name):
    x = torch.randn(T, N, INPUT, requires_grad=True)
    if name == "lengths and resets":
        return (x,), {"lengths": torch.tensor([7, 0, 3, 6, 1]), "reset": torch.rand(T, N) < 0.3}
    if name == "packed":
        return (pack_sequence([torch.randn(t, INPUT) for t in (7, 6, 6, 2)]),), {}
    return (x,), {}


@pytest.mark.parametrize("rows", ["whole", "lengths and resets", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_same_gradients_of_less(mode, kind, bidirectional, rows):
    options = {"num_layers": 2, "bidirectional": bidirectional}
    module = KINDS[kind](INPUT, H, **options)
    again = KINDS[kind](INPUT, H, recompute_gates=True, **options)
    again.load_state_dict(module.state_dict())
    inputs, more = _rows(rows)
    with cx.backend(mode):
        want, kept, ran = _gradients(module, *inputs, **more)
        got, kept_again, ran_again = _gradients(again, *inputs, **more)
    assert ran == ran_again == mode
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
    if mode == "compiled" and rows == "whole":
        values = T * N * H * 2 * (1 + bidirectional)  # one value of each unit of both layers
        assert kept - kept_again == values * GATES[kind]
        assert kept_again >= values * STATES[kind]
    if mode == "reference":
        assert kept == kept_again


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16(compiled, kind):
    module = KINDS[kind](INPUT, H, dtype=torch.bfloat16)
    again = KINDS[kind](INPUT, H, recompute_gates=True, dtype=torch.bfloat16)
    again.load_state_dict(module.state_dict())
    x = torch.randn(T, N, INPUT, dtype=torch.bfloat16, requires_grad=True)
    want, got = _gradients(module, x)[0], _gradients(again, x)[0]
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(compiled, kind):
    module = KINDS[kind](INPUT, H, recompute_gates=True).double()
    x = torch.randn(3, 2, INPUT, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x)[0], (x,))
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_graph(compiled, fresh_graphs, kind):
    module = KINDS[kind](INPUT, H, recompute_gates=True)
    x = torch.randn(T, N, INPUT, requires_grad=True)
    want = torch.autograd.grad(module(x)[0].square().sum(), x)[0]
    graph = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(graph(x)[0].square().sum(), x)[0]
    torch.testing.assert_close(got, want)


def test_the_module_says_so():
    assert "recompute_gates=True" in repr(cx.LSTM(2, 3, recompute_gates=True))
    assert "recompute_gates" not in repr(cx.LSTM(2, 3))
