"""Good operands of the raw operators, of which each wrong case spoils one."""

import torch

operators = torch.ops.cnnrnn_ext
HUGE = 2**62


def conv_operands():
    return {
        "x": torch.randn(2, 4, 8, 9),
        "weight": torch.randn(6, 4, 3, 3),
        "bias": torch.randn(6),
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "relu",
        "pool": "max",
        "pool_size": [2, 2],
        "pool_stride": [2, 2],
        "pool_padding": [0, 0],
        "ceil_mode": False,
    }


def conv_backward_operands():
    operands = conv_operands()
    y, code, _ = operators.conv_pool2d_train(**operands)
    return {
        "grad_y": torch.randn_like(y),
        **operands,
        "code": code,
        "kept": None,
        "need_x": True,
        "need_weight": True,
        "need_bias": True,
    }


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


def rnn_operands(cell="lstm", d=1, steps="padded"):
    rows = GATES[cell] * 5
    operands = {
        "cell": cell,
        "x": torch.randn(4, 2, 3),
        "h_0": torch.randn(d, 2, 5),
        "c_0": torch.randn(d, 2, 5) if cell == "lstm" else None,
        "weight_ih": [torch.randn(rows, 3) for _ in range(d)],
        "weight_hh": [torch.randn(rows, 5) for _ in range(d)],
        "bias_ih": [torch.randn(rows) for _ in range(d)],
        "bias_hh": [torch.randn(rows) for _ in range(d)],
        "batch_sizes": None,
        "lengths": None,
        "reset": None,
    }
    if steps == "packed":
        operands |= {"x": torch.randn(7, 3), "batch_sizes": torch.tensor([2, 2, 2, 1])}
        operands["reset"] = torch.rand(7) < 0.5
    if steps == "lengths":
        operands |= {"lengths": torch.tensor([2, 4]), "reset": torch.rand(4, 2) < 0.5}
    return operands


NEEDS = {"need_x": True, "need_state": True, "need_weight": True, "need_bias": True}


def rnn_backward_operands(cell="lstm", steps="padded"):
    operands = rnn_operands(cell, steps=steps)
    output, h_n, c_n, cells, reserve = operators.rnn_train(**operands)
    grads = {
        "grad_output": torch.randn_like(output),
        "grad_h_n": torch.randn_like(h_n),
        "grad_c_n": torch.randn_like(c_n) if cell == "lstm" else None,
        "grad_cells": torch.randn_like(cells) if cell == "lstm" else None,
    }
    return {**grads, **operands, "output": output, "cells": cells, "reserve": reserve, **NEEDS}


def narrowed(operands):
    """Weights in int8 with a scale for each row."""
    for kind in ("ih", "hh"):
        weights = operands[f"weight_{kind}"]
        bytes_of = [torch.randint(-127, 128, w.shape, dtype=torch.int8) for w in as_list(weights)]
        scales = [torch.rand(len(w)) / 127 for w in as_list(weights)]
        operands[f"weight_{kind}"] = bytes_of if isinstance(weights, list) else bytes_of[0]
        operands[f"scale_{kind}"] = scales if isinstance(weights, list) else scales[0]
    return operands


def as_list(value):
    return value if isinstance(value, list) else [value]


def rnn_narrow_operands():
    return narrowed(rnn_operands())


def cell_operands(cell="lstm"):
    rows = GATES[cell] * 5
    return {
        "cell": cell,
        "x": torch.randn(2, 3),
        "h": torch.randn(2, 5),
        "c": torch.randn(2, 5) if cell == "lstm" else None,
        "weight_ih": torch.randn(rows, 3),
        "weight_hh": torch.randn(rows, 5),
        "bias_ih": torch.randn(rows),
        "bias_hh": torch.randn(rows),
    }


def cell_backward_operands(cell="lstm"):
    operands = cell_operands(cell)
    h_1, c_1, reserve = operators.rnn_cell_train(**operands)
    return {
        "grad_h_1": torch.randn_like(h_1),
        "grad_c_1": torch.randn_like(c_1) if cell == "lstm" else None,
        **operands,
        "h_1": h_1,
        "c_1": c_1,
        "reserve": reserve,
        **NEEDS,
    }


def cell_narrow_operands():
    return narrowed(cell_operands())
