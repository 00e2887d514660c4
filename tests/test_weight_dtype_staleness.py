"""The narrow copies of weight_dtype= never grow old, and start empty where a module is copied."""

import copy
import io

import pytest
import torch
from _narrow_cases import CELLS, DTYPES, KINDS, H, I, N, T, make, operands, tensors
from torch import nn
from torch.nn.utils import parametrizations


def edit_optimizer(module):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.3).step()


def edit_state_dict(module):
    module.load_state_dict({k: -2 * v for k, v in module.state_dict().items()})


def edit_assign(module):
    state = {k: nn.Parameter(-2 * v) for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def edit_data(module):
    for p in module.parameters():
        p.data = -2 * p.data


def edit_data_at_the_same_address(module):
    """New tensors in the memory that the old ones left, if they left it."""
    for p in module.parameters():
        address = p.data_ptr()
        shape, p.data = p.shape, torch.zeros(1)
        tried = [torch.randn(shape) for _ in range(50)]
        p.data = next((t for t in tried if t.data_ptr() == address), tried[0])


def edit_transposed(module):
    """The square weight_hh of an Elman network, transposed in place: same memory, same version."""
    for p in module.parameters():
        p.data = p.data.t()


def edit_parameter(module):
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(-2 * p.detach()))


def edit_through_data_and_refresh(module):
    for p in module.parameters():
        p.data.mul_(-2)
    module.refresh_weights()


def edit_dtype_and_back(module):
    module.bfloat16().float()


def edit_weight_norm(module):
    name = "weight_ih" if hasattr(module, "weight_ih") else "weight_ih_l0"
    parametrizations.weight_norm(module, name)
    with torch.no_grad():
        module.parametrizations[name].original0.mul_(3)


EDITS = [value for name, value in list(globals().items()) if name.startswith("edit_")]


@pytest.mark.pure
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_never_stale(kind, edit, dtype):
    square = edit is edit_transposed
    if square and kind not in ("rnn", "rnn_cell"):
        pytest.skip("no square weights")
    sizes = (H, H) if square else (I, H)
    module = KINDS[kind][0](*sizes, weight_dtype=dtype, bias=not square)
    x = torch.randn(N, sizes[0]) if kind in CELLS else torch.randn(T, N, sizes[0])
    with torch.no_grad():
        before = tensors(module(x))
    edit(module)
    fresh = KINDS[kind][0](*sizes, weight_dtype=dtype, bias=not square)
    names = [name for name, _ in fresh.named_parameters()]
    fresh.load_state_dict({name: getattr(module, name).detach() for name in names})
    with torch.no_grad():
        after, expected = tensors(module(x)), tensors(fresh(x))
    for a, b, old in zip(after, expected, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert not torch.equal(a, old)


def test_in_place_through_data_is_not_noticed():
    """As documented; and as torch's own version counter has it."""
    module, x = make("lstm_cell", torch.int8), operands("lstm_cell")
    with torch.no_grad():
        before = module(x)[0]
        module.weight_hh.data.mul_(3)
        module.weight_ih.data.mul_(3)
        assert torch.equal(module(x)[0], before)
        module.refresh_weights()
        assert not torch.equal(module(x)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_inference_mode(kind):
    """They count no versions, so nothing of them is kept."""
    with torch.inference_mode():
        module, x = make(kind, torch.int8), operands(kind)
        before = tensors(module(x))[0]
        for p in module.parameters():
            p.mul_(-2)
        assert not torch.equal(tensors(module(x))[0], before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_start_empty(kind, how):
    module, x = make(kind, torch.int8), operands(kind)
    with torch.no_grad():
        expected = tensors(module(x))
        if how == "deepcopy":
            other = copy.deepcopy(module)
        else:
            file = io.BytesIO()
            torch.save(module, file)
            narrow_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
            assert len(file.getvalue()) < narrow_bytes + 20_000
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert module._narrow._entry is not None
        assert other._narrow._entry is None
        assert other.weight_dtype == torch.int8
        for a, b in zip(tensors(other(x)), expected, strict=True):
            assert torch.equal(a, b)
        for p in other.parameters():
            p.zero_()
        assert not tensors(other(x))[0].any()
        for a, b in zip(tensors(module(x)), expected, strict=True):
            assert torch.equal(a, b)


def test_copies_are_made_once(monkeypatch):
    from cnnrnn_ext.functional import _narrow

    made = []
    narrowed = _narrow.narrowed
    monkeypatch.setattr(_narrow, "narrowed", lambda *args: made.append(1) or narrowed(*args))
    module, x = make("lstm", torch.int8, num_layers=2), operands("lstm")
    with torch.no_grad():
        for _ in range(3):
            module(x)
    module(x)
    with torch.inference_mode():
        module(x)
    assert len(made) == 4
