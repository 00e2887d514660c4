"""The modules' own __call__: whatever nn.Module's would do beside calling forward still happens."""

import copy

import pytest
import torch
from torch.nn.modules import module as torch_module

import cnnrnn_ext as cx

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:.*torch.jit.trace")

KINDS = {"LSTMCell": cx.LSTMCell, "GRUCell": cx.GRUCell, "LSTM": cx.LSTM, "GRU": cx.GRU}
CELLS = ("LSTMCell", "GRUCell")


@pytest.fixture(params=KINDS)
def module(request):
    return KINDS[request.param](4, 5)


def operands(module):
    shape = (3, 4) if type(module).__name__ in CELLS else (1, 3, 4)
    states = torch.randn(2, *shape[:-1], 5)
    return torch.randn(shape), tuple(states) if module._get_name().startswith("LSTM") else states[0]


def first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_of_one_module(module, grad):
    x, hx = operands(module)
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda m, *given: seen.append(given), with_kwargs=True),
        module.register_forward_hook(lambda m, args, result: seen.append("forward")),
        module.register_full_backward_pre_hook(lambda m, grads: seen.append("backward pre")),
        module.register_full_backward_hook(lambda m, inputs, outputs: seen.append("backward")),
    ]
    with torch.set_grad_enabled(grad):
        y = first(module(x, hx=hx))
        if grad:
            y.sum().backward()
    args, kwargs = seen.pop(0)
    assert args == (x,)
    assert list(kwargs) == ["hx"]
    assert seen == ["forward", "backward pre", "backward"][: 3 if grad else 1]
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(first(module(x, hx)), y)
    assert len(seen) == (3 if grad else 1)


GLOBAL = {
    "pre": torch_module.register_module_forward_pre_hook,
    "forward": torch_module.register_module_forward_hook,
    "backward pre": torch_module.register_module_full_backward_pre_hook,
    "backward": torch_module.register_module_full_backward_hook,
}


@pytest.mark.parametrize("which", GLOBAL)
def test_hooks_of_all_modules(module, which):
    seen = []
    handle = GLOBAL[which](lambda m, *rest: seen.append(m))
    try:
        first(module(*operands(module))).sum().backward()
    finally:
        handle.remove()
    assert seen == [module]


def test_a_forward_put_in_its_place(module):
    """As libraries that move weights about do."""
    x, hx = operands(module)
    with torch.no_grad():
        expected = first(module(x, hx))
        original = module.forward
        module.forward = lambda *args: original(2 * args[0], *args[1:])
        changed = first(module(x, hx))
        assert not torch.equal(changed, expected)
        assert torch.equal(changed, first(original(2 * x, hx)))


def test_a_subclass_with_its_own_forward(module):
    class Doubled(type(module)):
        def forward(self, input, hx=None):
            return super().forward(2 * input, hx)

    x, hx = operands(module)
    other = Doubled(4, 5)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(first(other(x, hx)), first(module(2 * x, hx)))


def test_a_module_compiled_in_place(module):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    torch.compiler.reset()
    x, hx = operands(module)
    with torch.no_grad():
        expected = first(module(x, hx))
        module.compile(backend=backend)
        assert torch.equal(first(module(x, hx)), expected)
    assert calls


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


def test_symbolic_tracing_sees_the_module(module):
    graph = LeafTracer().trace(torch.nn.Sequential(module))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0"]


def test_jit_tracing(module):
    x, hx = operands(module)
    with torch.no_grad():
        traced = torch.jit.trace(module, (x, hx), check_trace=False)
        assert torch.equal(first(traced(x, hx)), first(module(x, hx)))


def test_copied(module):
    x, hx = operands(module)
    with torch.no_grad():
        assert torch.equal(first(copy.deepcopy(module)(x, hx)), first(module(x, hx)))


def test_wrong_arguments(module):
    x, _ = operands(module)
    with pytest.raises(TypeError, match="missing"):
        module()
    with pytest.raises(TypeError, match="unexpected keyword"):
        module(x, other=1)
