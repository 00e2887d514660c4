"""What the recurrent CUDA operators must compute, as _cuda_cases.py says it of conv_pool."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from _cuda_cases import assert_as_good, gradients, normal, small_integers

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


class Tf32(torch.autograd.Function):
    """The nearest TF32 number of each float32, in the gradient too."""

    @staticmethod
    def round(t):
        bits = t.float().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)

    @staticmethod
    def forward(ctx, t):
        return Tf32.round(t)

    @staticmethod
    def backward(ctx, grad):
        return Tf32.round(grad)


def rnn_oracle(cell, steps, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, tf32=False):
    """The results of rnn_train but for the reserve, step by step on padded rows.

    tf32: with operands of the recurrent products rounded to TF32.
    """
    rounded = Tf32.apply if tf32 else lambda t: t
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
            gates_h = F.linear(rounded(old[0]), rounded(weight_hh[d]), bias_hh[d] if bias_hh else None)
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


def convert(arguments, device, dtype):
    def one(value):
        if isinstance(value, list):
            return [one(v) for v in value]
        return None if value is None else value.to(device, dtype)

    return [one(argument) for argument in arguments]


def flat(arguments):
    flat = [t for argument in arguments for t in (argument if isinstance(argument, list) else [argument])]
    return [t for t in flat if t is not None]


def _differentiated(function, arguments, outer):
    """The results of function, and the gradients of all arguments that are tensors."""
    leaves = [t.detach().requires_grad_() for t in flat(arguments)]
    rest = iter(leaves)
    nested = [
        [next(rest) for _ in a] if isinstance(a, list) else None if a is None else next(rest)
        for a in arguments
    ]
    results = function(*nested)
    return [*results, *gradients(results, outer, leaves)]


def given(cell, values):
    """Of (output, h_n, c_n, cells) or (h, c) those that this cell has."""
    return [v for v in values if v is not None and (STATES[cell] == 2 or v.shape != (0,))]


def rnn_train(ops, cell, steps, operands, tf32=False, recompute=False):
    """((output, h_n, c_n, cells), reserve), inference being the same to the last bit."""
    *results, reserve = ops.rnn_train(cell, *operands, *steps, tf32, recompute)
    for train, inference in zip(results[:3], ops.rnn(cell, *operands, *steps, tf32), strict=True):
        torch.testing.assert_close(inference, train, rtol=0, atol=0)
    return results, reserve


def rnn_backward(ops, cell, steps, outer, operands, results, reserve, need=ALL, tf32=False):
    """``outer``: the gradients of ``results``, each may be None."""
    output, _, _, cells = results
    return ops.rnn_backward(*outer, cell, *operands, *steps, output, cells, reserve, *need, tf32)


def rnn_train_and_backward(ops, cell, steps, operands, tf32=False):
    """Everything the training operators return, flat."""
    results, reserve = rnn_train(ops, cell, steps, operands, tf32)
    grads = rnn_backward(ops, cell, steps, results, operands, results, reserve, tf32=tf32)
    return [*results, *flat(grads)]


def assert_apart(grad_bias_ih, grad_bias_hh):
    """The two biases' gradients share no memory, even where they are equal."""
    for a, b in zip(grad_bias_ih, grad_bias_hh, strict=True):
        assert a.data_ptr() != b.data_ptr()


def check_rnn(ops, device, cell, case, dtype, tf32=False, recompute=False):
    """Against the oracle in float64; the operators' error is measured by that of the oracle in ``dtype``.

    What stands behind a row's end is NaN: nobody may read it. ReLU in half precision or TF32 gets small
    integers: a rounding error must not decide which side of its corner a sum falls on.
    """
    draw = small_integers if cell == "rnn_relu" and (tf32 or dtype.itemsize == 2) else normal
    arguments, steps = case.draw(cell, draw), case.steps("cpu")

    def oracle(*operands, tf32=False):
        return rnn_oracle(cell, steps, *operands, tf32)

    outer = [draw(t.shape) for t in oracle(*arguments)]
    want = _differentiated(oracle, arguments, outer)
    theirs = _differentiated(
        partial(oracle, tf32=tf32), convert(arguments, "cpu", dtype), [g.to(dtype) for g in outer]
    )
    x, *rest = arguments
    if "lengths" in case.rows:
        behind = torch.arange(case.t)[:, None] >= torch.tensor(case.lengths())
        x = x.masked_fill(behind[..., None], float("nan"))
        outer = [g.masked_fill(behind[..., None], float("nan")) if i in (0, 3) else g
                 for i, g in enumerate(outer)]  # fmt: skip
    operands, steps = convert((x, *rest), device, dtype), case.steps(device)
    results, reserve = rnn_train(ops, cell, steps, operands, tf32, recompute)
    assert reserve.shape == (case.d, *x.shape[:-1], 0 if recompute else KEPT[cell], case.h)
    outer = [*convert(outer, device, dtype), None, None][:4]
    grads = rnn_backward(ops, cell, steps, outer, operands, results, reserve, tf32=tf32)
    if case.bias:
        assert_apart(*grads[5:])
    assert_as_good([*given(cell, results), *given(cell, flat(grads))], theirs, want)


def check_rnn_parts(ops, device, cell, case, dtype=torch.float64):
    """Gradients that are missing count as zero; gradients not asked for are empty."""
    operands, steps = convert(case.draw(cell), device, dtype), case.steps(device)
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
    x, *states_and_weights = convert(case.draw(cell), device, dtype)
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
    theirs = _differentiated(oracle, convert(arguments, "cpu", dtype), [g.to(dtype) for g in outer])
    operands = convert(arguments, device, dtype)
    outer = [*convert(outer, device, dtype), None][:2]
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
