"""The raw operators: schemas, opcheck, gradcheck and gradgradcheck of each, autocast, dtypes."""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
from _oracle import CELLS, GATES, as_states, cell_class, compiled_missing, nonlinearity, sequence_class
from torch.testing._internal.optests import opcheck as _opcheck

import cnnrnn_ext as cx
from cnnrnn_ext import _library

operators = torch.ops.cnnrnn_ext
NAMES = [
    *(f"{base}{form}" for base in ("conv_pool2d", "rnn", "rnn_cell") for form in ("", "_train", "_backward")),
    "rnn_narrow",
    "rnn_cell_narrow",
    "rnn_layer",
]

# stride, padding, dilation, groups, activation, pool, pool_size, pool_stride, pool_padding, ceil_mode
CONV_CONFIGS = {
    "default": ([1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False),
    "everything": ([2, 1], [1, 2], [1, 2], 2, "none", "max", [3, 2], [2, 1], [1, 0], True),
    "tanh": ([1, 1], [1, 1], [1, 1], 1, "tanh", "max", [2, 2], [2, 2], [0, 0], False),
    "gelu": ([1, 1], [1, 1], [1, 1], 1, "gelu", "max", [3, 3], [2, 2], [1, 1], False),
    "average": ([1, 1], [1, 1], [1, 1], 1, "none", "avg", [2, 2], [2, 2], [0, 0], False),
    "average of silu": ([1, 1], [1, 1], [1, 1], 1, "silu", "avg", [3, 2], [2, 2], [1, 0], True),
    "average of elu": ([2, 1], [0, 1], [1, 1], 2, "elu", "avg", [2, 3], [1, 2], [0, 1], False),
}


def conv_arguments(
    config="default", dtype=torch.float32, layout=torch.contiguous_format, bias=True, grad=False
):
    config = CONV_CONFIGS[config]
    x = torch.randn(2, 4, 9, 10, dtype=dtype).contiguous(memory_format=layout).requires_grad_(grad)
    weight = torch.randn(6, 4 // config[3], 3, 3, dtype=dtype, requires_grad=grad)
    bias = torch.randn(6, dtype=dtype, requires_grad=grad) if bias else None
    return (x, weight, bias, *config)


def rnn_arguments(
    cell="lstm", directions=1, dtype=torch.float32, bias=True, grad=False, steps=4, hidden=5,
    state=True, given="padded",
):  # fmt: skip
    """cell, x, h_0, c_0, four lists of weights, batch_sizes, lengths, reset."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    rows = GATES[cell] * hidden
    weights = [
        [random(rows, 3) for _ in range(directions)],
        [random(rows, hidden) for _ in range(directions)],
        *([[random(rows) for _ in range(directions)] if bias else [] for _ in range(2)]),
    ]
    states = [random(directions, 2, hidden) if state else None for _ in range(2)]
    if cell != "lstm":
        states[1] = None
    x, batch_sizes, lengths, reset = (steps, 2, 3), None, None, None
    if given == "packed":
        batch_sizes = torch.tensor([2] * (steps - 1) + [1])
        x = 2 * steps - 1, 3
    if "lengths" in given:
        lengths = torch.tensor([steps - 1, steps])
    if "reset" in given:
        reset = torch.arange(2 * steps).view(steps, 2) % 3 == 1
    return (cell, random(*x), *states, *weights, batch_sizes, lengths, reset)


def cell_arguments(cell="lstm", dtype=torch.float32, bias=True, grad=False, state=True, hidden=5):
    """cell, x, h, c, four weights."""

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    rows = GATES[cell] * hidden
    biases = (random(rows), random(rows)) if bias else (None, None)
    h, c = (random(2, hidden) if state else None for _ in range(2))
    weights = random(rows, 3), random(rows, hidden)
    return (cell, random(2, 3), h, c if cell == "lstm" else None, *weights, *biases)


def narrow_arguments(base, cell="lstm", int8=True):
    """Inference with weights in int8, one scale a row, or in bfloat16."""
    arguments = list(rnn_arguments(cell, 2) if base == "rnn" else cell_arguments(cell))
    lists = base == "rnn"
    scales = []
    for index in (4, 5):
        weights = arguments[index] if lists else [arguments[index]]
        kind = torch.int8 if int8 else torch.bfloat16
        narrow = [(w * 30).clamp(-127, 127).to(kind) if int8 else w.to(kind) for w in weights]
        scale = [torch.rand(len(w)) / 30 for w in weights] if int8 else []
        arguments[index] = narrow if lists else narrow[0]
        scales.append(scale if lists else scale[0] if scale else None)
    return (*arguments[:6], *scales, *arguments[6:])


def detached(arguments):
    if isinstance(arguments, torch.Tensor):
        return arguments.detach()
    return (
        type(arguments)(detached(a) for a in arguments) if isinstance(arguments, (tuple, list)) else arguments
    )


FLAGS = {"conv_pool2d": 3, "rnn": 4, "rnn_cell": 4}
GRADIENTS = {"conv_pool2d": 1, "rnn": 4, "rnn_cell": 2}  # that come in
# Of what NAME_train returns: which outputs these belong to, and which the backward takes.
DIFFERENTIABLE = {"conv_pool2d": (0,), "rnn": (0, 1, 2, 3), "rnn_cell": (0, 1)}
SAVED = {"conv_pool2d": (1, 2), "rnn": (0, 3, 4), "rnn_cell": (0, 1, 2)}


def with_conv_saved(forward, outputs):
    """The arguments of conv_pool2d_backward between grad_y and what is needed."""
    y, code, kept = outputs
    if kept.dim() == 1:  # the value of the activation does, if one is needed
        kept = None if forward[7] in ("none", "relu") else y
    return (*forward[:3], code, kept, *forward[3:])


def backward_arguments(name, forward, need=None, grad=False, missing=()):
    """Arguments of NAME_backward: random incoming gradients beside what NAME_train saved."""
    outputs = getattr(operators, name + "_train")(*detached(forward))
    empty = () if name == "conv_pool2d" or forward[0] == "lstm" else (2, 3) if name == "rnn" else (1,)
    grads = [
        None if i in missing or i in empty else torch.randn_like(outputs[i]).requires_grad_(grad)
        for i in DIFFERENTIABLE[name]
    ]
    need = need or (True,) * FLAGS[name]
    saved = [outputs[i] for i in SAVED[name]]
    if name == "conv_pool2d":
        return (*grads, *with_conv_saved(forward, outputs), *need)
    return (*grads, *forward, *saved, *need)


def tensors_of(arguments):
    lists = [a if isinstance(a, (tuple, list)) else [a] for a in arguments]
    return [t for group in lists for t in group if isinstance(t, torch.Tensor)]


def sample_arguments(grad):
    """(operator, case, arguments) over the families, each in several configurations."""
    last = torch.channels_last
    convs = {
        "default": conv_arguments(grad=grad),
        "everything": conv_arguments("everything", grad=grad),
        "channels_last": conv_arguments(layout=last, grad=grad),
        "channels_last, everything": conv_arguments("everything", layout=last, grad=grad),
        "no bias": conv_arguments(bias=False, grad=grad),
        "float64": conv_arguments(dtype=torch.float64, grad=grad),
        "tanh": conv_arguments("tanh", grad=grad),
        "gelu, channels_last": conv_arguments("gelu", layout=last, grad=grad),
        "average": conv_arguments("average", grad=grad),
        "average of silu": conv_arguments("average of silu", grad=grad),
        "average of elu, channels_last": conv_arguments("average of elu", layout=last, grad=grad),
    }
    layers = {
        **{cell: rnn_arguments(cell, grad=grad, steps=2) for cell in CELLS},
        "bidirectional": rnn_arguments(directions=2, grad=grad, steps=2),
        "no bias": rnn_arguments(bias=False, grad=grad, steps=2),
        "float64": rnn_arguments(dtype=torch.float64, grad=grad, steps=2),
        "no states": rnn_arguments("gru", state=False, grad=grad, steps=2),
        "packed": rnn_arguments("gru", 2, grad=grad, steps=3, given="packed"),
        "lengths": rnn_arguments("lstm", grad=grad, steps=3, given="lengths"),
        "reset": rnn_arguments("rnn_tanh", 2, grad=grad, steps=3, given="reset"),
        "lengths and reset": rnn_arguments("gru", grad=grad, steps=3, given="lengths and reset"),
    }
    cells = {
        **{cell: cell_arguments(cell, grad=grad) for cell in CELLS},
        "no bias": cell_arguments(bias=False, grad=grad),
        "float64": cell_arguments(dtype=torch.float64, grad=grad),
        "no states": cell_arguments("gru", state=False, grad=grad),
    }
    for name, samples in (("conv_pool2d", convs), ("rnn", layers), ("rnn_cell", cells)):
        for case, arguments in samples.items():
            yield name, case, arguments


OPCHECK_CASES = [
    (name + form, case) for name, case, _ in sample_arguments(False) for form in ("", "_train", "_backward")
]
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def in_dtype(value, dtype):
    """A tensor, or a list of them, in dtype; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(dtype).requires_grad_(value.requires_grad)
    return [in_dtype(v, dtype) for v in value] if isinstance(value, list) else value


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
    traced = case in ("default", "lstm", "gru") or not name.endswith("_backward")
    checks = CHECKS if traced else CHECKS[:-1]
    _opcheck(getattr(operators, name).default, arguments, test_utils=checks, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rnn", "rnn_train", "rnn_backward"])
def test_opcheck_in_bfloat16(name):
    """What is kept for the backward is in float32 then; everything else in x's dtype."""
    arguments = next(a for n, c, a in sample_arguments(name != "rnn") if (n, c) == ("rnn", "lstm"))
    arguments = [in_dtype(argument, torch.bfloat16) for argument in arguments]
    if name == "rnn_backward":
        arguments = backward_arguments("rnn", arguments, grad=True)
    _opcheck(getattr(operators, name).default, arguments, test_utils=CHECKS[:3], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bfloat16"])
@pytest.mark.parametrize("base", ["rnn", "rnn_cell"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_opcheck_narrow(cell, base, int8):
    arguments = narrow_arguments(base, cell, int8)
    _opcheck(getattr(operators, base + "_narrow").default, arguments, test_utils=CHECKS, rtol=1e-4, atol=1e-4)


def test_every_operator_is_checked():
    elsewhere = {"rnn_narrow", "rnn_cell_narrow", "rnn_layer"}  # above, and test_rnn_layer.py
    assert {name for name, _ in OPCHECK_CASES} | elsewhere == set(NAMES)
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


small_rnn = functools.partial(rnn_arguments, dtype=torch.float64, hidden=2)
small_cell = functools.partial(cell_arguments, dtype=torch.float64, hidden=2)
SMALL_RNNS = {
    **{cell: {"cell": cell, "steps": 3} for cell in CELLS},
    **{f"{cell}, bidirectional": {"cell": cell, "directions": 2, "steps": 2} for cell in CELLS},
    "lstm, no bias": {"cell": "lstm", "steps": 2, "bias": False},
    **{
        f"{cell}, {given}": {"cell": cell, "steps": 3, "directions": 1 + (cell == "gru"), "given": given}
        for cell in ("lstm", "gru", "rnn_tanh")
        for given in ("packed", "lengths", "reset", "lengths and reset")
    },
    **{f"{cell}, no states": {"cell": cell, "steps": 2, "state": False} for cell in ("lstm", "gru")},
}
GRAD_CASES = {
    "conv_pool2d": ("conv_pool2d", lambda: shrunk_conv("default")),
    "conv_pool2d, everything": ("conv_pool2d", lambda: shrunk_conv("everything")),
    "conv_pool2d, no bias": ("conv_pool2d", lambda: shrunk_conv("default", bias=False)),
    **{
        f"conv_pool2d, {case}": ("conv_pool2d", functools.partial(shrunk_conv, case))
        for case in ("tanh", "gelu", "average", "average of silu", "average of elu")
    },
    **{
        f"rnn, {name}": ("rnn", functools.partial(small_rnn, **options))
        for name, options in SMALL_RNNS.items()
    },
    **{f"rnn_cell, {cell}": ("rnn_cell", functools.partial(small_cell, cell)) for cell in CELLS},
    "rnn_cell, lstm, no bias": ("rnn_cell", functools.partial(small_cell, "lstm", bias=False)),
    "rnn_cell, gru, no states": ("rnn_cell", functools.partial(small_cell, "gru", state=False)),
    "rnn_cell, lstm, no states": ("rnn_cell", functools.partial(small_cell, "lstm", state=False)),
}


@pytest.mark.pure
@pytest.mark.parametrize("case", GRAD_CASES)
def test_gradcheck(case):
    name, make = GRAD_CASES[case]
    arguments = make()
    function, tensors = run_flat(
        getattr(operators, name + "_train"), arguments, tensor_positions(arguments), GRADIENTS[name]
    )
    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("case", GRAD_CASES)
def test_gradgradcheck(case):
    """The second derivative, through the backward operator's own gradient."""
    name, make = GRAD_CASES[case]
    arguments = make()
    function, tensors = run_flat(
        getattr(operators, name + "_train"), arguments, tensor_positions(arguments), GRADIENTS[name]
    )
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", GRAD_CASES)
def test_backward_operator_has_the_gradient_of_its_formula(case):
    """gradcheck of NAME_backward itself, the saved tensors recomputed with the inputs they depend on."""
    name, make = GRAD_CASES[case]
    forward = make()
    arguments = backward_arguments(name, forward)
    count = GRADIENTS[name]

    def backward(*filled):
        inputs = filled[count : count + len(forward)]
        kept = getattr(operators, name + "_train")(*detached(inputs))
        if name == "conv_pool2d":
            return operators.conv_pool2d_backward(filled[0], *with_conv_saved(inputs, kept), *(True,) * 3)
        saved = [kept[i] for i in SAVED[name]]
        return getattr(operators, name + "_backward")(*filled[: count + len(forward)], *saved, *(True,) * 4)

    if name == "conv_pool2d":
        arguments = (*arguments[:1], *forward)
    positions = tensor_positions(arguments[: count + len(forward)])
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
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["rnn", "rnn_cell"])
def test_rnn_backward_computes_what_is_asked(name, cell, wanted):
    arguments = backward_arguments(name, rnn_arguments(cell, 2) if name == "rnn" else cell_arguments(cell))
    operator = getattr(operators, name + "_backward")
    full = operator(*arguments)
    partial = operator(*arguments[:-4], *[i == wanted for i in range(4)])
    groups = {0: [0], 1: [1, 2], 2: [3, 4], 3: [5, 6]}
    assert len(full) == 7
    for i in range(7):
        if i in groups[wanted]:
            torch.testing.assert_close(full[i], partial[i], rtol=0, atol=0)
        elif isinstance(partial[i], list):
            assert partial[i] == []
        else:
            assert list(partial[i].shape) == [0]


@pytest.mark.parametrize(
    "missing", [m for n in (1, 2, 3) for m in itertools.combinations(range(4), n)], ids=str
)
def test_missing_incoming_gradient_is_zero(missing):
    arguments = backward_arguments("rnn", rnn_arguments("lstm", 2))
    zeros = [torch.zeros_like(g) if i in missing else g for i, g in enumerate(arguments[:4])]
    absent = [None if i in missing else g for i, g in enumerate(arguments[:4])]
    full = operators.rnn_backward(*zeros, *arguments[4:])
    partial = operators.rnn_backward(*absent, *arguments[4:])
    for a, b in zip(full, partial, strict=True):
        torch.testing.assert_close(a, b)


# ---- the operators against the reference ----


@pytest.mark.parametrize("case", ["default", "everything"])
def test_code_names_the_winner(case):
    """code is the winner's place in its window, or 255: recomputed here from the map before the pool."""
    arguments = conv_arguments(case)
    x, weight, bias, stride, padding, dilation, groups, activation, _, size, step, pad, _ = arguments
    y, code, _ = operators.conv_pool2d_train(*arguments)
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


@pytest.mark.parametrize("cell", CELLS)
def test_reserve_holds_what_the_schema_says(cell):
    arguments = rnn_arguments(cell)
    _, x, h_0, c_0, (w_ih,), (w_hh,), (b_ih,), (b_hh,) = arguments[:8]
    output, h_n, c_n, cells, reserve = operators.rnn_train(*arguments)
    h, c = h_0[0], None if c_0 is None else c_0[0]
    for t in range(len(x)):
        from_x, from_h = x[t] @ w_ih.t() + b_ih, h @ w_hh.t() + b_hh
        expected = []
        if cell == "lstm":
            i, f, g, o = (from_x + from_h).chunk(4, -1)
            expected = [i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()]
            c = expected[1] * c + expected[0] * expected[2]
            h = expected[3] * c.tanh()
            torch.testing.assert_close(cells[t], c)
        elif cell == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n_part) = from_x.chunk(3, -1), from_h.chunk(3, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * h_n_part).tanh()
            expected = [r, z, n, h_n_part]
            h = (1 - z) * n + z * h
        else:
            h = (from_x + from_h).tanh() if cell == "rnn_tanh" else (from_x + from_h).relu()
        if expected:
            torch.testing.assert_close(reserve[0, t], torch.stack(expected, 1))
        torch.testing.assert_close(output[t], h)
    torch.testing.assert_close(h_n[0], h)
    if cell == "lstm":
        torch.testing.assert_close(c_n[0], c)
    else:
        assert [list(t.shape) for t in (c_n, cells)] == [[0], [0]]
        assert list(reserve.shape) == [1, 4, 2, 4 if cell == "gru" else 0, 5]


@pytest.mark.pure
def test_inference_operator_is_the_train_operators_output():
    for name, _, arguments in sample_arguments(False):
        inference = getattr(operators, name)(*arguments)
        training = getattr(operators, name + "_train")(*arguments)
        inference = inference if isinstance(inference, tuple) else (inference,)
        for a, b in zip(inference, training[: len(inference)], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["conv_pool2d", "rnn", "rnn_cell"])
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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ("conv_pool2d", "rnn", "rnn_cell")
        for dtype in (torch.bfloat16, torch.float16, torch.int32, torch.complex64)
        if dtype != torch.bfloat16 or name == "rnn_cell"
    ],
    ids=str,
)
def test_raw_operator_refuses_other_dtypes(name, dtype):
    """The compiled operators name what they do not take; functional composes for those."""
    if reason := compiled_missing():
        pytest.skip(f"no compiled kernels: {reason}")
    make = {"conv_pool2d": conv_arguments, "rnn": rnn_arguments, "rnn_cell": cell_arguments}[name]

    arguments = [in_dtype(a, dtype) for a in make()]
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
