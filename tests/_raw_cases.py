"""Wrong operands for the raw operators, run in a process of their own: a crash must not end the suite.

As a script: runs the cases from the given index on and prints one JSON line before and after each.
"""

import functools
import json
import sys

import torch
from _raw_operands import (
    HUGE,
    cell_backward_operands,
    cell_narrow_operands,
    cell_operands,
    conv_backward_operands,
    conv_operands,
    operators,
    rnn_backward_operands,
    rnn_narrow_operands,
    rnn_operands,
)

import cnnrnn_ext

# ---- what is wrong, by argument; the message must name that argument ----

CONV = {
    "x": {
        "rank 3": torch.randn(4, 8, 9),
        "rank 5": torch.randn(1, 2, 4, 8, 9),
        "scalar": torch.tensor(1.0),
        "channels": torch.randn(2, 5, 8, 9),
        "int64": torch.ones(2, 4, 8, 9, dtype=torch.int64),
        "bool": torch.ones(2, 4, 8, 9, dtype=torch.bool),
        "smaller than the kernel": torch.randn(2, 4, 2, 9),
        "no rows": torch.randn(2, 4, 0, 9),
    },
    "weight": {
        "rank 3": torch.randn(6, 4, 3),
        "rank 1": torch.randn(6),
        "channels": torch.randn(6, 3, 3, 3),
        "float64": torch.randn(6, 4, 3, 3, dtype=torch.float64),
        "meta": torch.empty(6, 4, 3, 3, device="meta"),
        "no outputs": torch.randn(0, 4, 3, 3),
        "no kernel": torch.randn(6, 4, 0, 3),
    },
    "bias": {
        "length": torch.randn(5),
        "rank 2": torch.randn(6, 1),
        "float64": torch.randn(6, dtype=torch.float64),
        "meta": torch.empty(6, device="meta"),
    },
    "stride": {"zero": [0, 1], "negative": [1, -1], "three": [1, 1, 1], "none": []},
    "padding": {"negative": [-1, 0], "three": [0, 0, 0], "huge": [HUGE, HUGE], "large": [2**40, 0]},
    "dilation": {
        "zero": [0, 1],
        "negative": [1, -2],
        "huge": [HUGE, 1],
        "wraps to small": [2**63 - 1, 2**63 - 1],
    },
    "groups": {"zero": 0, "negative": -1, "not a divisor": 3, "huge": HUGE},
    "activation": {"unknown": "swish!", "empty": ""},
    "pool": {"unknown": "median", "empty": ""},
    "pool_size": {
        "zero": [0, 2],
        "negative": [2, -2],
        "larger than the map": [7, 2],
        "three": [2, 2, 2],
        "more than a code holds": [2**16, 2**16],
        "huge": [HUGE, HUGE],
        "product wraps to 0": [2**32, 2**32],
    },
    "pool_stride": {"zero": [0, 2], "negative": [2, -1], "three": [2, 2, 2]},
    "pool_padding": {"negative": [-1, 0], "more than half": [2, 0], "huge": [HUGE, 0]},
}
CONV_BACKWARD = {
    **CONV,
    "grad_y": {
        "rank": torch.randn(2, 6, 3),
        "shape": torch.randn(2, 6, 4, 3),
        "batch": torch.randn(1, 6, 3, 3),
        "float64": torch.randn(2, 6, 3, 3, dtype=torch.float64),
        "meta": torch.empty(2, 6, 3, 3, device="meta"),
    },
    "code": {
        "shape": torch.zeros(2, 6, 3, 4, dtype=torch.uint8),
        "rank": torch.zeros(9, dtype=torch.uint8),
        "int64": torch.zeros(2, 6, 3, 3, dtype=torch.int64),
        "meta": torch.empty(2, 6, 3, 3, dtype=torch.uint8, device="meta"),
    },
}
STATES = {
    "rank": lambda *s: torch.randn(s[-1]),
    "batch": lambda *s: torch.randn(*s[:-2], s[-2] + 1, s[-1]),
    "width": lambda *s: torch.randn(*s[:-1], s[-1] - 1),
    "float64": lambda *s: torch.randn(*s, dtype=torch.float64),
    "meta": lambda *s: torch.empty(*s, device="meta"),
}


def spoiled(*shape):
    return {name: make(*shape) for name, make in STATES.items()}


def lists(*shape):
    """Wrong lists of weights: each wrong tensor alone, and lists of another length."""
    wrong = (
        {name: [tensor] for name, tensor in spoiled(*shape).items()}
        if len(shape) > 1
        else {
            "length": [torch.randn(shape[0] + 1)],
            "rank": [torch.randn(*shape, 1)],
            "float64": [torch.randn(*shape, dtype=torch.float64)],
            "meta": [torch.empty(*shape, device="meta")],
        }
    )
    return {**wrong, "two": [torch.randn(*shape)] * 2, "three": [torch.randn(*shape)] * 3}


def sizes(*values):
    return torch.tensor(values, dtype=torch.int64)


WRONG_CELL = {"unknown": "lstm2", "empty": "", "upper case": "LSTM", "module": "LSTMCell"}
STEPS = {
    "batch_sizes": {
        "rank 0": torch.tensor(8),
        "rank 2": sizes(2, 2, 2, 2)[None],
        "int32": sizes(2, 2, 2, 2).int(),
        "float32": torch.tensor([2.0, 2.0, 2.0, 2.0]),
        "beside a padded x": sizes(2, 2, 2, 2),
    },
    "lengths": {
        "number of rows": sizes(1, 2, 3),
        "rank 2": sizes(1, 2)[None],
        "int32": sizes(1, 2).int(),
        "float32": torch.tensor([1.0, 2.0]),
        "bool": torch.tensor([True, False]),
        "negative": sizes(2, -1),
        "beyond the steps": sizes(5, 2),
        "huge": sizes(HUGE, HUGE),
        "meta": torch.empty(2, dtype=torch.int64, device="meta"),
    },
    "reset": {
        "steps": torch.zeros(3, 2, dtype=torch.bool),
        "rows": torch.zeros(4, 3, dtype=torch.bool),
        "rank 1": torch.zeros(4, dtype=torch.bool),
        "uint8": torch.zeros(4, 2, dtype=torch.uint8),
        "float32": torch.zeros(4, 2),
        "meta": torch.zeros(4, 2, dtype=torch.bool, device="meta"),
    },
}
PACKED_STEPS = {
    "batch_sizes": {
        "rising": sizes(1, 2, 2, 2),
        "sum too small": sizes(2, 2, 2),
        "sum too large": sizes(2, 2, 2, 2),
        "negative": sizes(2, 2, 2, 2, -1),
        "none": sizes(),
        "wraps around": sizes(HUGE, HUGE, HUGE, HUGE),
        "wraps to the right sum": sizes(HUGE, HUGE, HUGE, HUGE, 7),
        "int32": sizes(2, 2, 2, 1).int(),
    },
    "lengths": {"beside batch_sizes": sizes(2, 2)},
    "reset": {"padded": torch.zeros(4, 2, dtype=torch.bool), "rows": torch.zeros(8, dtype=torch.bool)},
    "h_0": {"batch": torch.randn(1, 3, 5)},
    "x": {"padded": torch.randn(4, 2, 3), "rank 1": torch.randn(7)},
}


def weight_cases(rows):
    """Wrong weights and biases of one direction."""
    return {
        "weight_ih": {**lists(rows, 3), "none": []},
        "weight_hh": {**lists(rows, 5), "none": []},
        "bias_ih": {**lists(rows), "none": []},
        "bias_hh": {**lists(rows), "none": []},
    }


RNN_X = {
    "rank 2": torch.randn(4, 3),
    "rank 4": torch.randn(4, 2, 3, 1),
    "scalar": torch.tensor(1.0),
    "int64": torch.ones(4, 2, 3, dtype=torch.int64),
    "float16": torch.randn(4, 2, 3).half(),
}
LSTM = {
    "cell": WRONG_CELL,
    "x": RNN_X,
    "h_0": {**spoiled(1, 2, 5), "directions": torch.randn(2, 2, 5)},
    "c_0": {**spoiled(1, 2, 5), "directions": torch.randn(2, 2, 5)},
    **weight_cases(20),
    **STEPS,
}
GRU = {**LSTM, **weight_cases(15), "c_0": {"of a cell without one": torch.randn(1, 2, 5)}}
ELMAN = {**LSTM, **weight_cases(5), "c_0": {"of a cell without one": torch.randn(1, 2, 5)}}
LSTM_BACKWARD = {
    **{name: cases for name, cases in LSTM.items() if name != "x"},
    "grad_output": spoiled(4, 2, 5),
    "grad_h_n": spoiled(1, 2, 5),
    "grad_c_n": spoiled(1, 2, 5),
    "grad_cells": spoiled(4, 2, 5),
    "output": spoiled(4, 2, 5),
    "cells": {**spoiled(4, 2, 5), "empty": torch.empty(0)},
    "reserve": {**spoiled(1, 4, 2, 4, 5), "five values": torch.randn(1, 4, 2, 5, 5)},
}
GRU_BACKWARD = {
    **{name: cases for name, cases in GRU.items() if name != "x"},
    **{name: LSTM_BACKWARD[name] for name in ("grad_output", "grad_h_n", "output", "reserve")},
}
ELMAN_BACKWARD = {
    **{name: cases for name, cases in ELMAN.items() if name != "x"},
    **{name: LSTM_BACKWARD[name] for name in ("grad_output", "grad_h_n", "output")},
    "reserve": {"values": torch.randn(1, 4, 2, 1, 5), "rank": torch.randn(0)},
}
SCALES = {
    "length": lambda rows: torch.rand(rows + 1),
    "rank": lambda rows: torch.rand(rows, 1),
    "float64": lambda rows: torch.rand(rows, dtype=torch.float64),
    "meta": lambda rows: torch.empty(rows, device="meta"),
}
NARROW_WEIGHTS = {
    "float32": lambda *s: torch.randn(*s),
    "uint8": lambda *s: torch.zeros(*s, dtype=torch.uint8),
    "bfloat16 beside int8": lambda *s: torch.zeros(*s, dtype=torch.bfloat16),
    "width": lambda *s: torch.zeros(s[0], s[1] + 1, dtype=torch.int8),
    "rows": lambda *s: torch.zeros(s[0] - 1, s[1], dtype=torch.int8),
    "rank": lambda *s: torch.zeros(s[0], dtype=torch.int8),
    "meta": lambda *s: torch.zeros(*s, dtype=torch.int8, device="meta"),
}


def narrow_cases(kind):
    """weight_ih's dtype is the one that the other weights must have."""
    return [(n, make) for n, make in NARROW_WEIGHTS.items() if kind == "hh" or "beside" not in n]


RNN_NARROW = {
    "cell": WRONG_CELL,
    "x": {**RNN_X, "float64": torch.randn(4, 2, 3, dtype=torch.float64)},
    "h_0": LSTM["h_0"],
    "c_0": LSTM["c_0"],
    **{
        f"weight_{kind}": {
            **{name: [make(20, width)] for name, make in narrow_cases(kind)},
            "none": [],
            "two": [torch.zeros(20, width, dtype=torch.int8)] * 2,
        }
        for kind, width in (("ih", 3), ("hh", 5))
    },
    **{
        f"scale_{kind}": {**{name: [make(20)] for name, make in SCALES.items()}, "none": []}
        for kind in ("ih", "hh")
    },
    "bias_ih": LSTM["bias_ih"],
    "bias_hh": LSTM["bias_hh"],
    **STEPS,
}


def cell_cases(rows, c):
    return {
        "cell": WRONG_CELL,
        "x": {
            "rank 1": torch.randn(3),
            "rank 3": torch.randn(2, 3, 1),
            "int64": torch.ones(2, 3, dtype=torch.int64),
        },
        "h": spoiled(2, 5),
        "c": c,
        "weight_ih": spoiled(rows, 3),
        "weight_hh": spoiled(rows, 5),
        "bias_ih": {
            "length": torch.randn(rows - 1),
            "none": None,
            "float64": torch.randn(rows, dtype=torch.float64),
        },
        "bias_hh": {
            "length": torch.randn(rows - 1),
            "none": None,
            "meta": torch.empty(rows, device="meta"),
        },
    }


CELL = cell_cases(20, spoiled(2, 5))
GRU_CELL = cell_cases(15, {"of a cell without one": torch.randn(2, 5)})
CELL_BACKWARD = {
    **{name: cases for name, cases in CELL.items() if name != "x"},
    "grad_h_1": spoiled(2, 5),
    "grad_c_1": spoiled(2, 5),
    "h_1": spoiled(2, 5),
    "c_1": {**spoiled(2, 5), "empty": torch.empty(0)},
    "reserve": {**spoiled(2, 4, 5), "five values": torch.randn(2, 5, 5)},
}
GRU_CELL_BACKWARD = {
    **{name: cases for name, cases in GRU_CELL.items() if name != "x"},
    **{name: CELL_BACKWARD[name] for name in ("grad_h_1", "h_1", "reserve")},
}
CELL_NARROW = {
    "cell": WRONG_CELL,
    "x": {**CELL["x"], "float64": torch.randn(2, 3, dtype=torch.float64)},
    "h": spoiled(2, 5),
    "c": spoiled(2, 5),
    **{
        f"weight_{kind}": {name: make(20, width) for name, make in narrow_cases(kind)}
        for kind, width in (("ih", 3), ("hh", 5))
    },
    **{
        f"scale_{kind}": {**{name: make(20) for name, make in SCALES.items()}, "none": None}
        for kind in ("ih", "hh")
    },
    "bias_ih": CELL["bias_ih"],
    "bias_hh": CELL["bias_hh"],
}


def of(make, *arguments, **options):
    return functools.partial(make, *arguments, **options)


# label: (operator, its good operands, what is spoiled)
TABLE = {
    "conv_pool2d": ("conv_pool2d", conv_operands, CONV),
    "conv_pool2d_train": ("conv_pool2d_train", conv_operands, CONV),
    "conv_pool2d_backward": ("conv_pool2d_backward", conv_backward_operands, CONV_BACKWARD),
    "rnn lstm": ("rnn", rnn_operands, LSTM),
    "rnn gru": ("rnn", of(rnn_operands, "gru"), GRU),
    "rnn rnn_tanh": ("rnn", of(rnn_operands, "rnn_tanh"), ELMAN),
    "rnn packed": ("rnn", of(rnn_operands, steps="packed"), PACKED_STEPS),
    "rnn_train lstm": ("rnn_train", rnn_operands, LSTM),
    "rnn_train gru": ("rnn_train", of(rnn_operands, "gru"), GRU),
    "rnn_train packed": ("rnn_train", of(rnn_operands, steps="packed"), PACKED_STEPS),
    "rnn_backward lstm": ("rnn_backward", rnn_backward_operands, LSTM_BACKWARD),
    "rnn_backward gru": ("rnn_backward", of(rnn_backward_operands, "gru"), GRU_BACKWARD),
    "rnn_backward rnn_tanh": ("rnn_backward", of(rnn_backward_operands, "rnn_tanh"), ELMAN_BACKWARD),
    "rnn_backward lengths": (
        "rnn_backward",
        of(rnn_backward_operands, steps="lengths"),
        {name: LSTM_BACKWARD[name] for name in ("grad_output", "grad_cells", "output", "cells", "reserve")},
    ),
    "rnn_narrow": ("rnn_narrow", rnn_narrow_operands, RNN_NARROW),
    "rnn_cell lstm": ("rnn_cell", cell_operands, CELL),
    "rnn_cell gru": ("rnn_cell", of(cell_operands, "gru"), GRU_CELL),
    "rnn_cell_train lstm": ("rnn_cell_train", cell_operands, CELL),
    "rnn_cell_backward lstm": ("rnn_cell_backward", cell_backward_operands, CELL_BACKWARD),
    "rnn_cell_backward gru": (
        "rnn_cell_backward",
        of(cell_backward_operands, "gru"),
        GRU_CELL_BACKWARD,
    ),
    "rnn_cell_narrow": ("rnn_cell_narrow", cell_narrow_operands, CELL_NARROW),
}


def wrong_code(value):
    """A code that points outside its window, or at padding: refused, or no gradient that is not finite."""
    operands = conv_backward_operands()
    operands["code"] = torch.full_like(operands["code"], value)
    return operators.conv_pool2d_backward(**operands)


def wrong_code_in_padding():
    operands = conv_operands() | {"pool_size": [3, 3], "pool_stride": [2, 2], "pool_padding": [1, 1]}
    y, code, _ = operators.conv_pool2d_train(**operands)
    rest = {"code": torch.zeros_like(code), "need_x": True, "need_weight": True, "need_bias": True}
    return operators.conv_pool2d_backward(grad_y=torch.ones_like(y), **operands, **rest)


def spoil(label, argument, value):
    operator, operands, _ = TABLE[label]
    return getattr(operators, operator)(**{**operands(), argument: value})


def right(label):
    """The good operands: what makes the refusals below mean anything."""
    operator, operands, _ = TABLE[label]
    return getattr(operators, operator)(**operands())


# (name, argument the message must name or None, function)
CASES = [
    (f"{label}: {argument} {name}", argument, functools.partial(spoil, label, argument, value))
    for label, (_, _, table) in TABLE.items()
    for argument, cases in table.items()
    for name, value in cases.items()
]
# No argument to name, or no error to expect: these must only not crash or compute nonsense in silence.
OTHER_CASES = [
    (
        "sparse x",
        None,
        lambda: operators.conv_pool2d(**conv_operands() | {"x": torch.randn(2, 4, 8, 9).to_sparse()}),
    ),
    *((f"code {value}", None, functools.partial(wrong_code, value)) for value in (4, 5, 17, 100, 200, 254)),
    ("code in padding", None, wrong_code_in_padding),
]
GOOD_CASES = [(f"{label}: right", None, functools.partial(right, label)) for label in TABLE]


def main(start):
    for index, (name, _, function) in list(enumerate(CASES + OTHER_CASES + GOOD_CASES))[start:]:
        print(json.dumps({"begin": index, "name": name}), flush=True)
        torch.manual_seed(index)
        try:
            function()
        except Exception as error:  # which type it is, is what the test asks
            outcome = {"type": type(error).__name__, "message": str(error)}
        else:
            outcome = {"type": None, "message": ""}
        print(json.dumps({"end": index, **outcome}), flush=True)


if __name__ == "__main__":
    assert cnnrnn_ext
    main(int(sys.argv[1]))
