"""The raw operators, and modules, under autocast."""

import contextlib

import pytest
import torch
from _operator_cases import operators, sample_arguments
from _oracle import CELLS, as_states, cell_class, compiled_missing, nonlinearity, sequence_class

import cnnrnn_ext as cx


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_raw_operators_stay_in_float32_under_autocast(dtype):
    for name, case, arguments in sample_arguments(False):
        if case == "float64":
            continue
        expected = getattr(operators, name)(*arguments)
        with torch.autocast("cpu", dtype):
            result = getattr(operators, name)(*arguments)
        result, expected = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
        for a, b in zip(result, expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, b)


def first(result):
    return result[0] if isinstance(result, tuple) else result


@contextlib.contextmanager
def as_autocast_runs_everywhere():
    """torch's own modules under autocast without oneDNN, whose LSTM refuses bfloat16 on older processors."""
    with torch.backends.mkldnn.flags(enabled=False), torch.autocast("cpu", torch.bfloat16):
        yield


def autocast_twins():
    """(cell or None, ours, stock, input) with the same parameters."""
    pairs = [(None, cx.ConvPool2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))]
    for cell in CELLS:
        for make, shape in ((sequence_class, (4, 3, 5)), (cell_class, (3, 5))):
            ours, stock = (make(package, cell)(5, 6, **nonlinearity(cell)) for package in (cx, torch.nn))
            pairs.append((cell, ours, stock, torch.randn(shape)))
    for _, ours, stock, _ in pairs:
        stock.load_state_dict(ours.state_dict())
    return pairs


def check_autocast(ours, y, expected):
    """Values and dtype; an LSTM is bfloat16 as oneDNN's."""
    if isinstance(ours, cx.LSTM):
        expected = expected.bfloat16()
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.03)


def test_modules_under_autocast():
    """As torch.nn under CPU autocast: layers and convolutions in bfloat16, but states that mix with their old
    value in torch's dtype, gradients in float32. Recurrent kernels take bfloat16 by way of float32; a
    convolution runs on the reference, and the trace says so."""
    for cell, module, twin, x in autocast_twins():
        with torch.autocast("cpu", torch.bfloat16), cx.trace() as log:
            y = first(module(x))
        with as_autocast_runs_everywhere():
            expected = first(twin(x))
        if cell is None:
            expected = torch.nn.functional.max_pool2d(expected.relu(), 2)
        compiled = cell is not None and not compiled_missing()
        assert [c.backend for c in log] == ["compiled" if compiled else "reference"]
        assert compiled or compiled_missing() or "bfloat16" in log[0].reason
        check_autocast(module, y, expected)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
        assert next(module.parameters()).grad.any()


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16, torch.float64, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes_under_autocast(mode, dtype, state):
    """Inputs and states of any dtype with float32 parameters, as they meet between modules."""
    for cell, module, twin, x in autocast_twins():
        hx = None
        if cell is not None and state is not None:
            shape = (1, 3, 6) if x.dim() == 3 else (3, 6)
            hx = as_states(cell, torch.randn(shape, dtype=state), torch.randn(shape, dtype=state))
        if cell is None:
            if mode == "compiled":
                continue
            frames = x[0].to(dtype)
            with cx.backend(mode), torch.autocast("cpu", torch.bfloat16):
                y = module(frames[None])
            with as_autocast_runs_everywhere():
                expected = torch.nn.functional.max_pool2d(twin(frames[None]).relu(), 2)
            check_autocast(module, y, expected)
            continue
        with as_autocast_runs_everywhere():
            try:
                expected = first(twin(x.to(dtype), hx))
            except RuntimeError:  # torch refuses a state of that dtype
                expected = None
        with cx.backend(mode), torch.autocast("cpu", torch.bfloat16):
            if expected is None:
                with pytest.raises(RuntimeError):
                    module(x.to(dtype), hx)
                continue
            check_autocast(module, first(module(x.to(dtype), hx)), expected)
