"""The raw operators: schemas, opcheck, gradcheck and gradgradcheck of each, autocast, dtypes."""

import copy

import pytest
import torch
from _oracle import compiled_missing
from torch.testing._internal.optests import opcheck as _opcheck

import cnnrnn_ext as cx
from cnnrnn_ext import _library

operators = torch.ops.cnnrnn_ext
NAMES = [
    f"{base}{form}" for base in ("conv_pool2d", "lstm", "lstm_cell") for form in ("", "_train", "_backward")
]

# stride, padding, dilation, groups, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode
CONV_CONFIGS = {
    "default": ([1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False),
    "everything": ([2, 1], [1, 2], [1, 2], 2, "none", "max", [3, 2], [2, 1], [1, 0], True),
}


def conv_arguments(
    config="default", dtype=torch.float32, layout=torch.contiguous_format, bias=True, grad=False
):
    config = CONV_CONFIGS[config]
    x = torch.randn(2, 4, 9, 10, dtype=dtype).contiguous(memory_format=layout).requires_grad_(grad)
    weight = torch.randn(6, 4 // config[3], 3, 3, dtype=dtype, requires_grad=grad)
    bias = torch.randn(6, dtype=dtype, requires_grad=grad) if bias else None
    return (x, weight, bias, *config)


def lstm_arguments(directions=1, dtype=torch.float32, bias=True, grad=False, steps=4, hidden=5):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    rows = 4 * hidden
    weights = [
        [random(rows, 3) for _ in range(directions)],
        [random(rows, hidden) for _ in range(directions)],
        *([[random(rows) for _ in range(directions)] if bias else [] for _ in range(2)]),
    ]
    states = (random(directions, 2, hidden) for _ in range(2))
    return (random(steps, 2, 3), *states, *weights)


def cell_arguments(dtype=torch.float32, bias=True, grad=False):
    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    biases = (random(20), random(20)) if bias else (None, None)
    return (random(2, 3), random(2, 5), random(2, 5), random(20, 3), random(20, 5), *biases)


def detached(arguments):
    if isinstance(arguments, torch.Tensor):
        return arguments.detach()
    return (
        type(arguments)(detached(a) for a in arguments) if isinstance(arguments, (tuple, list)) else arguments
    )


def backward_arguments(name, forward, need=None, grad=False, missing=()):
    """Arguments of NAME_backward: random incoming gradients beside what NAME_train saved."""
    outputs = getattr(operators, name + "_train")(*detached(forward))
    kept = {"conv_pool2d": 1, "lstm": 3, "lstm_cell": 2}[name]
    grads = [
        None if i in missing else torch.randn_like(y).requires_grad_(grad)
        for i, y in enumerate(outputs[:kept])
    ]
    if name == "conv_pool2d":
        return (*grads, *forward[:3], outputs[1], *forward[3:], *(need or (True, True, True)))
    saved = (outputs[0], outputs[3]) if name == "lstm" else (outputs[2],)
    return (*grads, *forward, *saved, *(need or (True,) * 4))


def tensors_of(arguments):
    lists = [a if isinstance(a, (tuple, list)) else [a] for a in arguments]
    return [t for group in lists for t in group if isinstance(t, torch.Tensor)]


def sample_arguments(grad):
    """(operator, arguments) over all nine, each in several configurations."""
    last = torch.channels_last
    convs = {
        "default": conv_arguments(grad=grad),
        "everything": conv_arguments("everything", grad=grad),
        "channels_last": conv_arguments(layout=last, grad=grad),
        "channels_last, everything": conv_arguments("everything", layout=last, grad=grad),
        "no bias": conv_arguments(bias=False, grad=grad),
        "float64": conv_arguments(dtype=torch.float64, grad=grad),
    }
    lstms = {
        "default": lstm_arguments(grad=grad, steps=2),
        "bidirectional": lstm_arguments(2, grad=grad, steps=2),
        "no bias": lstm_arguments(bias=False, grad=grad, steps=2),
        "float64": lstm_arguments(dtype=torch.float64, grad=grad, steps=2),
    }
    cells = {
        "default": cell_arguments(grad=grad),
        "no bias": cell_arguments(bias=False, grad=grad),
        "float64": cell_arguments(dtype=torch.float64, grad=grad),
    }
    for name, samples in (("conv_pool2d", convs), ("lstm", lstms), ("lstm_cell", cells)):
        for case, arguments in samples.items():
            yield name, case, arguments


OPCHECK_CASES = [
    (name + form, case) for name, case, _ in sample_arguments(False) for form in ("", "_train", "_backward")
]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "case"), OPCHECK_CASES)
def test_opcheck(name, case):
    """Schema, fake kernel and autograd registration, traced with dynamic shapes."""
    trains = name.endswith(("_train", "_backward"))
    base = name.removesuffix("_train").removesuffix("_backward")
    arguments = next(a for n, c, a in sample_arguments(trains) if (n, c) == (base, case))
    if name.endswith("_backward"):
        arguments = backward_arguments(base, arguments, grad=True)
    # Tracing a backward and its own double backward takes seconds: once each is enough.
    checks = CHECKS if case == "default" or not name.endswith("_backward") else CHECKS[:-1]
    _opcheck(getattr(operators, name).default, arguments, test_utils=checks, rtol=1e-4, atol=1e-4)


def test_every_operator_is_checked():
    assert {name for name, _ in OPCHECK_CASES} == set(NAMES)
    assert {schema.split("(")[0] for schema in _library.schemas()} == set(NAMES)


# ---- fake kernels against the real ones, beyond what opcheck compares ----


@pytest.mark.parametrize("case", ["default", "everything", "channels_last", "channels_last, everything"])
def test_fake_layout_is_the_real_layout(case):
    arguments = next(a for n, c, a in sample_arguments(False) if (n, c) == ("conv_pool2d", case))
    meta = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments)
    for real, fake in zip(
        operators.conv_pool2d_train(*arguments), operators.conv_pool2d_train(*meta), strict=True
    ):
        assert real.shape == fake.shape
        assert real.stride() == fake.stride()
        assert real.dtype == fake.dtype


# ---- schemas ----


@pytest.mark.pure
@pytest.mark.parametrize("schema", _library.schemas(), ids=lambda s: s.split("(")[0])
def test_registered_schema_is_the_file(schema):
    """The C++ library (or Python without it) registered exactly what operators.schema says."""
    name = schema.split("(")[0]
    parsed = torch._C.parse_schema(f"cnnrnn_ext::{schema}")
    registered = getattr(operators, name).default._schema
    assert str(registered) == str(parsed)
    assert not registered.is_mutable


# ---- gradients ----


def run_flat(operator, arguments, positions, kept):
    """``operator`` as a function of the tensors at ``positions`` (nested positions as pairs)."""

    def function(*tensors):
        filled = list(copy.copy(arguments))
        for position, tensor in zip(positions, tensors, strict=True):
            if isinstance(position, tuple):
                filled[position[0]] = [*filled[position[0]]]
                filled[position[0]][position[1]] = tensor
            else:
                filled[position] = tensor
        outputs = operator(*filled)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        flat = [t for o in outputs for t in (o if isinstance(o, (tuple, list)) else (o,))]
        return tuple(t for t in flat[:kept] if t.requires_grad)

    tensors = []
    for position in positions:
        source = arguments[position[0]][position[1]] if isinstance(position, tuple) else arguments[position]
        tensors.append(source.detach().clone().requires_grad_())
    return function, tensors


def tensor_positions(arguments):
    """Positions of every floating-point tensor, those in lists too."""
    positions = []
    for i, a in enumerate(arguments):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            positions.append(i)
        elif isinstance(a, list):
            positions += [(i, j) for j, t in enumerate(a) if isinstance(t, torch.Tensor)]
    return positions


def shrunk_conv(config, bias=True):
    """A small, well separated problem: no two positions of a window within the step of gradcheck."""
    config = CONV_CONFIGS[config]
    x = torch.randperm(2 * 5 * 5).view(1, 2, 5, 5).double() / 7 - 3
    weight = (torch.randperm(2 * 2 // config[3] * 9).view(2, 2 // config[3], 3, 3).double() - 15.3) / 11
    bias = torch.tensor([0.1234, -0.4321], dtype=torch.float64) if bias else None
    return (x, weight, bias, *config)


GRAD_CASES = {
    "conv_pool2d": ("conv_pool2d", lambda: shrunk_conv("default"), 1),
    "conv_pool2d, everything": ("conv_pool2d", lambda: shrunk_conv("everything"), 1),
    "conv_pool2d, no bias": ("conv_pool2d", lambda: shrunk_conv("default", bias=False), 1),
    "lstm": ("lstm", lambda: lstm_arguments(dtype=torch.float64, steps=3, hidden=2), 3),
    "lstm, bidirectional": ("lstm", lambda: lstm_arguments(2, torch.float64, steps=2, hidden=2), 3),
    "lstm, no bias": ("lstm", lambda: lstm_arguments(dtype=torch.float64, bias=False, steps=2, hidden=2), 3),
    "lstm_cell": ("lstm_cell", lambda: cell_arguments(torch.float64), 2),
    "lstm_cell, no bias": ("lstm_cell", lambda: cell_arguments(torch.float64, bias=False), 2),
}


@pytest.mark.pure
@pytest.mark.parametrize("case", GRAD_CASES)
def test_gradcheck(case):
    name, make, kept = GRAD_CASES[case]
    arguments = make()
    function, tensors = run_flat(
        getattr(operators, name + "_train"), arguments, tensor_positions(arguments), kept
    )
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("case", GRAD_CASES)
def test_gradgradcheck(case):
    """The second derivative, through the backward operator's own gradient."""
    name, make, kept = GRAD_CASES[case]
    arguments = make()
    function, tensors = run_flat(
        getattr(operators, name + "_train"), arguments, tensor_positions(arguments), kept
    )
    assert torch.autograd.gradgradcheck(function, tensors)


SAVED = {"conv_pool2d": 0, "lstm": 2, "lstm_cell": 1}  # tensors of the backward that the forward computed


@pytest.mark.parametrize("case", GRAD_CASES)
def test_backward_operator_has_the_gradient_of_its_formula(case):
    """gradcheck of NAME_backward itself, the saved tensors recomputed with the inputs they depend on."""
    name, make, _ = GRAD_CASES[case]
    forward = make()
    arguments = backward_arguments(name, forward)
    grads = {"conv_pool2d": 1, "lstm": 3, "lstm_cell": 2}[name]

    def backward(*filled):
        kept = getattr(operators, name + "_train")(
            *detached(filled[grads : grads + len(forward)][: len(forward)])
        )
        if name == "conv_pool2d":
            return operators.conv_pool2d_backward(*filled)
        saved = (kept[0], kept[3]) if name == "lstm" else (kept[2],)
        return getattr(operators, name + "_backward")(
            *filled[: grads + len(forward)], *saved, True, True, True, True
        )

    if name == "conv_pool2d":
        positions = [i for i in tensor_positions(arguments) if i < 4]
        function, tensors = run_flat(operators.conv_pool2d_backward, arguments, positions, 99)
    else:
        positions = tensor_positions(arguments)[: -SAVED[name]]
        function, tensors = run_flat(backward, arguments, positions, 99)
    assert torch.autograd.gradcheck(function, tensors)


# ---- gradients not asked for ----


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_conv_pool2d_backward_computes_what_is_asked(wanted):
    forward = conv_arguments()
    full = operators.conv_pool2d_backward(*backward_arguments("conv_pool2d", forward))
    need = [i == wanted for i in range(3)]
    torch.manual_seed(1)
    arguments = backward_arguments("conv_pool2d", forward)
    full = operators.conv_pool2d_backward(*arguments)
    partial = operators.conv_pool2d_backward(*arguments[:-3], *need)
    for i in range(3):
        if i == wanted:
            assert torch.equal(full[i], partial[i])
        else:
            assert list(partial[i].shape) == [0]


@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("name", ["lstm", "lstm_cell"])
def test_lstm_backward_computes_what_is_asked(name, wanted):
    arguments = backward_arguments(name, lstm_arguments(2) if name == "lstm" else cell_arguments())
    operator = getattr(operators, name + "_backward")
    full = operator(*arguments)
    partial = operator(*arguments[:-4], *[i == wanted for i in range(4)])
    groups = {0: [0], 1: [1, 2], 2: [3, 4], 3: [5]}
    for i in range(6):
        if i in groups[wanted]:
            torch.testing.assert_close(full[i], partial[i], rtol=0, atol=0)
        elif isinstance(partial[i], list):
            assert partial[i] == []
        else:
            assert list(partial[i].shape) == [0]


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_missing_incoming_gradient_is_zero(missing):
    arguments = backward_arguments("lstm", lstm_arguments(2))
    zeros = [torch.zeros_like(g) if i in missing else g for i, g in enumerate(arguments[:3])]
    absent = [None if i in missing else g for i, g in enumerate(arguments[:3])]
    full = operators.lstm_backward(*zeros, *arguments[3:])
    partial = operators.lstm_backward(*absent, *arguments[3:])
    for a, b in zip(full, partial, strict=True):
        torch.testing.assert_close(a, b)


# ---- the operators against the reference ----


@pytest.mark.parametrize("case", ["default", "everything"])
def test_code_names_the_winner(case):
    """code is the winner's place in its window, or 255: recomputed here from the map before the pool."""
    arguments = conv_arguments(case)
    x, weight, bias, stride, padding, dilation, groups, activation, _, size, step, pad, _ = arguments
    y, code = operators.conv_pool2d_train(*arguments)
    conv = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    conv = conv.relu() if activation == "relu" else conv
    assert code.dtype == torch.uint8
    assert code.shape == y.shape
    for (n, k, i, j), winner in zip(
        torch.cartesian_prod(*map(torch.arange, y.shape)).tolist(), code.flatten().tolist(), strict=True
    ):
        if winner == 255:
            assert activation == "relu"
            assert y[n, k, i, j] == 0
            continue
        row, column = i * step[0] - pad[0] + winner // size[1], j * step[1] - pad[1] + winner % size[1]
        torch.testing.assert_close(conv[n, k, row, column], y[n, k, i, j])


def test_reserve_holds_gates_and_state():
    x, h_0, c_0, (w_ih,), (w_hh,), (b_ih,), (b_hh,) = lstm_arguments()
    output, h_n, c_n, reserve = operators.lstm_train(x, h_0, c_0, [w_ih], [w_hh], [b_ih], [b_hh])
    h, c = h_0[0], c_0[0]
    for t in range(len(x)):
        gates = x[t] @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        expected = torch.stack((i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid(), c), 1)
        torch.testing.assert_close(reserve[0, t], expected)
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close((h_n[0], c_n[0]), (h, c))


@pytest.mark.pure
def test_inference_operator_is_the_train_operators_output():
    for name, _, arguments in sample_arguments(False):
        inference = getattr(operators, name)(*arguments)
        training = getattr(operators, name + "_train")(*arguments)
        inference = inference if isinstance(inference, tuple) else (inference,)
        for a, b in zip(inference, training[: len(inference)], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["conv_pool2d", "lstm", "lstm_cell"])
def test_inference_operator_warns_of_a_gradient(name):
    """The inference forms have no gradient: asking for one through the raw operator is not silent."""
    arguments = next(a for n, _, a in sample_arguments(True) if n == name)
    result = getattr(operators, name)(*arguments)
    loss = (result[0] if isinstance(result, tuple) else result).sum()
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        loss.backward()


def test_arguments_are_not_modified():
    for name, case, arguments in sample_arguments(False):
        for form, given in (("_train", arguments), ("_backward", backward_arguments(name, arguments))):
            before = copy.deepcopy(given)
            getattr(operators, name + form)(*given)
            for a, b in zip(tensors_of(given), tensors_of(before), strict=True):
                assert torch.equal(a, b), f"{name}{form} {case}"


# ---- dtypes without a kernel ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["conv_pool2d", "lstm", "lstm_cell"])
def test_raw_operator_refuses_other_dtypes(name, dtype):
    """The compiled operators name what they do not take; functional composes for those."""
    if reason := compiled_missing():
        pytest.skip(f"no compiled kernels: {reason}")
    make = {"conv_pool2d": conv_arguments, "lstm": lstm_arguments, "lstm_cell": cell_arguments}[name]

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype)
        return (
            [cast(v) for v in value]
            if isinstance(value, list) and value and isinstance(value[0], torch.Tensor)
            else value
        )

    arguments = [cast(a) for a in make()]
    for form in ("", "_train"):
        with pytest.raises(RuntimeError, match=r"(?i)dtype|float32|float64"):
            getattr(operators, name + form)(*arguments)


# ---- autocast ----


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


def test_modules_under_autocast():
    """As torch.nn under CPU autocast: sequences and convolutions in bfloat16 (on the reference, and the
    trace says so), the cell's state in float32; gradients in float32."""
    modules = [cx.ConvPool2d(3, 4, 3), cx.LSTM(5, 6), cx.LSTMCell(5, 6)]
    stock = [torch.nn.Conv2d(3, 4, 3), torch.nn.LSTM(5, 6), torch.nn.LSTMCell(5, 6)]
    inputs = [torch.randn(2, 3, 8, 8), torch.randn(4, 3, 5), torch.randn(3, 5)]
    for module, twin, x in zip(modules, stock, inputs, strict=True):
        twin.load_state_dict(module.state_dict())
        with torch.autocast("cpu", torch.bfloat16), cx.trace() as log:
            y, expected = module(x), twin(x)
        y, expected = (r[0] if isinstance(r, tuple) else r for r in (y, expected))
        if isinstance(module, cx.ConvPool2d):
            expected = torch.nn.functional.max_pool2d(expected.relu(), 2)
        assert y.dtype == expected.dtype
        if y.dtype == torch.bfloat16:
            assert [c.backend for c in log] == ["reference"]
            assert "bfloat16" in log[0].reason or compiled_missing()
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.03)
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in module.parameters())
        assert next(module.parameters()).grad.any()


def test_mixed_dtypes_under_autocast():
    """A bfloat16 input with float32 parameters and states, as they meet between modules: torch takes both."""
    h_0, c_0 = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    x = torch.randn(4, 3, 5).bfloat16()
    lstm, cell = cx.LSTM(5, 6), cx.LSTMCell(5, 6)
    stock_lstm, stock_cell = torch.nn.LSTM(5, 6), torch.nn.LSTMCell(5, 6)
    stock_lstm.load_state_dict(lstm.state_dict())
    stock_cell.load_state_dict(cell.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        pairs = [
            (lstm(x, (h_0, c_0))[0], stock_lstm(x, (h_0, c_0))[0]),
            (cell(x[0], (h_0[0], c_0[0]))[0], stock_cell(x[0], (h_0[0], c_0[0]))[0]),
        ]
        frames = torch.randn(2, 3, 9).bfloat16()
        conv = cx.ConvPool1d(3, 4, 3)
        expected = torch.nn.functional.conv1d(frames, conv.weight, conv.bias)
        pairs.append((conv(frames), torch.nn.functional.max_pool1d(expected.relu(), 2)))
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03)
