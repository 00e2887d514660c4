"""weight_dtype=: inference with weights in bfloat16 or int8, and their error. That they never grow old:
test_weight_dtype_staleness.py."""

import copy

import pytest
import torch
import torch._dynamo.testing
from _narrow_cases import CELLS, DTYPES, KINDS, SEQUENCES, H, I, N, T, edit_in_place, make, operands, tensors
from _oracle import compiled_missing, expected_kernel
from torch import nn

import cnnrnn_ext as cx


def narrow_by_hand(weight, dtype):
    """What a narrow copy stands for, written out here row by row, in float64."""
    weight = weight.detach()
    if dtype == torch.bfloat16:
        return weight.bfloat16().double()
    rows = []
    for row in weight:
        scale = row.abs().max() / 127
        rows.append(torch.round(row / scale).double() * scale.double() if scale > 0 else row.double() * 0)
    return torch.stack(rows)


def oracle_of(module, stock_class, dtype, *args, **options):
    """The stock module in float64 with the weights that the narrow copies stand for."""
    stock = stock_class(*args, **options).double()
    state = {
        name: narrow_by_hand(p, dtype) if name.startswith(("weight_ih", "weight_hh")) else p.detach().double()
        for name, p in module.state_dict().items()
    }
    stock.load_state_dict(state)
    return stock


def double(x):
    return x.double() if isinstance(x, torch.Tensor) else tuple(double(t) for t in x)


def tolerance_of(dtype, mode="auto"):
    """Beside int8 weights the kernels round the activations; test_weight_dtype_products.py has its own tests
    of that."""
    rounds = dtype == torch.int8 and mode == "auto" and compiled_missing() is None
    return 3e-4 if rounds else 2e-6


def check_close(ours, theirs, tolerance):
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def label(dtype):
    return f"{expected_kernel()}, {str(dtype).removeprefix('torch.')} weights"


# ---- what is computed ----


@pytest.mark.pure
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_against_float64_with_the_same_weights(mode, kind, batch, dtype):
    """The only error is the rounding of the weights, done by hand; and it is there."""
    module = make(kind, dtype)
    x = operands(kind, batch=batch)
    oracle = oracle_of(module, KINDS[kind][1], dtype, I, H)
    with torch.no_grad(), cx.backend(mode), cx.trace() as log:
        y = module(x)
    check_close(y, oracle(x.double()), tolerance_of(dtype, mode))
    if mode == "auto" and compiled_missing() is None:
        assert [(c.op, c.backend, c.kernel) for c in log] == [(kind, "compiled", label(dtype))]
    else:
        assert [(c.op, c.backend, c.kernel) for c in log] == [(kind, "reference", None)]
    exact = KINDS[kind][1](I, H).double()
    exact.load_state_dict(module.state_dict())
    difference = max((a - b).abs().max() for a, b in zip(tensors(y), tensors(exact(x.double())), strict=True))
    assert difference > 1e-4, "the weights were not narrowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "batch_first": True, "bias": False},
        {"num_layers": 3},
    ],
    ids=str,
)
def test_layers_and_directions(kind, options, dtype):
    module = make(kind, dtype, **options)
    oracle = oracle_of(module, SEQUENCES[kind][1], dtype, I, H, **options)
    x = torch.randn(N, N, I)
    shape = (module.num_layers * (1 + module.bidirectional), N, H)
    h = torch.randn(shape)
    hx = (h, torch.randn(shape)) if kind == "lstm" else h
    with torch.inference_mode():
        check_close(module(x, hx), oracle(x.double(), double(hx)), tolerance_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_return_all_lengths_and_packed(kind, dtype):
    """Each computes with the narrow weights too: the plain call at full length is the measure."""
    module = make(kind, dtype)
    x = torch.randn(T, N, I)
    with torch.no_grad():
        output, states = module(x)
        again, _, everything = module(x, return_all=True)
        near = {"rtol": tolerance_of(dtype), "atol": tolerance_of(dtype)}
        torch.testing.assert_close(again, output, **near)
        torch.testing.assert_close(tensors(everything)[0][0], output, **near)
        short, _ = module(x, lengths=torch.tensor([T, 2, 4]))
        torch.testing.assert_close(short[:, 0], output[:, 0])
        torch.testing.assert_close(short[:2, 1], output[:2, 1])
        assert not short[2:, 1].any()
        packed, packed_states = module(nn.utils.rnn.pack_padded_sequence(x, [T] * N))
        torch.testing.assert_close(packed.data, output.flatten(0, 1))
        torch.testing.assert_close(tensors(packed_states), tensors(states))


PLAIN = {
    "proj_size": (cx.LSTM, {"proj_size": 4}),
    "layer_norm": (cx.LSTM, {"layer_norm": True}),
    "zoneout": (cx.GRU, {"zoneout": 0.2}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("word", PLAIN)
def test_what_has_no_kernel_computes_with_the_copies_on_plain_pytorch(word, dtype):
    module_class, options = PLAIN[word]
    module = module_class(I, H, weight_dtype=dtype, **options).eval()
    twin = module_class(I, H, **options).double().eval()
    state = {
        k: narrow_by_hand(p, dtype) if k.startswith(("weight_ih", "weight_hh")) else p
        for k, p in module.state_dict().items()
    }
    twin.load_state_dict(state)
    x = torch.randn(T, N, I)
    with torch.no_grad(), cx.trace() as log:
        y = module(x)
    assert log[0].backend == "reference"
    assert compiled_missing() or word in log[0].reason
    check_close(y, twin(x.double()), 2e-6)


def test_float64_runs_on_plain_pytorch():
    module = cx.GRU(I, H, weight_dtype=torch.int8, dtype=torch.float64)
    x = torch.randn(T, N, I, dtype=torch.float64)
    with torch.no_grad(), cx.trace() as log:
        y = module(x)
    assert log[0].backend == "reference"
    assert compiled_missing() or "narrow weights" in log[0].reason
    oracle = oracle_of(module, nn.GRU, torch.int8, I, H)
    for a, b in zip(y, oracle(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_half_parameters_and_autocast(compiled, kind):
    """Both run on the narrow kernels, by way of float32."""
    x, module = operands(kind), make(kind, torch.int8)
    with torch.no_grad():
        expected = tensors(module(x.bfloat16().float()))
        with cx.trace() as log, torch.autocast("cpu", torch.bfloat16):
            casts = tensors(module(x))
        with cx.trace() as log_half:
            half = tensors(copy.deepcopy(module).bfloat16()(x.bfloat16()))
    assert [c.kernel for c in log + log_half] == [label(torch.int8)] * 2
    for a, b, c in zip(casts, expected, half, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)
        torch.testing.assert_close(c.float(), b, rtol=0.02, atol=0.02)


# ---- gradients use the parameters ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_run_the_ordinary_path(kind, dtype):
    module, plain = make(kind, dtype), make(kind, None)
    plain.load_state_dict(module.state_dict())
    x = operands(kind)

    def run(m):
        m.zero_grad()
        y = tensors(m(x))
        sum((t * t).sum() for t in y).backward()
        return [*y, *(p.grad for p in m.parameters())]

    with cx.trace() as log:
        ours = run(module)
    assert "weights" not in str(log[0].kernel)
    for a, b in zip(ours, run(plain), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert not torch.equal(tensors(module(x))[0], ours[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", ["input", "bias", "nobody"])
def test_one_tensor_that_needs_a_gradient_is_enough(kind, who):
    module = make(kind, torch.int8).requires_grad_(False)
    x = operands(kind)
    if who == "input":
        x.requires_grad_()
    if who == "bias":
        next(p for name, p in module.named_parameters() if "bias_hh" in name).requires_grad_()
    plain = make(kind, None)
    plain.load_state_dict(module.state_dict())
    y = tensors(module(x))[0]
    assert y.requires_grad == (who != "nobody")
    assert torch.equal(y, tensors(plain(x))[0]) == (who != "nobody")


def test_derivatives_of_torch_func_use_the_parameters():
    module, plain = make("gru_cell", torch.int8), make("gru_cell", None)
    plain.load_state_dict(module.state_dict())
    x, tangent = operands("gru_cell"), operands("gru_cell")
    with torch.no_grad():
        for a, b in zip(
            torch.func.jvp(module, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- the error reported, odd values, arguments ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_error(kind, dtype):
    module = make(kind, dtype)
    errors = module.weight_error()
    names = {n for n, _ in module.named_parameters() if n.startswith(("weight_ih", "weight_hh"))}
    assert set(errors) == names
    for name, reported in errors.items():
        weight = getattr(module, name).detach()
        expected = (weight.double() - narrow_by_hand(weight, dtype)).abs().max().item()
        assert reported == pytest.approx(expected, rel=1e-4)
        assert 0 < reported < (0.01 if dtype == torch.int8 else 0.004) * weight.abs().max()
    assert make(kind, None).weight_error() == {}


def test_int8_rows_of_every_kind():
    """Zeros, one element, denormal rows and rows of very different size each have a scale of their own."""
    weight = torch.zeros(6, 4)
    weight[1, 2] = -3.0
    weight[2] = torch.tensor([1.0, -0.5, 0.25, 1 / 127])
    weight[3] = 1e-44
    weight[4] = torch.tensor([1e30, -1e30, 1e28, 0.0])
    weight[5] = torch.tensor([1e-6, 2e-6, -3e-6, 0.0])
    from cnnrnn_ext.functional._narrow import narrowed, widened

    levels, scale = narrowed(weight, torch.int8)
    assert levels.dtype == torch.int8
    assert scale[0] == 1
    assert levels[1].tolist() == [0, 0, -127, 0]
    assert levels[2].tolist() == [127, -64, 32, 1]
    wide = widened(levels, scale, torch.float32)
    largest = weight.abs().amax(1)
    assert ((wide - weight).abs().amax(1) <= largest / 253 + 1e-43).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_show(dtype, value):
    cell = cx.RNNCell(I, H, nonlinearity="relu", weight_dtype=dtype)
    with torch.no_grad():
        cell.weight_ih[4, 7] = value
        y = cell(torch.rand(N, I) + 1)
    assert not y[:, 4].isfinite().any()
    assert y[:, :4].isfinite().all()


@pytest.mark.parametrize("value", [torch.float32, torch.float16, torch.uint8, "int8", 8, int])
@pytest.mark.parametrize("kind", KINDS)
def test_other_values_are_refused(kind, value):
    with pytest.raises(ValueError, match="weight_dtype"):
        make(kind, value)


def test_shown_in_repr_and_not_in_the_state_dict():
    module = cx.LSTM(3, 4, weight_dtype=torch.int8)
    assert "weight_dtype=torch.int8" in repr(module)
    assert "weight_dtype" not in repr(cx.GRUCell(3, 4))
    nn.LSTM(3, 4).load_state_dict(module.state_dict(), strict=True)


def test_bad_input_is_told_by_name():
    for kind, match in (("lstm", "input"), ("gru_cell", "weight_ih|input")):
        with torch.no_grad(), pytest.raises(RuntimeError, match=match):
            make(kind, torch.int8)(operands(kind)[..., :-1])


# ---- torch.compile ----


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_compile_in_one_graph(kind, dtype):
    torch.compiler.reset()
    module, x = make(kind, dtype), operands(kind)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(2):
            for a, b in zip(tensors(compiled(x)), tensors(module(x)), strict=True):
                torch.testing.assert_close(a, b)
            edit_in_place(module)
    assert counter.frame_count == 1
    operators = {
        str(n.target) for g in counter.graphs for n in g.graph.nodes if "cnnrnn_ext" in str(n.target)
    }
    if compiled_missing() is None:
        name = "rnn_cell_narrow" if kind in CELLS else "rnn_narrow"
        assert {o.split(".")[1] for o in operators} == {name}
    loss = sum((t * t).sum() for t in tensors(compiled(x)))
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert next(module.parameters()).grad.any()


def test_fake_weights_leave_nothing_behind():
    """A tracer's tensors are not kept for the calls after it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module, x = make("gru", torch.int8), operands("gru")
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(torch.empty(T, N, I))
        y = module(x)[0]
    assert type(y) is torch.Tensor
