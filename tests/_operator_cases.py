"""Arguments for every raw operator, and its backward."""

import torch
from _oracle import CELLS, GATES

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
