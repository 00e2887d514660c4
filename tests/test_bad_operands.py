"""Wrong operands of the raw operators: torch's exception type, the argument named, no crash."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _oracle import compiled_missing
from _raw_cases import CASES, GOOD_CASES, OTHER_CASES

import cnnrnn_ext as cx

HERE = Path(__file__).parent


# ---- raw operators, in a process that may crash ----


def run_raw_cases():
    """{case name: {"type", "message"} or {"crash": return code}}."""
    cases = CASES + OTHER_CASES + GOOD_CASES
    outcomes, start = {}, 0
    environment = {**os.environ, "PYTHONPATH": str(Path(cx.__file__).parent.parent), "MALLOC_CHECK_": "3"}
    while start < len(cases):
        process = subprocess.run(
            [sys.executable, str(HERE / "_raw_cases.py"), str(start)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
        for line in lines:
            if "end" in line:
                outcomes[cases[line["end"]][0]] = line
        begun = [line["begin"] for line in lines if "begin" in line]
        if not begun:
            raise RuntimeError(f"the cases did not start: {process.stderr[-2000:]}")
        start = begun[-1] + 1
        if process.returncode:
            outcomes[cases[begun[-1]][0]] = {"crash": process.returncode, "message": process.stderr[-500:]}
    return outcomes


@pytest.fixture(scope="module")
def raw_outcomes():
    return run_raw_cases()


# The shape of weight_hh says what H is: a wrong one shows as a state that does not fit it. Which cell it is
# says which states and gates there are; batch_sizes says whether x is packed, and how many rows there are.
ALSO_NAMES = {
    "weight_hh": ("h_0:", "h:"),
    "batch_sizes": ("x:", "h_0:"),
    "scale_ih": ("scale",),
    "scale_hh": ("scale",),
}


@pytest.mark.parametrize(("name", "argument"), [case[:2] for case in CASES], ids=[case[0] for case in CASES])
def test_raw_operator_refuses(raw_outcomes, name, argument):
    outcome = raw_outcomes[name]
    assert "crash" not in outcome, outcome
    assert outcome["type"] in ("RuntimeError", "TypeError", "ValueError"), "accepted in silence"
    if compiled_missing() is None:
        names = (argument, *ALSO_NAMES.get(argument, ()))
        assert any(n in outcome["message"] for n in names), outcome["message"]


@pytest.mark.parametrize("name", [case[0] for case in GOOD_CASES])
def test_raw_operator_takes_the_operands_that_the_cases_spoil(raw_outcomes, name):
    assert raw_outcomes[name].get("type", "") is None, raw_outcomes[name]


@pytest.mark.parametrize("name", [case[0] for case in OTHER_CASES])
def test_raw_operator_survives(raw_outcomes, name):
    assert "crash" not in raw_outcomes[name], raw_outcomes[name]


def test_code_outside_its_window_passes_no_gradient(compiled):
    """A forged code names no position: nothing is written, as for a dead window."""
    x, weight = torch.randn(1, 1, 6, 6), torch.randn(2, 1, 3, 3)
    config = ([1, 1], [0, 0], [1, 1], 1, "relu", "max", [2, 2], [2, 2], [0, 0], False)
    y, code, _ = torch.ops.cnnrnn_ext.conv_pool2d_train(x, weight, None, *config)
    for value in (4, 5, 100, 254, 255):
        grads = torch.ops.cnnrnn_ext.conv_pool2d_backward(
            torch.ones_like(y),
            x,
            weight,
            None,
            torch.full_like(code, value),
            None,
            *config,
            True,
            True,
            False,
        )
        assert not grads[0].any()
        assert not grads[1].any()
