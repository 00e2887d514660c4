"""functional.lstm against torch.nn.LSTM: outputs, states and every gradient, over torch's arguments."""

import functools
import itertools

import pytest
import torch
from _oracle import compare, lstm_names, lstm_tensors, our_lstm, outputs_and_gradients, running_on, stock_lstm

import cnnrnn_ext as cx

OPS = ["lstm"]


def both(**options):
    """(ours, stock) as functions of tensors by name."""
    ours = dict(options)
    if "bias" in ours:
        ours["bias"] = bool(ours["bias"])
    return functools.partial(our_lstm, _options=ours), functools.partial(stock_lstm, _options=options)


def tensors_for(t, n, i, h, dtype=torch.float32, **options):
    shape = {k: options[k] for k in ("num_layers", "bidirectional", "bias", "proj_size") if k in options}
    tensors = lstm_tensors(t, n, i, h, dtype=dtype, **shape)
    if options.get("batch_first"):
        tensors["input"] = tensors["input"].transpose(0, 1).contiguous()
    return tensors


# name: (t, n, i, h), options
CONFIGS = {
    "small": ((5, 3, 7, 6), {}),
    "one step": ((1, 3, 7, 6), {}),
    "one row": ((9, 1, 7, 6), {}),
    "one unit": ((4, 3, 5, 1), {}),
    "one feature": ((6, 2, 1, 8), {}),
    "odd": ((7, 5, 13, 19), {}),
    "vector width": ((4, 8, 16, 16), {}),
    "vector width + 1": ((4, 9, 17, 17), {}),
    "vector width - 1": ((4, 7, 15, 15), {}),
    "wide batch": ((3, 33, 9, 10), {}),
    "hidden 65": ((6, 4, 20, 65), {}),
    "long": ((70, 2, 4, 5), {}),
    "no bias": ((5, 3, 7, 6), {"bias": False}),
    "batch first": ((5, 3, 7, 6), {"batch_first": True}),
    "bidirectional": ((5, 3, 7, 6), {"bidirectional": True}),
    "bidirectional, one step": ((1, 2, 3, 4), {"bidirectional": True}),
    "two layers": ((5, 3, 7, 6), {"num_layers": 2}),
    "three layers, everything": (
        (6, 3, 5, 7),
        {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False},
    ),
}


@pytest.mark.isa
@pytest.mark.pure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_against_torch(mode, name, dtype):
    shape, options = CONFIGS[name]
    compare(*both(**options), tensors_for(*shape, dtype=dtype, **options), mode, OPS)


@pytest.mark.isa
def test_real_size(compiled):
    """The seed's network: 16 steps of 32 rows, 1600 features, 128 units."""
    compare(*both(), tensors_for(16, 32, 1600, 128), compiled, OPS)


@pytest.mark.isa
def test_real_size_bidirectional(compiled):
    compare(*both(bidirectional=True), tensors_for(20, 8, 64, 128, bidirectional=True), compiled, OPS)


@pytest.mark.isa
def test_saturated_gates(mode):
    """Pre-activations of ±100 and of ±1e32: the gates saturate, and nothing overflows.

    Gradients are differences of nearly equal numbers here, so they are held to a tolerance.
    """
    tensors = tensors_for(5, 4, 7, 9)
    ours, stock = both()
    for factor in (200, 1e30):
        tensors["weight_ih_l0"] *= factor
        compare(ours, stock, tensors, mode, OPS, wanted=[])
        _, expected, grads = outputs_and_gradients(stock, tensors)
        with running_on(mode, *OPS):
            _, gradients, _ = outputs_and_gradients(ours, tensors, grads)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.isa
def test_small_preactivations(mode):
    """Gates near their midpoint, where a coarse tanh or sigmoid loses all its digits."""
    tensors = tensors_for(5, 4, 7, 9)
    tensors = {k: v * 1e-4 for k, v in tensors.items()}
    compare(*both(), tensors, mode, OPS)


# ---- gradients asked for, and not ----

NAMES = ("input", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
SUBSETS = [
    *((name,) for name in NAMES),
    *(tuple(n for n in NAMES if n != name) for name in NAMES),
    ("h_0", "c_0"),
    ("input", "h_0", "c_0"),
    NAMES[3:],
]


@pytest.mark.parametrize(
    "wanted", SUBSETS, ids=lambda s: "+".join(s) if len(s) < 4 else f"{len(s)} of 7: {s[0]}.."
)
def test_any_subset_of_gradients(mode, wanted):
    compare(*both(), tensors_for(4, 3, 5, 6), mode, OPS, wanted=list(wanted))


def test_reverse_direction_only(mode):
    wanted = ["weight_ih_l0_reverse", "bias_hh_l0_reverse"]
    compare(*both(bidirectional=True), tensors_for(4, 3, 5, 6, bidirectional=True), mode, OPS, wanted=wanted)


@pytest.mark.parametrize(
    "used",
    [u for u in itertools.product((True, False), repeat=3) if any(u)],
    ids=lambda u: "".join(map(str, map(int, u))),
)
def test_any_subset_of_outputs_in_the_loss(mode, used):
    """output, h_n and c_n enter the loss in every combination."""
    tensors = tensors_for(4, 3, 5, 6, bidirectional=True)
    shapes = (4, 3, 12), (2, 3, 6), (2, 3, 6)
    grads = [torch.randn(s) if u else None for s, u in zip(shapes, used, strict=True)]
    compare(*both(bidirectional=True), tensors, mode, OPS, grad_outputs=grads)


def test_inference_equals_training_bitwise(compiled):
    tensors = tensors_for(6, 3, 7, 9)
    ours, _ = both()
    with running_on(compiled, *OPS):
        inference = ours(**tensors)
        tensors["weight_hh_l0"].requires_grad_()
        training = ours(**tensors)
    assert training[0].requires_grad
    for a, b in zip(inference, training, strict=True):
        assert torch.equal(a, b.detach())


# ---- layouts and edges ----


def test_strided_operands(mode):
    """Non-contiguous input, states and weights, forward and backward."""
    tensors = tensors_for(4, 3, 6, 5)
    views = dict(tensors)
    views["input"] = torch.stack((tensors["input"],) * 2, -1)[..., 1]
    views["h_0"] = tensors["h_0"].transpose(1, 2).contiguous().transpose(1, 2)
    views["c_0"] = torch.cat((tensors["c_0"],) * 2, 1)[:, 3:]
    for name in NAMES[3:5]:
        views[name] = tensors[name].t().contiguous().t()
    views["bias_ih_l0"] = torch.stack((tensors["bias_ih_l0"],) * 2, 1)[:, 0]
    assert not any(views[n].is_contiguous() for n in ("input", "h_0", "weight_ih_l0", "bias_ih_l0"))
    compare(*both(), views, mode, OPS)


def test_expanded_operands(mode):
    """Stride 0: one state for the whole batch, and the expanded gradient of sum()."""
    tensors = tensors_for(4, 3, 6, 5)
    grads = []
    for function in both():
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        operands = {**leaves, "h_0": leaves["h_0"][:, :1].expand(-1, 3, -1)}
        with cx.backend(mode):
            output, _, c_n = function(**operands)
            (output.sum() + c_n.sum()).backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.pure
@pytest.mark.parametrize("bidirectional", [False, True])
def test_zero_size_batch(mode, bidirectional):
    """No rows: empty outputs, and weight gradients of zero. torch.nn.LSTM computes the same."""
    tensors = tensors_for(4, 0, 6, 5, bidirectional=bidirectional)
    compare(*both(bidirectional=bidirectional), tensors, mode, OPS)


@pytest.mark.pure
@pytest.mark.parametrize("bidirectional", [False, True])
def test_length_zero(mode, bidirectional):
    """No steps: the states pass through, with their gradients. torch.nn.LSTM itself refuses this."""
    tensors = tensors_for(0, 3, 6, 5, bidirectional=bidirectional)
    d = 2 if bidirectional else 1
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    with running_on(mode, *OPS):
        output, h_n, c_n = both(bidirectional=bidirectional)[0](**leaves)
        grad_h, grad_c = torch.randn_like(h_n), torch.randn_like(c_n)
        torch.autograd.backward((h_n, c_n), (grad_h, grad_c))
    assert list(output.shape) == [0, 3, d * 5]
    assert torch.equal(h_n, leaves["h_0"])
    assert torch.equal(c_n, leaves["c_0"])
    assert torch.equal(leaves["h_0"].grad, grad_h)
    assert torch.equal(leaves["c_0"].grad, grad_c)
    for name in lstm_names(bidirectional=bidirectional):
        grad = leaves[name].grad  # None where the reference never reads the parameter
        assert grad is None or (grad.shape == leaves[name].shape and not grad.any())


def test_nan_stays_in_its_row(mode):
    tensors = tensors_for(5, 3, 6, 5)
    tensors["input"][2, 1, 3] = float("nan")
    ours, stock = both()
    with running_on(mode, *OPS):
        results = ours(**tensors)
    for a, b in zip(results, stock(**tensors), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a, b, equal_nan=True)
    assert results[0][2:, 1].isnan().all()
    assert not results[0][:, 0].isnan().any()


# ---- what has no kernel composes, visibly ----


@pytest.mark.parametrize(
    "options",
    [{"proj_size": 3}, {"proj_size": 3, "bidirectional": True, "num_layers": 2}],
    ids=["proj_size", "proj_size, everything"],
)
def test_projection_runs_on_the_reference(options):
    tensors = tensors_for(5, 3, 7, 6, **options)
    ours, stock = both(**options)
    with cx.trace() as log:
        ours(**tensors)
    assert {(c.op, c.backend) for c in log} == {("lstm", "reference")}
    assert all(c.reason for c in log)
    compare(ours, stock, tensors, "reference", OPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    tensors = {k: v.to(dtype) for k, v in tensors_for(6, 4, 7, 9).items()}
    compare(*both(), tensors, "reference", OPS)
