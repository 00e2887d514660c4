"""Random convolutions and recurrent layers on the compiled kernels, against the reference."""

import os

import torch
from _oracle import (
    CELLS,
    FUNCTION,
    check_error,
    largest,
    our_rnn,
    outputs_and_gradients,
    rnn_tensors,
    running_on,
)
from conftest import require_compiled
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cnnrnn_ext as cx

# More of them on demand, and then others at each run: CNNRNN_EXAMPLES=20000 pytest tests/test_hypothesis.py
EXAMPLES = os.environ.get("CNNRNN_EXAMPLES")


def search(examples):
    """Settings of a search over so many cases, unless the environment asks for another number."""
    return settings(
        max_examples=int(EXAMPLES or examples),
        deadline=None,
        derandomize=EXAMPLES is None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )


def against_reference(function, tensors, ops, wanted):
    """The rule of error, with the float64 reference (itself tested against torch.nn) as the oracle.

    Where a gradient is one number, torch's error is one draw and may be nought by chance: the floor is the
    rounding of the largest value of the case.
    """
    with cx.backend("reference"):
        theirs, their_grads, grads = outputs_and_gradients(function, tensors, wanted=wanted)
        exact, exact_grads, _ = outputs_and_gradients(
            function, {k: v.double() for k, v in tensors.items()}, grads, wanted
        )
    with running_on("compiled", *ops):
        ours, our_grads, _ = outputs_and_gradients(function, tensors, grads, wanted)
    scale = largest([*exact, *exact_grads.values()])
    for index, triple in enumerate(zip(ours, theirs, exact, strict=True)):
        check_error(f"output {index}", *triple, scale=scale)
    for name in wanted:
        check_error(f"grad of {name}", our_grads[name], their_grads[name], exact_grads[name], scale=scale)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


LAYOUTS = {
    "NCHW": lambda x: x,
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column of more": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
}


@st.composite
def kernels_and_sizes(draw):
    """(groups, channels, outputs, kernel, stride, dilation, padding, size), some for Winograd's kernels, some
    for those on tile registers."""
    if draw(st.integers(0, 2)) == 0:
        ones = (1, 1)
        return (1, draw(st.integers(8, 20)), draw(st.integers(4, 20)), (3, 3), ones, ones,
                draw(pairs(0, 3)), draw(pairs(1, 17)))  # fmt: skip
    if draw(st.integers(0, 4)) == 0:
        return (1, draw(st.integers(32, 70)), draw(st.integers(4, 40)), draw(pairs(1, 5)), draw(pairs(1, 2)),
                draw(pairs(1, 2)), draw(pairs(0, 3)), draw(pairs(1, 17)))  # fmt: skip
    groups = draw(st.integers(1, 3))
    channels, outputs = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 9))
    kernel, stride, dilation = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(1, 2))
    size = draw(st.one_of(pairs(1, 24), st.tuples(st.integers(1, 6), st.integers(100, 400))))
    return groups, channels, outputs, kernel, stride, dilation, draw(pairs(0, 3)), size


@st.composite
def convolutions(draw):
    groups, channels, outputs, kernel, stride, dilation, padding, size = draw(kernels_and_sizes())
    pool = draw(st.sampled_from(["max", "max", "avg", "none"]))
    pool_size, pool_stride = draw(st.one_of(st.just(((2, 2), (2, 2))), st.tuples(pairs(1, 4), pairs(1, 4))))
    pool_padding = tuple(draw(st.integers(0, size // 2)) for size in pool_size)
    conv = [(size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in (0, 1)]
    assume(min(conv) >= 1)
    if pool != "none":
        assume(all(c + 2 * p >= w for c, p, w in zip(conv, pool_padding, pool_size, strict=True)))
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": draw(st.sampled_from(list(cx.reference.ACTIVATIONS))),
        "pool": pool,
        "pool_size": pool_size,
        "pool_stride": pool_stride,
        "pool_padding": pool_padding,
        "ceil_mode": draw(st.booleans()),
    }
    shapes = {
        "input": (draw(st.integers(0, 3)), channels, *size),
        "weight": (outputs, channels // groups, *kernel),
    }
    if draw(st.booleans()):
        shapes["bias"] = (outputs,)
    wanted = draw(st.sets(st.sampled_from(list(shapes)))) if draw(st.booleans()) else set(shapes)
    dtype = draw(
        st.sampled_from([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16])
    )
    return options, shapes, dtype, draw(st.sampled_from(list(LAYOUTS))), wanted, draw(st.integers(0, 2**31))


@search(500)
@given(convolutions())
def test_conv_pool2d(case):
    """Values in eighths: exact before the pool in both dtypes, so that rounding decides no winner.

    What has no kernel composes, and then gives what the reference gives, and a reason.
    """
    require_compiled()
    options, shapes, dtype, layout, wanted, seed = case
    torch.manual_seed(seed)
    tensors = {k: torch.randint(-24, 25, shape).to(dtype) / 8 for k, shape in shapes.items()}
    tensors["input"] = LAYOUTS[layout](tensors["input"])

    def function(**operands):
        return cx.functional.conv_pool2d(**operands, **options)

    with cx.trace() as log:  # there may be kernels for values, and none for gradients
        y = function(**{k: v.detach().requires_grad_(k in wanted) for k, v in tensors.items()})
    if log[0].backend == "compiled":
        against_reference(function, tensors, ["conv_pool2d"], [k for k in shapes if k in wanted])
    else:
        assert log[0].reason
        assert torch.equal(y, cx.reference.conv_pool2d(**tensors, **options))


@search(150)
@given(
    st.sampled_from(CELLS),
    st.fixed_dictionaries(
        {
            "t": st.integers(1, 9),
            "n": st.integers(0, 20),
            "i": st.integers(1, 40),
            "h": st.integers(1, 40),
        }
    ),
    st.fixed_dictionaries(
        {"num_layers": st.integers(1, 3), "bidirectional": st.booleans(), "bias": st.booleans()}
    ),
    st.sampled_from(["", "lengths", "reset", "lengths and reset"]),
    st.integers(0, 2**31),
)
def test_rnn(cell, shape, options, given, seed):
    require_compiled()
    torch.manual_seed(seed)
    tensors = rnn_tensors(cell, **shape, **options)
    steps = {}
    if "lengths" in given:
        steps["lengths"] = torch.randint(shape["t"] + 1, (shape["n"],))
    if "reset" in given:
        steps["reset"] = torch.rand(shape["t"], shape["n"]) < 0.3
    against_reference(our_rnn(cell, **options, **steps), tensors, [FUNCTION[cell]], list(tensors))
