"""What the kernels make of the activations beside narrow weights: the rounding to int16, and what it leaves
alone.

``rnn_relu`` shows its pre-activation, where that is positive; with h of zeros it is one product.
"""

import pytest
import torch
from torch import nn

import cnnrnn_ext as cx

pytestmark = pytest.mark.usefixtures("compiled")


def product(x, weight, scale=None):
    """x [N, I] times weight [H, I], both signs of it, by the raw operator."""
    hidden = len(weight)
    state = torch.zeros(hidden, hidden, dtype=weight.dtype)
    scale_hh = None if scale is None else torch.ones(hidden)

    def relu(x):
        return torch.ops.cnnrnn_ext.rnn_cell_narrow(
            "rnn_relu", x, None, None, weight, state, scale, scale_hh, None, None
        )[0]

    return relu(x) - relu(-x)


def int8_of(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def expected(x, weight, scale):
    return x.double() @ (scale[:, None] * weight).double().t()


@pytest.mark.parametrize("depth", [256, 1024])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("rows", [1, 3])
def test_rounding_is_far_below_the_error_of_the_weights(kind, depth, rows):
    module = getattr(cx, kind)(depth, depth, weight_dtype=torch.int8)
    exact = getattr(nn, kind)(depth, depth).double()
    exact.load_state_dict(module.state_dict())
    narrowed = getattr(nn, kind)(depth, depth).double()
    from cnnrnn_ext.functional._narrow import narrowed as narrow
    from cnnrnn_ext.functional._narrow import widened

    state = {
        name: widened(*narrow(p, torch.int8), torch.float64) if name.startswith("weight") else p.double()
        for name, p in module.state_dict().items()
    }
    narrowed.load_state_dict(state)
    x = torch.randn(20, rows, depth)
    with torch.no_grad():
        ours, with_weights, truth = module(x)[0].double(), narrowed(x.double())[0], exact(x.double())[0]
    of_rounding, of_weights = (e.pow(2).mean().sqrt() for e in (ours - with_weights, with_weights - truth))
    assert 0 < of_rounding < 0.03 * of_weights


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 20])
@pytest.mark.parametrize("depth", [1, 5, 15, 16, 17, 31, 40, 100])
@pytest.mark.parametrize("hidden", [1, 7, 8, 19])
def test_whole_numbers_are_exact(rows, depth, hidden):
    """Activations whose largest is 32767 are not rounded, and every sum here fits a float32."""
    x = torch.randint(-300, 300, (rows, depth)).float()
    x[:, 0] = 32767
    weight = int8_of(hidden, depth) // 16
    y = product(x, weight, torch.ones(hidden))
    assert torch.equal(y, x @ weight.float().t())


@pytest.mark.parametrize("depth", [5, 16, 33, 100])
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_bfloat16_has_no_rounding(rows, depth):
    x, weight = torch.randn(rows, depth), torch.randn(13, depth).bfloat16()
    torch.testing.assert_close(
        product(x, weight).double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("level", [-128, 127])
@pytest.mark.parametrize("depth", [4080, 4096, 20_000])
def test_sums_do_not_overflow(depth, level):
    x, weight = torch.full((2, depth), 3.0), torch.full((9, depth), level, dtype=torch.int8)
    y = product(x, weight, torch.full((9,), 0.5))
    torch.testing.assert_close(y, torch.full((2, 9), 1.5 * level * depth), rtol=1e-6, atol=0)


def test_each_row_has_its_own_unit():
    """Rows of zeros, denormals, ordinary, large and huge values, beside each other in one tile and alone."""
    sizes = torch.tensor([0.0, 1e-42, 1e-35, 1e-29, 1.0, 1e20, 1e33])[:, None]
    x, weight, scale = torch.randn(7, 50) * sizes, int8_of(11, 50), torch.rand(11)
    y, wanted = product(x, weight, scale), expected(x, weight, scale)
    largest = (x.abs().amax(1, True) * 127 * scale).double()
    # Denormals have few bits of their own.
    assert ((y.double() - wanted).abs() <= 1e-3 * largest + 1e-43).all()
    for row in range(7):
        assert torch.equal(product(x[row : row + 1], weight, scale)[0], y[row])


@pytest.mark.parametrize("odd", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_rows_that_are_not_finite(rows, odd):
    """They alone; infinity as in float32, its sign and what meets a weight of 0 included."""
    x, weight = torch.randn(rows, 50), int8_of(11, 50)
    x[rows // 2, 20] = odd
    weight[3, 20] = 0
    y, wanted = product(x, weight, torch.ones(11)), x @ weight.float().t()
    finite = torch.arange(rows) != rows // 2
    torch.testing.assert_close(y[finite], wanted[finite], rtol=1e-3, atol=1e-1)
    shown = torch.relu(wanted) - torch.relu(-wanted)
    assert torch.equal(y[rows // 2].isnan(), shown[rows // 2].isnan())
    assert torch.equal(y[rows // 2].nan_to_num(7), shown[rows // 2].nan_to_num(7))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("depth", [3, 16, 19])
def test_weights_that_are_not_finite_stay_in_their_row(depth, value):
    """The rest of a row is read together with the beginning of the next."""
    x, weight = torch.rand(3, depth) + 1, torch.randn(9, depth).bfloat16()
    weight[4] = value
    y = product(x, weight)
    assert not y[:, 4].isfinite().any()
    assert torch.equal(y[:, 4].isnan(), torch.full((3,), value != value))
    others = [row for row in range(9) if row != 4]
    assert y[:, others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_rows_too_long_to_prepare(rows, dtype):
    depth = 70_001
    x = torch.randn(rows, depth)
    weight = int8_of(3, depth) if dtype == torch.int8 else torch.randn(3, depth).bfloat16()
    scale = torch.rand(3) / 100 if dtype == torch.int8 else None
    wanted = x.double() @ (weight.double() if scale is None else scale.double()[:, None] * weight).t()
    torch.testing.assert_close(product(x, weight, scale).double(), wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("steps", "batch"), [(1, 1), (16, 1), (17, 1), (40, 2), (9, 3), (5, 32), (3, 33), (1, 40)]
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_every_way_computes_the_same(kind, steps, batch, dtype):
    """Few rows, a projection ahead of the scan, widened weights: against the reference."""
    module = getattr(cx, kind)(37, 41, weight_dtype=dtype, bidirectional=True)
    x, h = torch.randn(steps, batch, 37), torch.randn(2, batch, 41)
    hx = (h, 2 * h) if kind == "LSTM" else h
    with torch.no_grad():
        ours = module(x, hx)
        with cx.backend("reference"):
            wanted = module(x, hx)
    tolerance = 2e-4 if dtype == torch.int8 else 2e-6
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_same_at_any_number_of_threads():
    module, x = cx.LSTM(300, 300, weight_dtype=torch.int8), torch.randn(20, 2, 300)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            results = [(torch.set_num_threads(n), module(x)[0])[1] for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
