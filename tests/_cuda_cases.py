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


# Several chunks of channels, tiles of channels and tiles of the map; channels in no whole units of 16 bytes.
TENSOR_CONVS = {
    "chunks": Conv((1, 70, 9, 11), 40, padding=(1, 1)),
    "chunks_nhwc": Conv((2, 72, 6, 7), 24, padding=(0, 0), channels_last=True, ceil_mode=True),
    "tiles": Conv((1, 5, 18, 68), 33, padding=(2, 2), bias=False),
    "tiles_nhwc": Conv((1, 8, 38, 12), 80, channels_last=True),
    "two_rows": Conv((1, 8, 20, 9), 16, pool=(2, 1), pool_stride=(2, 1), channels_last=True, ceil_mode=True),
    "two_columns": Conv((2, 9, 5, 13), 70, pool=(1, 2), pool_stride=(1, 2)),
    "no_pool": Conv((2, 6, 7, 9), 20, pool=(1, 1), pool_stride=(1, 1), activation="none"),
    "average": Conv((1, 8, 8, 9), 8, kind="avg", activation="relu6", channels_last=True),
    "one_channel": Conv((2, 1, 17, 35), 33),
    "two_channels": Conv((1, 2, 12, 13), 40, padding=(0, 2), channels_last=True),
    "three_channels": Conv((1, 3, 20, 9), 8, pool=(2, 1), pool_stride=(2, 1), bias=False),
    "four_channels": Conv((2, 4, 6, 9), 9, pool=(1, 2), pool_stride=(1, 2), ceil_mode=True),
}


# What the tensor cores multiply beyond 3x3 of stride 1 with windows of 2x2 blocks: gathered row by row.
GATHERED_CONVS = {
    "one_by_one": Conv((2, 40, 6, 7), 36, (1, 1), padding=(0, 0), channels_last=True),
    "one_by_one_strided": Conv((1, 9, 9, 8), 12, (1, 1), (2, 2), (0, 0), pool=(1, 1), pool_stride=(1, 1)),
    "five_strided": Conv((2, 9, 17, 14), 20, (5, 5), (2, 2), (2, 2)),
    "five_nhwc": Conv((1, 72, 9, 8), 8, (5, 5), padding=(2, 2), channels_last=True, ceil_mode=True),
    "stem": Conv((2, 3, 37, 30), 40, (7, 7), (2, 2), (3, 3), pool=(3, 3), pool_padding=(1, 1)),
    "stem_nhwc": Conv(
        (1, 4, 23, 25), 12, (7, 7), (2, 2), (3, 3), pool=(3, 3), pool_padding=(1, 1), channels_last=True
    ),
    "even_kernel": Conv((1, 2, 12, 13), 9, (2, 4), padding=(1, 2), pool=(2, 1), pool_stride=(2, 1)),
    "dilated": Conv((1, 12, 14, 13), 10, dilation=(2, 3), padding=(2, 3), stride=(1, 2)),
    "overlapping": Conv((2, 9, 11, 12), 16, pool=(3, 3), pool_padding=(1, 1), channels_last=True),
    "threes": Conv((1, 6, 20, 19), 33, pool=(3, 3), pool_stride=(3, 3), ceil_mode=True, activation="none"),
    "slid_by_one": Conv((1, 3, 9, 10), 7, (5, 5), pool=(2, 2), pool_stride=(1, 1), bias=False),
    "gaps": Conv((1, 5, 16, 15), 8, pool=(2, 3), pool_stride=(3, 4)),
    "large_windows": Conv((1, 8, 40, 35), 4, padding=(1, 1), pool=(15, 17), pool_stride=(9, 8)),
    "groups": Conv((1, 24, 9, 8), 18, (3, 3), groups=3, channels_last=True),
    "odd_groups": Conv((2, 10, 8, 9), 6, (3, 3), (2, 1), groups=2),
    "few_groups": Conv((1, 6, 9, 10), 8, (5, 5), padding=(2, 2), groups=2, pool=(3, 3), pool_stride=(2, 2)),
    "sequences": Conv((3, 9, 1, 40), 20, (1, 5), padding=(0, 2), pool=(1, 2), pool_stride=(1, 2)),
    "long_kernel": Conv((2, 1, 1, 300), 18, (1, 51), (1, 10), (0, 0), pool=(1, 3), pool_stride=(1, 3)),
    "sequences_nhwc": Conv(
        (2, 40, 1, 33), 34, (1, 3), padding=(0, 1), pool=(1, 1), pool_stride=(1, 1), channels_last=True
    ),
    "average": Conv((1, 9, 10, 9), 8, (5, 5), padding=(2, 2), kind="avg", activation="relu6"),
    "no_reach": Conv((1, 5, 9, 10), 6, (2, 2), (4, 3), (0, 0), pool=(1, 1), pool_stride=(1, 1)),
    "many_columns": Conv((1, 70, 7, 6), 70, (3, 3), groups=1, pool=(3, 2), pool_stride=(2, 2)),
}


def small_integers(shape):
    """-1, 0, 1: every sum is exact in every dtype, and ties are frequent."""
    return torch.randint(-1, 2, tuple(shape)).double()


def normal(shape):
    return torch.randn(tuple(shape), dtype=torch.float64)


def gradients(output, grad_output, inputs):
    return torch.autograd.grad(output, inputs, grad_output, allow_unused=True)


def run_conv(ops, device, case, dtype, x, weight, bias, grad_y, precision="highest", check=True):
    """The operators' (y, code, grad_x, grad_weight, grad_bias).

    check: also that inference gives the same, and the layout; that waits for the device.
    """
    x, weight, grad_y = (t.to(device, dtype) for t in (x, weight, grad_y))
    bias = None if bias is None else bias.to(device, dtype)
    if case.channels_last:
        x = x.to(memory_format=torch.channels_last)
    y, code, kept = ops.conv_pool2d_train(x, weight, bias, *case.arguments, precision)
    if check:
        assert y.stride() == torch.empty_like(y, memory_format=_layout(x)).stride()
        inference = ops.conv_pool2d(x, weight, bias, *case.arguments, precision)
        torch.testing.assert_close(inference, y, rtol=0, atol=0, equal_nan=True)
    need = True, True, bias is not None
    grads = ops.conv_pool2d_backward(
        grad_y, x, weight, bias, code, case.kept_for_backward(y, kept), *case.arguments, *need, precision
    )
    return y, code, *grads


def _layout(x):
    nhwc = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def check_conv_exact(ops, device, case, dtype, precision="highest"):
    """On small integers every result is the oracle's, rounded once to dtype: ties fall as torch's do."""
    x, weight, bias, grad_y = case.draw(small_integers)
    results = run_conv(ops, device, case, dtype, x, weight, bias, grad_y, precision)
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


def check_conv_activation(ops, device, case, dtype, precision="highest"):
    """Operands whose convolution is exact, so that rounding decides no window; the error is torch's.

    Where float32 is rounded to dtype before the pool, as torch does and we do not, two values may tie for
    torch alone: gradients are compared in float32 and float64 only.
    """
    x, weight, bias, grad_y = case.draw(lambda shape: small_integers(shape) / 2)
    got = run_conv(ops, device, case, dtype, x, weight, bias, grad_y, precision)

    def differentiated(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = case.oracle(*leaves)
        return [y, *gradients(y, grad_y.to(dtype), leaves)]

    count = 4 if dtype in (torch.float32, torch.float64) else 1
    got = [got[0], *got[2:]][:count]
    theirs, want = differentiated(dtype)[:count], differentiated(torch.float64)[:count]
    assert_as_good(got[:1], theirs[:1], want[:1], 4)
    # An activation's derivative is rounded to TF32's 10 bits of mantissa.
    assert_as_good(got[1:], theirs[1:], want[1:], 4 * (2**13 if precision == "high" else 1))


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


def check_conv_nan(ops, device, case, dtype=torch.float32):
    """NaN wins a window, the last one of several, and keeps its gradient through relu; inf as any number.

    Only where a gradient is exactly zero we differ: torch's dense product gives 0 * NaN = NaN in grad_weight,
    ours leaves the position out. So grad_weight is not compared.
    """
    x, weight, bias, grad_y = case.draw(small_integers)
    x[0, 0, 3, 4] = x[0, 0, 3, 6] = float("nan")
    x[1, -1, 7, 2] = float("inf")
    y, _, grad_x, _, grad_bias = run_conv(ops, device, case, dtype, x, weight, bias, grad_y)
    oracle = case.oracle(x.requires_grad_(), weight, bias.requires_grad_())
    assert oracle.isnan().any()
    assert not oracle.isnan().all()
    expected = (oracle.detach(), *gradients(oracle, grad_y, (x, bias)))
    for got, want in zip((y, grad_x, grad_bias), expected, strict=True):
        torch.testing.assert_close(got.cpu(), want.to(dtype), rtol=0, atol=0, equal_nan=True)


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


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
KEPT = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
STATES = {"lstm": 2, "gru": 1, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Rnn:
    """x [T, N, I], or packed; H units, D directions.

    rows: "whole", "lengths" (0 to T, in no order), "reset", "lengths, reset", "packed" or
    "packed, reset".
    """

    t: int
    n: int
    i: int
    h: int
    d: int = 1
    bias: bool = True
    rows: str = "whole"

    def draw(self, cell, draw=normal):
        """(x, h_0, c_0 or None, weight_ih, weight_hh, bias_ih, bias_hh), the last four lists; float64."""
        high = GATES[cell] * self.h

        def weight(shape):
            if draw is small_integers and shape == (high, self.h):  # one entry a row: h stays small
                return F.one_hot(torch.randint(self.h, (high,)), self.h) * draw((high, 1))
            return draw(shape) / (1 if draw is small_integers else self.h**0.5)

        weights = [
            [weight(shape) for _ in range(self.d if self.bias or len(shape) == 2 else 0)]
            for shape in ((high, self.i), (high, self.h), (high,), (high,))
        ]
        h_0, c_0 = (draw((self.d, self.n, self.h)) for _ in range(2))
        x = draw((self.t, self.n, self.i))
        if "packed" in self.rows:
            x = draw((sum(self.batch_sizes()), self.i))
        return x, h_0, c_0 if STATES[cell] == 2 else None, *weights

    def lengths(self):
        """[N]: for T = 4 the steps 4, 2, 0, 3, 1, again and again; a packed batch is sorted, without 0."""
        lengths = [(self.t - 2 * n) % (self.t + 1) for n in range(self.n)]
        return sorted((max(n, 1) for n in lengths), reverse=True) if "packed" in self.rows else lengths

    def batch_sizes(self):
        return [sum(n > t for n in self.lengths()) for t in range(max(self.lengths()))]

    def steps(self, device):
        """(batch_sizes, lengths, reset) as the operators take them."""
        batch_sizes = torch.tensor(self.batch_sizes()) if "packed" in self.rows else None
        lengths = torch.tensor(self.lengths(), device=device) if "lengths" in self.rows else None
        reset = None
        if "reset" in self.rows:
            shape = (sum(self.batch_sizes()),) if "packed" in self.rows else (self.t, self.n)
            reset = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3).to(device)
        return batch_sizes, lengths, reset


WHOLE = (None, None, None)  # whole sequences: no batch_sizes, lengths, reset
ALL = (True, True, True, True)


def _cell_step(cell, gates_x, gates_h, h, c):
    """(h, c) after one step, from both products with their biases."""
    if cell == "lstm":
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if cell == "gru":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        return (1 - z) * torch.tanh(n_x + r * n_h) + z * h, None
    return (torch.tanh if cell == "rnn_tanh" else torch.relu)(gates_x + gates_h), None


def rnn_oracle(cell, steps, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh):
    """The results of rnn_train but for the reserve, step by step on padded rows."""
    batch_sizes, lengths, reset = steps
    batch, length = h_0.shape[1], x.shape[0]
    runs = torch.ones(length, batch, dtype=torch.bool)
    if batch_sizes is not None:
        length = len(batch_sizes)
        runs = torch.arange(batch) < batch_sizes[:, None]
        padded = x.new_zeros(length, batch, x.shape[-1])
        x = padded.index_put(torch.nonzero(runs, as_tuple=True), x)
        if reset is not None:
            reset = torch.zeros_like(runs).masked_scatter(runs, reset)
    elif lengths is not None:
        runs = torch.arange(length)[:, None] < lengths
    reset = torch.zeros_like(runs) if reset is None else reset & runs

    two = STATES[cell] == 2
    sequences, finals = [], []
    for d in range(len(weight_hh)):
        h, c = h_0[d], c_0[d] if two else h_0[d]
        made = [None] * length
        for t in range(length) if d == 0 else reversed(range(length)):
            border = t if d == 0 else t + 1
            keep = torch.ones(batch, 1) if border == length else (~reset[border])[:, None]
            old = h * keep.to(h.dtype), c * keep.to(h.dtype)
            gates_x = F.linear(x[t], weight_ih[d], bias_ih[d] if bias_ih else None)
            gates_h = F.linear(old[0], weight_hh[d], bias_hh[d] if bias_hh else None)
            new = _cell_step(cell, gates_x, gates_h, *old)
            made[t] = [torch.where(runs[t][:, None], s, 0) for s in new[: 1 + two]]
            h = torch.where(runs[t][:, None], new[0], h)
            c = torch.where(runs[t][:, None], new[1], c) if two else h
        sequences.append(made)
        finals.append((h, c))

    def every_row(which):
        halves = [torch.stack([step[which] for step in made]) for made in sequences]
        rows = torch.cat(halves, -1)
        return rows if batch_sizes is None else rows[runs]

    states = [torch.stack([f[i] for f in finals]) for i in range(1 + two)]
    return (every_row(0), *states, every_row(1)) if two else (every_row(0), *states)


def _convert(arguments, device, dtype):
    def one(value):
        if isinstance(value, list):
            return [one(v) for v in value]
        return None if value is None else value.to(device, dtype)

    return [one(argument) for argument in arguments]


def _flat(arguments):
    flat = [t for argument in arguments for t in (argument if isinstance(argument, list) else [argument])]
    return [t for t in flat if t is not None]


def _differentiated(function, arguments, outer):
    """The results of function, and the gradients of all arguments that are tensors."""
    leaves = [t.detach().requires_grad_() for t in _flat(arguments)]
    flat = iter(leaves)
    nested = [
        [next(flat) for _ in a] if isinstance(a, list) else None if a is None else next(flat)
        for a in arguments
    ]
    results = function(*nested)
    return [*results, *gradients(results, outer, leaves)]


def given(cell, values):
    """Of (output, h_n, c_n, cells) or (h, c) those that this cell has."""
    return [v for v in values if v is not None and (STATES[cell] == 2 or v.shape != (0,))]


def rnn_train(ops, cell, steps, operands):
    """((output, h_n, c_n, cells), reserve), inference being the same to the last bit."""
    *results, reserve = ops.rnn_train(cell, *operands, *steps)
    for train, inference in zip(results[:3], ops.rnn(cell, *operands, *steps), strict=True):
        torch.testing.assert_close(inference, train, rtol=0, atol=0)
    return results, reserve


def rnn_backward(ops, cell, steps, outer, operands, results, reserve, need=ALL):
    """``outer``: the gradients of ``results``, each may be None."""
    output, _, _, cells = results
    return ops.rnn_backward(*outer, cell, *operands, *steps, output, cells, reserve, *need)


def rnn_train_and_backward(ops, cell, steps, operands):
    """Everything the training operators return, flat."""
    results, reserve = rnn_train(ops, cell, steps, operands)
    return [*results, *_flat(rnn_backward(ops, cell, steps, results, operands, results, reserve))]


def assert_apart(grad_bias_ih, grad_bias_hh):
    """The two biases' gradients share no memory, even where they are equal."""
    for a, b in zip(grad_bias_ih, grad_bias_hh, strict=True):
        assert a.data_ptr() != b.data_ptr()


def check_rnn(ops, device, cell, case, dtype):
    """Against the oracle in float64; the operators' error is measured by that of the oracle in ``dtype``.

    What stands behind a row's end is NaN: nobody may read it. ReLU in half precision gets small integers: a
    rounding error must not decide which side of its corner a sum falls on.
    """
    draw = small_integers if cell == "rnn_relu" and dtype.itemsize == 2 else normal
    arguments, steps = case.draw(cell, draw), case.steps("cpu")

    def oracle(*operands):
        return rnn_oracle(cell, steps, *operands)

    outer = [draw(t.shape) for t in oracle(*arguments)]
    want = _differentiated(oracle, arguments, outer)
    theirs = _differentiated(oracle, _convert(arguments, "cpu", dtype), [g.to(dtype) for g in outer])
    x, *rest = arguments
    if "lengths" in case.rows:
        behind = torch.arange(case.t)[:, None] >= torch.tensor(case.lengths())
        x = x.masked_fill(behind[..., None], float("nan"))
        outer = [g.masked_fill(behind[..., None], float("nan")) if i in (0, 3) else g
                 for i, g in enumerate(outer)]  # fmt: skip
    operands, steps = _convert((x, *rest), device, dtype), case.steps(device)
    results, reserve = rnn_train(ops, cell, steps, operands)
    assert reserve.shape == (case.d, *x.shape[:-1], KEPT[cell], case.h)
    outer = [*_convert(outer, device, dtype), None, None][:4]
    grads = rnn_backward(ops, cell, steps, outer, operands, results, reserve)
    if case.bias:
        assert_apart(*grads[5:])
    assert_as_good([*given(cell, results), *given(cell, _flat(grads))], theirs, want)


def check_rnn_parts(ops, device, cell, case, dtype=torch.float64):
    """Gradients that are missing count as zero; gradients not asked for are empty."""
    operands, steps = _convert(case.draw(cell), device, dtype), case.steps(device)
    results, reserve = rnn_train(ops, cell, steps, operands)

    def backward(outer, need=ALL):
        return rnn_backward(ops, cell, steps, outer, operands, results, reserve, need)

    for one in range(4 if STATES[cell] == 2 else 2):
        outer = [torch.ones_like(t) if i == one else None for i, t in enumerate(results)]
        full = [torch.zeros_like(t) if g is None else g for g, t in zip(outer, results, strict=True)]
        got, want = backward(outer, (True, True, False, False)), backward(full)
        for ours, theirs in zip(got[:3], want[:3], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert got[3:] == ([], [], [], [])
    got = backward(results, (False, False, True, False))
    assert [t.shape for t in got[:3]] == [(0,)] * 3
    assert len(got[3]) == len(got[4]) == case.d
    assert got[5:] == ([], [])


def check_rnn_without_states(ops, device, cell, case, dtype=torch.float32):
    """A state that is not given is zero, in the results and in every gradient."""
    x, *states_and_weights = _convert(case.draw(cell), device, dtype)
    states, weights = states_and_weights[:2], states_and_weights[2:]
    steps = case.steps(device)
    for kept in ((), (0,), (1,))[: 1 + STATES[cell]]:
        absent = [s if i in kept else None for i, s in enumerate(states)]
        zeros = [s if s is None or i in kept else torch.zeros_like(s) for i, s in enumerate(states)]
        got = rnn_train_and_backward(ops, cell, steps, (x, *absent, *weights))
        want = rnn_train_and_backward(ops, cell, steps, (x, *zeros, *weights))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


def cell_oracle(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    h_1, c_1 = _cell_step(cell, F.linear(x, weight_ih, bias_ih), F.linear(h, weight_hh, bias_hh), h, c)
    return (h_1, c_1) if STATES[cell] == 2 else (h_1,)


def cell_train_and_backward(ops, cell, outer, operands):
    """(h_1, c_1, gradients), inference being the same to the last bit."""
    h_1, c_1, reserve = ops.rnn_cell_train(cell, *operands)
    assert reserve.shape == (h_1.shape[0], KEPT[cell], h_1.shape[1])
    for train, inference in zip((h_1, c_1), ops.rnn_cell(cell, *operands), strict=True):
        torch.testing.assert_close(inference, train, rtol=0, atol=0)
    return h_1, c_1, *ops.rnn_cell_backward(*outer, cell, *operands, h_1, c_1, reserve, *ALL)


def check_cell(ops, device, cell, case, dtype):
    x, h_0, c_0, *weights = case.draw(cell)
    arguments = [x[0], h_0[0], None if c_0 is None else c_0[0], *(w[0] if w else None for w in weights)]

    def oracle(*operands):
        return cell_oracle(cell, *operands)

    outer = [normal(t.shape) for t in oracle(*arguments)]
    want = _differentiated(oracle, arguments, outer)
    theirs = _differentiated(oracle, _convert(arguments, "cpu", dtype), [g.to(dtype) for g in outer])
    operands = _convert(arguments, device, dtype)
    outer = [*_convert(outer, device, dtype), None][:2]
    got = cell_train_and_backward(ops, cell, outer, operands)
    if case.bias:
        assert_apart(got[7:8], got[8:])
    else:
        assert [t.shape for t in got[7:]] == [(0,)] * 2
    assert_as_good([t for t in got if t.shape != (0,)], theirs, want)

    x, h, c, *weights = operands
    two = STATES[cell] == 2
    for absent in ((None, c), (h, None), (None, None)) if two else ((None, None),):
        zeros = [
            torch.zeros_like(s) if a is None and s is not None else s
            for a, s in zip(absent, (h, c), strict=True)
        ]
        got = cell_train_and_backward(ops, cell, outer, (x, *absent, *weights))
        want = cell_train_and_backward(ops, cell, outer, (x, *zeros, *weights))
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


# About 100 units fit one block, about 300 a cluster; beyond, and without clusters, a launch a step.
RNNS = {
    "tiny": Rnn(1, 1, 1, 1),
    "odd": Rnn(3, 5, 4, 7, d=2),
    "no_bias": Rnn(4, 3, 2, 33, bias=False),
    "h100": Rnn(2, 2, 3, 100),
    "few_rows": Rnn(3, 2, 3, 130, d=2),
    "many_rows": Rnn(2, 18, 2, 145),
    # An even input size: torch's bfloat16 products on a CPU let NaN of one row into others at odd ones.
    "lengths": Rnn(4, 6, 4, 10, d=2, rows="lengths, reset"),
    "packed": Rnn(4, 5, 3, 9, d=2, rows="packed, reset"),
    "lengths_over_a_cluster": Rnn(4, 5, 2, 131, d=2, rows="lengths"),
}
