"""What the CUDA operators must compute, for test_cuda_emulation*.py (on the CPU) and test_cuda_gpu*.py: what
all families share, and conv_pool. The recurrent operators: _cuda_rnn_cases.py.

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


def check_several_streams(run, calls):
    """Calls on different streams share nothing: ``run`` gives of each what it gives of it alone."""
    want = [run(operands) for operands in calls]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in calls], []
    for stream, operands in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            got.append(run(operands))
    torch.cuda.synchronize()
    for ours, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def captured(step):
    """What ``step`` makes on a GPU outside of a graph, and a graph's replay of it."""
    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.fill_(float("nan"))
    for _ in range(2):  # counters and the like must be as new in the second
        graph.replay()
    torch.cuda.synchronize()
    return want, got
