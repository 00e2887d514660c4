"""What the CUDA operators must compute, for test_cuda_emulation.py (on the CPU) and test_cuda_gpu.py.

``ops`` is ``torch.ops.cnnrnn_emulated`` with device "cpu", or ``torch.ops.cnnrnn_ext`` with "cuda". The
oracle is plain PyTorch in float64 on the CPU, with autograd.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cnnrnn_ext import reference
from cnnrnn_ext._operator_conv_pool import winner_index

ALL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Conv:
    """One conv_pool2d: x [N, C, H, W], K output channels, and the operator's arguments."""

    x: tuple
    k: int
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    activation: str = "relu"
    kind: str = "max"  # or "avg"
    pool: tuple = (2, 2)
    pool_stride: tuple = (2, 2)
    pool_padding: tuple = (0, 0)
    ceil_mode: bool = False
    bias: bool = True
    channels_last: bool = False

    @property
    def arguments(self):
        return (
            list(self.stride), list(self.padding), list(self.dilation), self.groups,
            self.activation, self.kind,
            list(self.pool), list(self.pool_stride), list(self.pool_padding), self.ceil_mode,
        )  # fmt: skip

    def draw(self, draw):
        """(x, weight, bias or None, grad_y), float64."""
        x = draw(self.x)
        weight, bias = draw((self.k, self.x[1] // self.groups, *self.kernel)), draw((self.k,))
        y = self.oracle(x, weight, bias)
        return x, weight, bias if self.bias else None, draw(y.shape)

    def oracle(self, x, weight, bias):
        y = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        y = reference.ACTIVATIONS[self.activation](y)
        if self.kind == "avg":
            return F.avg_pool2d(y, self.pool, self.pool_stride, self.pool_padding, self.ceil_mode)
        return F.max_pool2d(y, self.pool, self.pool_stride, self.pool_padding, ceil_mode=self.ceil_mode)

    def kept_for_backward(self, y, kept):
        """What autograd passes on: operators.schema."""
        if kept.numel() > 0:
            return kept
        return None if self.activation == "none" or (self.activation, self.kind) == ("relu", "max") else y


# The first five take the 3x3 kernel (its three tile shapes), the others the general one.
CONVS = {
    "odd": Conv((2, 5, 15, 17), 9),
    "wide": Conv((1, 2, 6, 66), 3, padding=(0, 0), activation="none", channels_last=True),
    "tall": Conv((2, 1, 66, 7), 8, bias=False),
    "square_grouped": Conv((1, 6, 30, 28), 4, groups=2),
    "many_windows": Conv((3, 2, 40, 41), 2),  # more than one slice of the weight gradient's sum
    "ceil": Conv((2, 3, 8, 9), 5, padding=(0, 0), ceil_mode=True),
    "overlapping_pool": Conv((2, 3, 11, 10), 6, pool=(3, 3), pool_padding=(1, 1), channels_last=True),
    "rectangles": Conv((1, 4, 9, 13), 3, (2, 5), (1, 2), (0, 2), pool=(1, 3), pool_stride=(1, 2)),
    "dilated_grouped": Conv((2, 4, 12, 11), 6, (3, 3), (2, 1), (2, 3), (2, 3), groups=2, bias=False),
    "one_by_one": Conv((3, 2, 5, 5), 2, (1, 1), padding=(0, 0), activation="none", pool=(5, 5)),
    "two_rows": Conv((2, 3, 12, 13), 5, pool=(2, 1), pool_stride=(2, 1), ceil_mode=True),
    "two_columns": Conv((2, 3, 9, 15), 9, pool=(1, 2), pool_stride=(1, 2), channels_last=True),
    "no_pool": Conv((2, 3, 7, 11), 9, pool=(1, 1), pool_stride=(1, 1), activation="relu6"),
    "no_pool_strided": Conv((2, 3, 9, 11), 5, (5, 5), (2, 2), pool=(1, 1), pool_stride=(1, 1)),
    "relu6": Conv((2, 6, 9, 12), 5, activation="relu6"),
    "average": Conv((2, 3, 9, 12), 5, kind="avg"),
    "average_relu6": Conv((2, 6, 13, 8), 5, kind="avg", activation="relu6", channels_last=True),
    "average_gaps": Conv((2, 1, 15, 16), 3, kind="avg", activation="none", pool=(2, 1), pool_stride=(3, 2)),
}


def small_integers(shape):
    """-1, 0, 1: every sum is exact in every dtype, and ties are frequent."""
    return torch.randint(-1, 2, tuple(shape)).double()


def normal(shape):
    return torch.randn(tuple(shape), dtype=torch.float64)


def gradients(output, grad_output, inputs):
    return torch.autograd.grad(output, inputs, grad_output, allow_unused=True)


def run_conv(ops, device, case, dtype, x, weight, bias, grad_y):
    """The operators' (y, code, grad_x, grad_weight, grad_bias)."""
    x, weight, grad_y = (t.to(device, dtype) for t in (x, weight, grad_y))
    bias = None if bias is None else bias.to(device, dtype)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last)
    y, code, kept = ops.conv_pool2d_train(x, weight, bias, *case.arguments)
    assert y.stride() == torch.empty_like(y, memory_format=_layout(x)).stride()
    inference = ops.conv_pool2d(x, weight, bias, *case.arguments)
    torch.testing.assert_close(inference, y, rtol=0, atol=0, equal_nan=True)
    need_bias = bias is not None
    grads = ops.conv_pool2d_backward(
        grad_y, x, weight, bias, code, case.kept_for_backward(y, kept), *case.arguments, True, True, need_bias
    )
    return y, code, *grads


def _layout(x):
    nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def check_conv_exact(ops, device, case, dtype):
    """On small integers every result is the oracle's, rounded once to dtype: ties fall as torch's do."""
    x, weight, bias, grad_y = case.draw(small_integers)
    results = run_conv(ops, device, case, dtype, x, weight, bias, grad_y)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    y = case.oracle(x, weight, bias)
    expected = (y, *gradients(y, grad_y, leaves))
    for got, want in zip((results[0], *results[2 : 2 + len(leaves)]), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want.detach().to(dtype), rtol=0, atol=0)


# Each way that the direct kernels take, and the average pools.
ACTIVATED = {
    "blocks": Conv((2, 3, 9, 12), 9),
    "blocks_ceil": Conv((1, 3, 8, 9), 3, padding=(0, 0), ceil_mode=True, channels_last=True),
    "two_columns": Conv((1, 2, 8, 9), 3, pool=(1, 2), pool_stride=(1, 2)),
    "no_pool": Conv((1, 2, 8, 9), 3, pool=(1, 1), pool_stride=(1, 1)),
    "overlapping_pool": Conv((2, 3, 11, 10), 6, pool=(3, 3), pool_padding=(1, 1), ceil_mode=True),
    "average": Conv((2, 3, 9, 8), 5, kind="avg", channels_last=True),
    "average_ceil": Conv(
        (2, 2, 9, 10), 3, kind="avg", pool=(3, 2), pool_stride=(2, 3), pool_padding=(1, 1), ceil_mode=True
    ),
}
ACTIVATIONS = [name for name in reference.ACTIVATIONS if name not in ("none", "relu")]


def check_conv_activation(ops, device, case, dtype):
    """Operands whose convolution is exact, so that rounding decides no window; the error is torch's.

    Where float32 is rounded to dtype before the pool, as torch does and we do not, two values may tie for
    torch alone: gradients are compared in float32 and float64 only.
    """
    x, weight, bias, grad_y = case.draw(lambda shape: small_integers(shape) / 2)
    got = run_conv(ops, device, case, dtype, x, weight, bias, grad_y)

    def differentiated(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = case.oracle(*leaves)
        return [y, *gradients(y, grad_y.to(dtype), leaves)]

    count = 4 if dtype in (torch.float32, torch.float64) else 1
    got = [got[0], *got[2:]][:count]
    assert_as_good(got, differentiated(dtype)[:count], differentiated(torch.float64)[:count], 4)


def check_conv_indices(ops, device, case, dtype=torch.float32):
    """The codes name F.max_pool2d's winners, also where an activation is flat or rises to the left."""
    x, weight, bias, _ = (t.to(dtype) for t in case.draw(lambda shape: 6 * small_integers(shape)))
    conv = F.conv2d(x, weight, bias, case.stride, case.padding, case.dilation, case.groups)
    pool = case.pool, case.pool_stride, case.pool_padding
    want = F.max_pool2d(
        reference.ACTIVATIONS[case.activation](conv), *pool, ceil_mode=case.ceil_mode, return_indices=True
    )[1]
    _, code, _ = ops.conv_pool2d_train(*(t.to(device) for t in (x, weight, bias)), *case.arguments)
    assert torch.equal(winner_index(code.cpu(), conv.shape[3], *pool), want)


def check_conv_nan(ops, device, case):
    """NaN wins a window, the last one of several, and keeps its gradient through relu; inf as any number.

    Only where a gradient is exactly zero we differ: torch's dense product gives 0 * NaN = NaN in grad_weight,
    ours leaves the position out. So grad_weight is not compared.
    """
    x, weight, bias, grad_y = case.draw(small_integers)
    x[0, 0, 3, 4] = x[0, 0, 3, 6] = float("nan")
    x[1, 1, 7, 2] = float("inf")
    y, _, grad_x, _, grad_bias = run_conv(ops, device, case, torch.float32, x, weight, bias, grad_y)
    oracle = case.oracle(x.requires_grad_(), weight, bias.requires_grad_())
    assert oracle.isnan().any()
    assert not oracle.isnan().all()
    expected = (oracle.detach(), *gradients(oracle, grad_y, (x, bias)))
    for got, want in zip((y, grad_x, grad_bias), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want.float(), rtol=0, atol=0, equal_nan=True)


def error(got, want):
    return (got.detach().cpu().double() - want.detach().double()).abs().max().item()


def assert_as_good(got, torchs, want, units=1):
    """The error of ours is at most twice torch's own in that dtype, and some units in the last place.

    In float64 the oracle is no better than either: 1e-13 of the largest value.
    """
    for ours, theirs, oracle in zip(got, torchs, want, strict=True):
        assert ours.shape == oracle.shape
        unit = max(torch.finfo(theirs.dtype).eps, 1e-13) * max(1.0, oracle.abs().max().item())
        assert error(ours, oracle) <= 2 * error(theirs, oracle) + units * unit


@dataclass(frozen=True)
class Lstm:
    """x [T, N, I], H units, D directions."""

    t: int
    n: int
    i: int
    h: int
    d: int = 1
    bias: bool = True

    def draw(self, draw=normal):
        """(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh), the last four lists; float64."""
        weights = [
            [draw(shape) / self.h**0.5 for _ in range(self.d if self.bias or len(shape) == 2 else 0)]
            for shape in ((4 * self.h, self.i), (4 * self.h, self.h), (4 * self.h,), (4 * self.h,))
        ]
        states = [draw((self.d, self.n, self.h)) for _ in range(2)]
        return draw((self.t, self.n, self.i)), *states, *weights


def lstm_oracle(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):
    """(output, h_n, c_n, cells) step by step."""
    h_n, c_n, made = [], [], {}
    for d in range(len(weight_hh)):
        h, c = h_0[d], c_0[d]
        steps = range(x.shape[0]) if d == 0 else reversed(range(x.shape[0]))
        for t in steps:
            gates = F.linear(x[t], weight_ih[d], bias_ih[d] if bias_ih else None)
            gates = gates + F.linear(h, weight_hh[d], bias_hh[d] if bias_hh else None)
            i, f, g, o = gates.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            made[d, t] = h, c
        h_n.append(h)
        c_n.append(c)

    def every_step(which):
        halves = [torch.stack([made[d, t][which] for t in range(len(x))]) for d in range(len(weight_hh))]
        return torch.cat(halves, -1)

    return every_step(0), torch.stack(h_n), torch.stack(c_n), every_step(1)


# About 100 units fit one block, about 300 a cluster; beyond, and without clusters, a launch a step.
LSTMS = {
    "tiny": Lstm(1, 1, 1, 1),
    "odd": Lstm(3, 5, 4, 7, d=2),
    "no_bias": Lstm(4, 3, 2, 33, bias=False),
    "h100": Lstm(2, 2, 3, 100),
    "few_rows": Lstm(3, 2, 3, 130, d=2),
    "many_rows": Lstm(2, 18, 2, 145),
    "h330": Lstm(2, 2, 2, 330),
}


def _convert(arguments, device, dtype):
    def one(value):
        return [one(v) for v in value] if isinstance(value, list) else value.to(device, dtype)

    return [one(argument) for argument in arguments]


def _flat(arguments):
    return [t for argument in arguments for t in (argument if isinstance(argument, list) else [argument])]


def _differentiated(function, arguments, outer):
    leaves = [t.detach().requires_grad_() for t in _flat(arguments)]
    flat = iter(leaves)
    nested = [[next(flat) for _ in a] if isinstance(a, list) else next(flat) for a in arguments]
    results = function(*nested)
    return [*results, *gradients(results, outer, leaves)]


WHOLE = (None, None, None)  # whole sequences: no batch_sizes, lengths, reset
ALL = (True, True, True, True)


def lstm_train(ops, operands):
    """((output, h_n, c_n, cells), reserve), inference being the same to the last bit."""
    *results, reserve = ops.rnn_train("lstm", *operands, *WHOLE)
    for train, inference in zip(results[:3], ops.rnn("lstm", *operands, *WHOLE), strict=True):
        torch.testing.assert_close(inference, train, rtol=0, atol=0)
    return results, reserve


def lstm_backward(ops, outer, operands, results, reserve, need=ALL):
    """``outer``: the gradients of ``results``, each may be None."""
    output, _, _, cells = results
    return ops.rnn_backward(*outer, "lstm", *operands, *WHOLE, output, cells, reserve, *need)


def lstm_train_and_backward(ops, operands):
    """Everything the training operators return, flat."""
    results, reserve = lstm_train(ops, operands)
    return [*results, *_flat(lstm_backward(ops, results, operands, results, reserve))]


def assert_apart(grad_bias_ih, grad_bias_hh):
    """The two biases of an LSTM have the same gradient, each in its own memory."""
    for a, b in zip(grad_bias_ih, grad_bias_hh, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def check_lstm(ops, device, case, dtype):
    arguments = case.draw()
    outer = [normal(t.shape) for t in lstm_oracle(*arguments)]
    want = _differentiated(lstm_oracle, arguments, outer)
    theirs = _differentiated(lstm_oracle, _convert(arguments, "cpu", dtype), [g.to(dtype) for g in outer])
    operands = _convert(arguments, device, dtype)
    results, reserve = lstm_train(ops, operands)
    assert reserve.shape == (case.d, case.t, case.n, 4, case.h)
    grads = lstm_backward(ops, _convert(outer, device, dtype), operands, results, reserve)
    assert_apart(*grads[5:])
    assert_as_good([*results, *_flat(grads)], theirs, want)


def check_lstm_parts(ops, device, case, dtype=torch.float64):
    """Gradients that are missing count as zero; gradients not asked for are empty."""
    operands = _convert(case.draw(), device, dtype)
    results, reserve = lstm_train(ops, operands)
    for given in range(4):
        outer = [torch.ones_like(t) if i == given else None for i, t in enumerate(results)]
        full = [torch.zeros_like(t) if g is None else g for g, t in zip(outer, results, strict=True)]
        got = lstm_backward(ops, outer, operands, results, reserve, (True, True, False, False))
        want = lstm_backward(ops, full, operands, results, reserve)
        for ours, theirs in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert got[3:] == ([], [], [], [])
    got = lstm_backward(ops, results, operands, results, reserve, (False, False, True, False))
    assert [t.shape for t in got[:3]] == [(0,)] * 3
    assert len(got[3]) == len(got[4]) == case.d
    assert got[5:] == ([], [])


def check_lstm_without_states(ops, device, case, dtype=torch.float32):
    """A state that is not given is zero, in the results and in every gradient."""
    x, *states_and_weights = _convert(case.draw(), device, dtype)
    states, weights = states_and_weights[:2], states_and_weights[2:]
    for given in ((), (0,), (1,)):
        absent = [s if i in given else None for i, s in enumerate(states)]
        zeros = [s if i in given else torch.zeros_like(s) for i, s in enumerate(states)]
        got = lstm_train_and_backward(ops, (x, *absent, *weights))
        want = lstm_train_and_backward(ops, (x, *zeros, *weights))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


def cell_oracle(x, h, c, weight_ih, weight_hh, *biases):
    bias_ih, bias_hh = biases or (None, None)
    output, _, c_1, _ = lstm_oracle(
        x[None], h[None], c[None], [weight_ih], [weight_hh],
        [bias_ih] if biases else [], [bias_hh] if biases else [],
    )  # fmt: skip
    return output[0], c_1[0]


def lstm_cell_train_and_backward(ops, outer, operands):
    """(h_1, c_1, gradients), inference being the same to the last bit."""
    h_1, c_1, reserve = ops.rnn_cell_train("lstm", *operands)
    assert reserve.shape == (h_1.shape[0], 4, h_1.shape[1])
    for train, inference in zip((h_1, c_1), ops.rnn_cell("lstm", *operands), strict=True):
        torch.testing.assert_close(inference, train, rtol=0, atol=0)
    return h_1, c_1, *ops.rnn_cell_backward(*outer, "lstm", *operands, h_1, c_1, reserve, *ALL)


def check_lstm_cell(ops, device, case, dtype):
    drawn = case.draw()
    arguments = [drawn[0][0], drawn[1][0], drawn[2][0], *(w[0] for w in drawn[3:] if w)]
    outer = [normal(t.shape) for t in cell_oracle(*arguments)]
    want = _differentiated(cell_oracle, arguments, outer)
    theirs = _differentiated(cell_oracle, _convert(arguments, "cpu", dtype), [g.to(dtype) for g in outer])
    operands = _convert(arguments, device, dtype) + ([] if case.bias else [None, None])
    outer = _convert(outer, device, dtype)
    got = lstm_cell_train_and_backward(ops, outer, operands)
    if case.bias:
        assert_apart(got[7:8], got[8:])
    else:
        assert [t.shape for t in got[7:]] == [(0,)] * 2
    assert_as_good(got if case.bias else got[:7], theirs, want)

    x, h, c, *weights = operands
    for absent, zeros in (((None, c), (0 * h, c)), ((h, None), (h, 0 * c)), ((None, None), (0 * h, 0 * c))):
        got = lstm_cell_train_and_backward(ops, outer, (x, *absent, *weights))
        want = lstm_cell_train_and_backward(ops, outer, (x, *zeros, *weights))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)
