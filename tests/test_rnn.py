"""functional.lstm, gru and rnn against torch.nn: outputs, states, every gradient, over torch's arguments."""

import itertools

import pytest
import torch
from _oracle import (
    CELLS,
    FUNCTION,
    compare,
    module_rnn,
    our_rnn,
    outputs_and_gradients,
    rnn_names,
    rnn_tensors,
    running_on,
    stock_rnn,
)

import cnnrnn_ext as cx


def both(cell, **options):
    """(ours, stock) as functions of tensors by name."""
    return our_rnn(cell, **options), stock_rnn(cell, **options)


def tensors_for(cell, t, n, i, h, dtype=torch.float32, **options):
    shape = {k: options[k] for k in ("num_layers", "bidirectional", "bias", "proj_size") if k in options}
    tensors = rnn_tensors(cell, t, n, i, h, dtype=dtype, **shape)
    if options.get("batch_first"):
        tensors["input"] = tensors["input"].transpose(0, 1).contiguous()
    return tensors


# name: (t, n, i, h), options
CONFIGS = {
    "small": ((5, 3, 7, 6), {}),
    "one step": ((1, 3, 7, 6), {}),
    "one row": ((9, 1, 7, 6), {}),
    "one row, packed weights": ((30, 1, 7, 21), {}),
    "two rows": ((20, 2, 5, 17), {}),
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
@pytest.mark.parametrize("cell", CELLS)
def test_against_torch(mode, cell, name, dtype):
    shape, options = CONFIGS[name]
    tensors = tensors_for(cell, *shape, dtype=dtype, **options)
    compare(*both(cell, **options), tensors, mode, [FUNCTION[cell]])


# ---- the whole matrix of torch's arguments ----

PACKED = {"padded": None, "packed sorted": [6, 4, 4, 1], "packed unsorted": [4, 1, 6, 4]}
# (num_layers, bidirectional, bias, batch_first)
ARGUMENTS = list(itertools.product((1, 2), (False, True), (True, False), (False, True)))


def check_arguments(cell, packed, dtype, mode, arguments, proj_size=0):
    lengths = PACKED[packed]
    for num_layers, bidirectional, bias, batch_first in arguments:
        options = {
            "num_layers": num_layers,
            "bidirectional": bidirectional,
            "bias": bias,
            "batch_first": batch_first,
            **({"proj_size": proj_size} if proj_size else {}),
        }
        tensors = tensors_for(cell, 6, 4, 5, 7, dtype=dtype, **options)
        functions = (
            module_rnn(package, cell, options, lengths, "un" not in packed) for package in (cx, torch.nn)
        )
        try:
            compare(*functions, tensors, mode, [FUNCTION[cell]])
        except AssertionError as failure:
            raise AssertionError(f"{options}: {failure}") from failure


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("cell", CELLS)
def test_every_combination_of_arguments(compiled, cell, packed, dtype):
    """kind x layers x directions x bias x batch_first x packed x dtype, in full."""
    check_arguments(cell, packed, dtype, compiled, ARGUMENTS)


@pytest.mark.pure
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("cell", CELLS)
def test_combinations_of_arguments_on_the_reference(cell, packed):
    """A quarter of them, in which each pair of values occurs."""
    arguments = [ARGUMENTS[i] for i in (0, 3, 5, 6, 9, 10, 12, 15)]
    check_arguments(cell, packed, torch.float32, "reference", arguments)


@pytest.mark.pure
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", PACKED)
def test_every_combination_of_arguments_with_a_projection(packed, dtype):
    """proj_size has no kernel: it runs on the reference, and says so."""
    check_arguments("lstm", packed, dtype, "reference", ARGUMENTS, proj_size=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(6, 1, 7, 9), (6, 4, 7, 9), (5, 33, 40, 70)], ids=str)
def test_half_precision(mode, cell, dtype, shape):
    """Kernels and the reference: both within torch's own error. A ReLU is clearly on or off: near its kink
    either side may be luckier."""
    tensors = {k: v.to(dtype) for k, v in tensors_for(cell, *shape).items()}
    if cell == "rnn_relu":
        tensors["bias_ih_l0"] = 3 * tensors["bias_ih_l0"].sign()
    compare(*both(cell), tensors, mode, [FUNCTION[cell]])


# ---- sizes ----

REAL = {  # t, n, i, h, options: sizes whose scans are cut in different ways
    "16 steps of 32 rows, 1600 features": (16, 32, 1600, 128, {}),
    "both directions": (20, 8, 64, 128, {"bidirectional": True}),
    "shared by hidden units": (12, 6, 40, 200, {}),
    "shared by rows": (10, 40, 24, 48, {}),
    "one row of many units": (40, 1, 96, 256, {}),
}


@pytest.mark.isa
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("cell", CELLS)
def test_real_size(compiled, cell, name):
    *shape, options = REAL[name]
    tensors = tensors_for(cell, *shape, **options)
    compare(*both(cell, **options), tensors, compiled, [FUNCTION[cell]])


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_real_size_packed(compiled, cell, bidirectional):
    options = {"bidirectional": bidirectional}
    lengths = torch.randint(1, 25, (33,))
    lengths[7] = 24
    tensors = tensors_for(cell, 24, 33, 40, 72, **options)
    functions = (module_rnn(package, cell, options, lengths) for package in (cx, torch.nn))
    compare(*functions, tensors, compiled, [FUNCTION[cell]])


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(mode, cell):
    """Pre-activations of ±100 and of ±1e32: the gates saturate, and nothing overflows.

    Gradients are differences of nearly equal numbers here, so they are held to a tolerance. A ReLU does not
    saturate: it is left to stay finite.
    """
    tensors = tensors_for(cell, 5, 4, 7, 9)
    ours, stock = both(cell)
    for factor in (200, 1e10) if cell == "rnn_relu" else (200, 1e30):
        tensors["weight_ih_l0"] *= factor
        compare(ours, stock, tensors, mode, [FUNCTION[cell]], wanted=[])
        _, expected, grads = outputs_and_gradients(stock, tensors)
        with running_on(mode, FUNCTION[cell]):
            _, gradients, _ = outputs_and_gradients(ours, tensors, grads)
        for name, gradient in gradients.items():
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4 * max(1, largest))


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_small_preactivations(mode, cell):
    """Gates near their midpoint, where a coarse tanh or sigmoid loses all its digits."""
    tensors = {k: v * 1e-4 for k, v in tensors_for(cell, 5, 4, 7, 9).items()}
    compare(*both(cell), tensors, mode, [FUNCTION[cell]])


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
    ("cell", "wanted"),
    [(cell, s) for cell in ("lstm", "gru", "rnn_tanh") for s in SUBSETS if cell == "lstm" or s != ("c_0",)],
    ids=lambda s: s if isinstance(s, str) else "+".join(s) if len(s) < 4 else f"{len(s)} of 7: {s[0]}..",
)
def test_any_subset_of_gradients(mode, cell, wanted):
    tensors = tensors_for(cell, 4, 3, 5, 6)
    wanted = [name for name in wanted if name in tensors]
    compare(*both(cell), tensors, mode, [FUNCTION[cell]], wanted=wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_reverse_direction_only(mode, cell):
    wanted = ["weight_ih_l0_reverse", "bias_hh_l0_reverse"]
    tensors = tensors_for(cell, 4, 3, 5, 6, bidirectional=True)
    compare(*both(cell, bidirectional=True), tensors, mode, [FUNCTION[cell]], wanted=wanted)


@pytest.mark.parametrize(
    ("cell", "used"),
    [
        (cell, used)
        for cell in CELLS
        for used in itertools.product((True, False), repeat=3 if cell == "lstm" else 2)
        if any(used)
    ],
    ids=lambda v: v if isinstance(v, str) else "".join(map(str, map(int, v))),
)
def test_any_subset_of_outputs_in_the_loss(mode, cell, used):
    """output, h_n and c_n enter the loss in every combination."""
    tensors = tensors_for(cell, 4, 3, 5, 6, bidirectional=True)
    shapes = (4, 3, 12), (2, 3, 6), (2, 3, 6)
    grads = [torch.randn(s) if u else None for s, u in zip(shapes, used, strict=False)]
    compare(*both(cell, bidirectional=True), tensors, mode, [FUNCTION[cell]], grad_outputs=grads)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", [(6, 3, 7, 9), (40, 1, 7, 9), (9, 12, 20, 33)], ids=str)
def test_inference_equals_training_bitwise(compiled, cell, shape):
    tensors = tensors_for(cell, *shape)
    ours, _ = both(cell)
    with running_on(compiled, FUNCTION[cell]):
        inference = ours(**tensors)
        tensors["weight_hh_l0"].requires_grad_()
        training = ours(**tensors)
    assert training[0].requires_grad
    for a, b in zip(inference, training, strict=True):
        assert torch.equal(a, b.detach())


# ---- layouts and edges ----


@pytest.mark.parametrize("cell", CELLS)
def test_strided_operands(mode, cell):
    """Non-contiguous input, states and weights, forward and backward."""
    tensors = tensors_for(cell, 4, 3, 6, 5)
    views = dict(tensors)
    views["input"] = torch.stack((tensors["input"],) * 2, -1)[..., 1]
    views["h_0"] = tensors["h_0"].transpose(1, 2).contiguous().transpose(1, 2)
    if cell == "lstm":
        views["c_0"] = torch.cat((tensors["c_0"],) * 2, 1)[:, 3:]
    for name in NAMES[3:5]:
        views[name] = tensors[name].t().contiguous().t()
    views["bias_ih_l0"] = torch.stack((tensors["bias_ih_l0"],) * 2, 1)[:, 0]
    assert not any(views[n].is_contiguous() for n in ("input", "h_0", "weight_ih_l0", "bias_ih_l0"))
    compare(*both(cell), views, mode, [FUNCTION[cell]])


@pytest.mark.parametrize("cell", CELLS)
def test_expanded_operands(mode, cell):
    """Stride 0: one state for the whole batch, and the expanded gradient of sum()."""
    tensors = tensors_for(cell, 4, 3, 6, 5)
    grads = []
    for function in both(cell):
        leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
        operands = {**leaves, "h_0": leaves["h_0"][:, :1].expand(-1, 3, -1)}
        with cx.backend(mode):
            output, *states = function(**operands)
            (output.sum() + states[-1].sum()).backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.pure
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_zero_size_batch(mode, cell, bidirectional):
    """No rows: empty outputs, and weight gradients of zero. torch.nn computes the same."""
    tensors = tensors_for(cell, 4, 0, 6, 5, bidirectional=bidirectional)
    compare(*both(cell, bidirectional=bidirectional), tensors, mode, [FUNCTION[cell]])


@pytest.mark.pure
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_length_zero(mode, cell, bidirectional):
    """No steps: the states pass through, with their gradients. torch.nn itself refuses this."""
    tensors = tensors_for(cell, 0, 3, 6, 5, bidirectional=bidirectional)
    d = 2 if bidirectional else 1
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    with running_on(mode, FUNCTION[cell]):
        output, *finals = both(cell, bidirectional=bidirectional)[0](**leaves)
        outer = [torch.randn_like(s) for s in finals]
        torch.autograd.backward(finals, outer)
    assert list(output.shape) == [0, 3, d * 5]
    assert len(finals) == (2 if cell == "lstm" else 1)
    for name, final, grad in zip(("h_0", "c_0"), finals, outer, strict=False):
        assert torch.equal(final, leaves[name])
        assert torch.equal(leaves[name].grad, grad)
    for name in rnn_names(bidirectional=bidirectional):
        grad = leaves[name].grad  # None where the reference never reads the parameter
        assert grad is None or (grad.shape == leaves[name].shape and not grad.any())


@pytest.mark.parametrize("cell", CELLS)
def test_no_features(mode, cell):
    """An input of no features: the states alone drive the network. torch.nn refuses input_size 0."""
    tensors = tensors_for(cell, 4, 3, 1, 5)
    stock = {**tensors, "input": torch.zeros(4, 3, 1)}
    ours = {**tensors, "input": torch.zeros(4, 3, 0), "weight_ih_l0": tensors["weight_ih_l0"][:, :0]}
    wanted = [n for n in tensors if n not in ("input", "weight_ih_l0")]
    expected, expected_grads, outer = outputs_and_gradients(both(cell)[1], stock, wanted=wanted)
    with running_on(mode, FUNCTION[cell]):
        result, grads, _ = outputs_and_gradients(both(cell)[0], ours, outer, wanted)
    for a, b in zip((*result, *grads.values()), (*expected, *expected_grads.values()), strict=True):
        torch.testing.assert_close(a, b)
