"""What the recurrent CUDA operators do with operands that are empty or do not fit, on the CPU: see
test_cuda_emulation.py."""

import _cuda_rnn_cases as cases
import pytest
import torch

CELLS = tuple(cases.GATES)


@pytest.fixture
def ops(emulated):
    return emulated


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (2, 0)])
def test_rnn_empty(ops, steps, batch, states, cell):
    case = cases.Rnn(steps, batch, 4, 5)
    x, h_0, c_0, *weights = cases.convert(case.draw(cell), "cpu", torch.float32)
    given = (h_0, c_0) if states else (None, None)
    h_0, c_0 = (s if states or s is None else torch.zeros_like(s) for s in (h_0, c_0))
    operands = (x, *given, *weights)
    results, reserve = cases.rnn_train(ops, cell, cases.WHOLE, operands)
    output, h_n, c_n, cells = results
    assert output.shape == (steps, batch, 5)
    assert reserve.shape == (1, steps, batch, cases.KEPT[cell], 5)
    assert torch.equal(h_n, h_0)
    if c_0 is not None:
        assert torch.equal(c_n, c_0)
        assert cells.shape == output.shape
    ones = torch.ones_like(h_n)
    outer = (None, ones, None, None)
    grads = cases.rnn_backward(ops, cell, cases.WHOLE, outer, operands, results, reserve)
    assert torch.equal(grads[1], ones)
    assert not grads[2].any()
    assert not any(g.any() for group in grads[3:] for g in group)


def test_rnn_refuses(ops):
    x, h_0, c_0, *weights = cases.convert(cases.Rnn(2, 3, 4, 5).draw("lstm"), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=r"h_0: expected shape \[1, 3, 5\], got \[1, 3, 4\]"):
        ops.rnn("lstm", x, h_0[..., :4], c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected shape \[20, 3\], got \[20, 4\]"):
        ops.rnn("lstm", x[..., :3], h_0, c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match=r"weight_ih: expected shape \[15, 4\], got \[20, 4\]"):
        ops.rnn("gru", x, h_0, None, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match="c_0: only lstm has one"):
        ops.rnn("gru", x, h_0, c_0, *weights, *cases.WHOLE)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh: give both or neither"):
        ops.rnn("lstm", x, h_0, c_0, *weights[:3], [], *cases.WHOLE)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh: give both or neither"):
        ops.rnn_cell("lstm", x[0], h_0[0], c_0[0], *(w[0] for w in weights[:3]), None)
    with pytest.raises(
        RuntimeError, match="cell: expected 'lstm', 'gru', 'rnn_tanh' or 'rnn_relu', got 'LSTM'"
    ):
        ops.rnn("LSTM", x, h_0, c_0, *weights, *cases.WHOLE)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((torch.tensor([3, 3]), None, None), r"x: expected shape \[R, I\], got \[2, 3, 4\]"),
        ((None, torch.tensor([2, 1]), None), r"lengths: expected shape \[3\], got \[2\]"),
        ((None, torch.tensor([2.0, 1.0, 2.0]), None), "lengths: expected int64 on x's device"),
        ((None, None, torch.zeros(3, 2, dtype=torch.bool)), r"reset: expected shape \[2, 3\], got \[3, 2\]"),
        ((None, None, torch.zeros(2, 3)), "reset: expected bool on x's device"),
    ],
)
def test_rnn_refuses_rows(ops, steps, message):
    operands = cases.convert(cases.Rnn(2, 3, 4, 5).draw("lstm"), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=message):
        ops.rnn("lstm", *operands, *steps)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([1, 2, 3], "none larger than the one before, got 2 at step 1"),
        ([3, 2], "expected a sum of 6, the rows of x, got 5"),
    ],
)
def test_rnn_refuses_batch_sizes(ops, sizes, message):
    x, h_0, *rest = cases.convert(cases.Rnn(2, 3, 4, 5).draw("gru"), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=message):
        ops.rnn("gru", x.flatten(0, 1), h_0, *rest, torch.tensor(sizes), None, None)


@pytest.mark.parametrize(
    ("argument", "wrong", "expected"),
    [
        ("grad_cells", (2, 3, 6), "2, 3, 5"),
        ("cells", (1, 2, 3, 5), "2, 3, 5"),
        ("reserve", (1, 2, 3, 5, 5), "1, 2, 3, 4, 5"),
    ],
)
def test_rnn_backward_refuses(ops, argument, wrong, expected):
    operands = cases.convert(cases.Rnn(2, 3, 4, 5).draw("lstm"), "cpu", torch.float32)
    results, reserve = cases.rnn_train(ops, "lstm", cases.WHOLE, operands)
    spoiled = {"grad_cells": None, "cells": results[3], "reserve": reserve} | {argument: torch.zeros(wrong)}
    with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[{expected}\]"):
        cases.rnn_backward(
            ops, "lstm", cases.WHOLE, (None, None, None, spoiled["grad_cells"]), operands,
            [*results[:3], spoiled["cells"]], spoiled["reserve"],
        )  # fmt: skip


@pytest.mark.parametrize("argument", ["h_1", "c_1", "reserve"])
def test_cell_backward_refuses(ops, argument):
    made = {"h_1": torch.zeros(3, 5), "c_1": torch.zeros(3, 5), "reserve": torch.zeros(3, 4, 5)}
    made[argument] = torch.zeros(3, 5, 5)
    weights = (torch.zeros(20, 4), torch.zeros(20, 5), None, None)
    with pytest.raises(RuntimeError, match=rf"{argument}: expected shape \[3, .*5\], got \[3, 5, 5\]"):
        ops.rnn_cell_backward(
            None, None, "lstm", torch.zeros(3, 4), None, None, *weights, *made.values(), *cases.ALL
        )
