"""The oracle (torch.nn in float64), the rule of error, and the proof of which backend ran."""

import contextlib
import functools
import os
import struct

import torch

import cnnrnn_ext as cx
from cnnrnn_ext import _library

# Errors below so many units of the last place of the largest value are rounding, not ours or torch's.
# In float64 the oracle itself is of that precision: the floor stands for both.
ROUNDING = {torch.float32: 4, torch.float64: 256, torch.bfloat16: 1, torch.float16: 1}


# ---- which backend ran ----


def compiled_missing():
    """Why there are no compiled kernels in this install, or None."""
    library = _library.libraries()["cpu"]
    return None if library.loaded else library.reason


def expected_kernel():
    """The name a compiled call must leave in a trace, found without asking the code that writes it."""
    isa = os.environ.get("CNNRNN_CPU_ISA") or _library.build_module().best_isa()
    return f"cpu/{isa}"


@contextlib.contextmanager
def running_on(mode, *ops):
    """Runs the block on a backend, and fails unless exactly these operators ran, each on that backend."""
    with cx.backend(mode), cx.trace() as log:
        yield log
    ran = {(call.op, call.backend, call.kernel) for call in log}
    wanted = {(op, mode, expected_kernel() if mode == "compiled" else None) for op in ops}
    assert ran == wanted, f"ran {sorted(map(str, ran))}, expected {sorted(map(str, wanted))}"


# ---- the rule of error ----


def error(values, oracle):
    """(largest, root mean square) difference in float64; infinities and NaN must stand at the same places."""
    values, oracle = values.detach().double(), oracle.detach().double()
    assert values.shape == oracle.shape, f"shape {list(values.shape)}, expected {list(oracle.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(values.isnan(), oracle.isnan()), "NaN at other places"
    infinite = oracle.isinf()
    assert torch.equal(values[infinite], oracle[infinite]), "infinities differ"
    assert values[finite].isfinite().all(), "not finite where the oracle is"
    difference = (values[finite] - oracle[finite]).abs()
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.max().item(), difference.square().mean().sqrt().item()


def largest(tensors):
    """The largest finite magnitude in them, 0 if there is none."""
    finite = [t[t.isfinite()].abs() for t in tensors]
    return max((f.max().item() for f in finite if f.numel()), default=0.0)


def check_error(name, ours, stock, oracle, factor=2.0, scale=None):
    """Our error against the float64 oracle is at most twice that of torch's own kernel of this dtype.

    Args:
        scale: the magnitude whose rounding is the floor of the limit; by default the oracle's largest.
    """
    assert ours.dtype == stock.dtype, f"{name}: dtype {ours.dtype}, expected {stock.dtype}"
    scale = largest([oracle]) if scale is None else scale
    floor = ROUNDING[ours.dtype] * torch.finfo(ours.dtype).eps * scale
    try:
        pairs = zip(error(ours, oracle), error(stock, oracle), ("largest", "rms"), strict=True)
    except AssertionError as failure:
        raise AssertionError(f"{name}: {failure}") from None
    for our_error, stock_error, kind in pairs:
        limit = factor * stock_error + floor
        assert our_error <= limit, (
            f"{name}: {kind} error {our_error:.3e} of ours, {stock_error:.3e} of torch's (limit {limit:.3e})"
        )


def outputs_and_gradients(function, tensors, grad_outputs=None, wanted=None):
    """(outputs, gradients by name, grad_outputs) of ``function(**tensors) -> tensor or tuple of tensors``.

    Args:
        grad_outputs: one per output, None for an output that enters no loss; drawn at random if not given.
        wanted: names of the tensors that require a gradient; all of them by default.
    """
    wanted = list(tensors) if wanted is None else wanted
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format) for k, v in tensors.items()}
    for name in wanted:
        leaves[name].requires_grad_()
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if grad_outputs is None:
        grad_outputs = [torch.randn_like(y) for y in outputs]
    pairs = [
        (y, g.to(y.dtype)) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None and wanted
    ]
    if pairs:
        gradients = torch.autograd.grad(
            [y for y, _ in pairs], [leaves[k] for k in wanted], [g for _, g in pairs], allow_unused=True
        )
    else:
        gradients = [None] * len(wanted)
    return outputs, dict(zip(wanted, gradients, strict=True)), grad_outputs


def compare(ours, stock, tensors, mode, ops, *, wanted=None, grad_outputs=None, oracle=None, few=False):
    """Outputs and every gradient of ours by the rule of error; asserts the backend forward and backward.

    Args:
        ours, stock: functions of ``tensors`` by name, returning a tensor or a tuple of tensors.
        ops: the operators that must appear in the trace.
        oracle: stock in float64 where that is another function.
        few: a case of so few numbers that torch's error is one draw, and may be nought by chance: the floor
            of the limit is then the rounding of the largest value of the case.
    """
    # All three get the same gradients, rounded to this dtype: the kernels' error alone is compared.
    theirs, their_grads, drawn = outputs_and_gradients(stock, tensors, grad_outputs, wanted)
    exact, exact_grads, _ = outputs_and_gradients(
        oracle or stock, {k: v.double() for k, v in tensors.items()}, drawn, wanted
    )
    with running_on(mode, *ops):
        result, our_grads, _ = outputs_and_gradients(ours, tensors, drawn, wanted)
    assert len(result) == len(exact)
    scale = largest([*exact, *(g for g in exact_grads.values() if g is not None)]) if few else None
    for index, triple in enumerate(zip(result, theirs, exact, strict=True)):
        check_error(f"output {index}", *triple, scale=scale)
    for name, exact_grad in exact_grads.items():
        ours_grad, their_grad = our_grads[name], their_grads[name]
        assert (ours_grad is None) == (their_grad is None), f"grad of {name}: None on one side only"
        if exact_grad is not None:
            check_error(f"grad of {name}", ours_grad, their_grad, exact_grad, scale=scale)
    return result


def check_equal(ours, stock, tensors, mode, ops, *, wanted=None, grad_outputs=None):
    """As ``compare``, but to the last bit: for values that every order of summation computes exactly."""
    theirs, their_grads, drawn = outputs_and_gradients(stock, tensors, grad_outputs, wanted)
    with running_on(mode, *ops):
        result, our_grads, _ = outputs_and_gradients(ours, tensors, drawn, wanted)
    for index, (a, b) in enumerate(zip(result, theirs, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=index: f"output {i}: {m}"
        )
    for name, b in their_grads.items():
        torch.testing.assert_close(
            our_grads[name], b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"grad of {n}: {m}"
        )
    return result


# ---- stock twins and random operands ----


@contextlib.contextmanager
def torch_alone():
    """Within it torch computes by its own kernels: oneDNN's GELU for AVX-512 makes a NaN of inf.

    (pytorch/pytorch#185770; torch's own in float32, and float64, leave it inf. NNPACK, which would take
    oneDNN's convolutions over, does not keep whole numbers exact.)
    """
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        with torch.backends.nnpack.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = before


def stock_conv_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation="relu",
    pool="max",
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
):
    """conv_pool2d from torch.nn's modules, independent of cnnrnn_ext.reference."""
    activations = {
        "none": torch.nn.Identity(),
        "relu": torch.nn.ReLU(),
        "relu6": torch.nn.ReLU6(),
        "leaky_relu": torch.nn.LeakyReLU(),
        "tanh": torch.nn.Tanh(),
        "sigmoid": torch.nn.Sigmoid(),
        "gelu": torch.nn.GELU(),
        "silu": torch.nn.SiLU(),
        "elu": torch.nn.ELU(),
    }
    pools = {"max": torch.nn.MaxPool2d, "avg": torch.nn.AvgPool2d}
    y = torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = activations[activation](y)
    if pool == "none":
        return y
    return pools[pool](pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)(y)


def conv_pool2d_functions(**options):
    """(ours, stock)"""
    return (
        functools.partial(cx.functional.conv_pool2d, **options),
        functools.partial(stock_conv_pool2d, **options),
    )


# The NaN whose bits are all ones: added to as a whole number, it becomes 0.
NAN_OF_ONES = struct.unpack("f", b"\xff" * 4)[0]


def conv_tensors(n, c, h, w, k, kernel, groups=1, bias=True, dtype=torch.float32):
    """Random operands at torch's own initial scale."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    fan_in = c // groups * kernel[0] * kernel[1]
    tensors = {
        "input": torch.randn(n, c, h, w, dtype=dtype),
        "weight": torch.randn(k, c // groups, *kernel, dtype=dtype) / fan_in**0.5,
    }
    if bias:
        tensors["bias"] = torch.randn(k, dtype=dtype) * 0.5
    return tensors


def whole(tensors, low=-3, high=4):
    """The same shapes filled with small whole numbers: exact in any order of summation, and full of ties."""
    return {k: torch.randint(low, high, v.shape).to(v.dtype) for k, v in tensors.items()}


# ---- recurrent cells ----

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")  # as operators.schema names them
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
# The public function of a cell, which is its name in a trace.
FUNCTION = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn", "rnn_relu": "rnn"}
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def nonlinearity(cell):
    """The keyword argument that makes torch's Elman network this cell."""
    return {"nonlinearity": cell.removeprefix("rnn_")} if cell.startswith("rnn") else {}


def sequence_class(package, cell):
    """LSTM, GRU or RNN of ``torch.nn`` or of ``cnnrnn_ext``."""
    return getattr(package, FUNCTION[cell].upper())


def cell_class(package, cell):
    return getattr(package, FUNCTION[cell].upper() + "Cell")


def as_states(cell, h, c=None):
    """The states as torch's modules take them: a pair for an LSTM."""
    return (h, c) if cell == "lstm" else h


def flat(result):
    """(output, states) as a flat tuple of tensors."""
    output, states = result
    return (output, *states) if isinstance(states, tuple) else (output, states)


def rnn_names(num_layers=1, bidirectional=False, bias=True, proj_size=0):
    """Parameter names in torch's flat order."""
    kinds = [n for n in PARAMETERS if (bias or "bias" not in n) and (proj_size or n != "weight_hr")]
    suffixes = [
        f"_l{i}{r}" for i in range(num_layers) for r in (("", "_reverse") if bidirectional else ("",))
    ]
    return [kind + suffix for suffix in suffixes for kind in kinds]


def rnn_tensors(
    cell, t, n, i, h, num_layers=1, bidirectional=False, bias=True, proj_size=0, dtype=torch.float32
):
    """Random input, states and parameters, the latter at torch's own initial scale."""
    d, gates = 2 if bidirectional else 1, GATES[cell]
    state = proj_size or h
    tensors = {
        "input": torch.randn(t, n, i, dtype=dtype),
        "h_0": torch.randn(num_layers * d, n, state, dtype=dtype) * 0.5,
    }
    if cell == "lstm":
        tensors["c_0"] = torch.randn(num_layers * d, n, h, dtype=dtype)
    for name in rnn_names(num_layers, bidirectional, bias, proj_size):
        width = i if "_l0" in name else state * d
        shapes = {
            "weight_ih": (gates * h, width),
            "weight_hh": (gates * h, state),
            "weight_hr": (proj_size, h),
        }
        shape = shapes.get(name[:9], (gates * h,))
        tensors[name] = (torch.rand(shape, dtype=dtype) * 2 - 1) / h**0.5
    return tensors


def module_rnn(package, cell, options, lengths=None, enforce_sorted=False):
    """A function of tensors by name: the package's module under functional_call, packed if lengths."""

    def function(input, h_0, c_0=None, **weights):
        width, hidden = weights["weight_ih_l0"].shape[1], weights["weight_ih_l0"].shape[0] // GATES[cell]
        module = sequence_class(package, cell)(
            width, hidden, device="meta", dtype=input.dtype, **nonlinearity(cell), **options
        )
        if lengths is not None:
            first = options.get("batch_first", False)
            input = torch.nn.utils.rnn.pack_padded_sequence(input, lengths, first, enforce_sorted)
        output, states = torch.func.functional_call(module, weights, (input, as_states(cell, h_0, c_0)))
        return flat((output if lengths is None else output.data, states))

    return function


def stock_rnn(cell, **options):
    """torch's own kernel as a function of tensors by name."""
    return module_rnn(torch.nn, cell, options)


def functional_rnn(namespace, cell, **options):
    """The same through ``cnnrnn_ext.functional`` or its reference, parameters in torch's flat order."""
    options = dict(options)
    bias = options.pop("bias", True)

    def function(input, h_0, c_0=None, **weights):
        result = getattr(namespace, FUNCTION[cell])(
            input, as_states(cell, h_0, c_0), list(weights.values()), has_biases=bias,
            **nonlinearity(cell), **options,
        )  # fmt: skip
        return flat(result)

    return function


def our_rnn(cell, **options):
    return functional_rnn(cx.functional, cell, **options)
