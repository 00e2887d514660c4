"""Wrong operands for the raw operators, run in a process of their own: a crash must not end the suite.

As a script: runs the cases from the given index on and prints one JSON line before and after each.
"""

import functools
import json
import sys

import torch

import cnnrnn_ext

operators = torch.ops.cnnrnn_ext
HUGE = 2**62
NAN = float("nan")


# ---- good operands, of which each case spoils one ----


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
    y, code = operators.conv_pool2d_train(**operands)
    return {
        "grad_y": torch.randn_like(y),
        **operands,
        "code": code,
        "need_x": True,
        "need_weight": True,
        "need_bias": True,
    }


def lstm_operands(d=1):
    return {
        "x": torch.randn(4, 2, 3),
        "h_0": torch.randn(d, 2, 5),
        "c_0": torch.randn(d, 2, 5),
        "weight_ih": [torch.randn(20, 3) for _ in range(d)],
        "weight_hh": [torch.randn(20, 5) for _ in range(d)],
        "bias_ih": [torch.randn(20) for _ in range(d)],
        "bias_hh": [torch.randn(20) for _ in range(d)],
    }


NEEDS = {"need_x": True, "need_state": True, "need_weight": True, "need_bias": True}


def lstm_backward_operands():
    operands = lstm_operands()
    output, h_n, c_n, reserve = operators.lstm_train(**operands)
    grads = {
        "grad_output": torch.randn_like(output),
        "grad_h_n": torch.randn_like(h_n),
        "grad_c_n": torch.randn_like(c_n),
    }
    return {**grads, **operands, "output": output, "reserve": reserve, **NEEDS}


def cell_operands():
    return {
        "x": torch.randn(2, 3),
        "h": torch.randn(2, 5),
        "c": torch.randn(2, 5),
        "weight_ih": torch.randn(20, 3),
        "weight_hh": torch.randn(20, 5),
        "bias_ih": torch.randn(20),
        "bias_hh": torch.randn(20),
    }


def cell_backward_operands():
    operands = cell_operands()
    h_1, c_1, reserve = operators.lstm_cell_train(**operands)
    return {
        "grad_h_1": torch.randn_like(h_1),
        "grad_c_1": torch.randn_like(c_1),
        **operands,
        "reserve": reserve,
        **NEEDS,
    }


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


LSTM = {
    "x": {
        "rank 2": torch.randn(4, 3),
        "rank 4": torch.randn(4, 2, 3, 1),
        "scalar": torch.tensor(1.0),
        "int64": torch.ones(4, 2, 3, dtype=torch.int64),
        "float16": torch.randn(4, 2, 3).half(),
    },
    "h_0": {**spoiled(1, 2, 5), "directions": torch.randn(2, 2, 5)},
    "c_0": {**spoiled(1, 2, 5), "directions": torch.randn(2, 2, 5)},
    "weight_ih": {**lists(20, 3), "none": []},
    "weight_hh": {**lists(20, 5), "none": []},
    "bias_ih": {**lists(20), "none": []},
    "bias_hh": {**lists(20), "none": []},
}
LSTM_BACKWARD = {
    **{name: cases for name, cases in LSTM.items() if name != "x"},
    "grad_output": spoiled(4, 2, 5),
    "grad_h_n": spoiled(1, 2, 5),
    "grad_c_n": spoiled(1, 2, 5),
    "output": spoiled(4, 2, 5),
    "reserve": {**spoiled(1, 4, 2, 5, 5), "four gates": torch.randn(1, 4, 2, 4, 5)},
}
CELL = {
    "x": {
        "rank 1": torch.randn(3),
        "rank 3": torch.randn(2, 3, 1),
        "int64": torch.ones(2, 3, dtype=torch.int64),
    },
    "h": spoiled(2, 5),
    "c": spoiled(2, 5),
    "weight_ih": {**spoiled(20, 3)},
    "weight_hh": {**spoiled(20, 5)},
    "bias_ih": {"length": torch.randn(19), "none": None, "float64": torch.randn(20, dtype=torch.float64)},
    "bias_hh": {"length": torch.randn(19), "none": None, "meta": torch.empty(20, device="meta")},
}
CELL_BACKWARD = {
    **{name: cases for name, cases in CELL.items() if name != "x"},
    "grad_h_1": spoiled(2, 5),
    "grad_c_1": spoiled(2, 5),
    "reserve": {**spoiled(2, 5, 5), "four gates": torch.randn(2, 4, 5)},
}
TABLE = {
    "conv_pool2d": (conv_operands, CONV),
    "conv_pool2d_train": (conv_operands, CONV),
    "conv_pool2d_backward": (conv_backward_operands, CONV_BACKWARD),
    "lstm": (lstm_operands, LSTM),
    "lstm_train": (lstm_operands, LSTM),
    "lstm_backward": (lstm_backward_operands, LSTM_BACKWARD),
    "lstm_cell": (cell_operands, CELL),
    "lstm_cell_train": (cell_operands, CELL),
    "lstm_cell_backward": (cell_backward_operands, CELL_BACKWARD),
}


def wrong_code(value):
    """A code that points outside its window, or at padding: refused, or no gradient that is not finite."""
    operands = conv_backward_operands()
    operands["code"] = torch.full_like(operands["code"], value)
    return operators.conv_pool2d_backward(**operands)


def wrong_code_in_padding():
    operands = conv_operands() | {"pool_size": [3, 3], "pool_stride": [2, 2], "pool_padding": [1, 1]}
    y, code = operators.conv_pool2d_train(**operands)
    rest = {"code": torch.zeros_like(code), "need_x": True, "need_weight": True, "need_bias": True}
    return operators.conv_pool2d_backward(grad_y=torch.ones_like(y), **operands, **rest)


def spoil(operator, argument, value):
    operands, _ = TABLE[operator]
    return getattr(operators, operator)(**{**operands(), argument: value})


# (name, argument the message must name or None, function)
CASES = [
    (f"{operator}: {argument} {name}", argument, functools.partial(spoil, operator, argument, value))
    for operator, (_, table) in TABLE.items()
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


def main(start):
    for index, (name, _, function) in list(enumerate(CASES + OTHER_CASES))[start:]:
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
