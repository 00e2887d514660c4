"""The GPU benchmark of the convolution block, as far as a CPU can try it. Figures mean nothing here."""

import json
from argparse import Namespace

import pytest
import torch

from benchmarks import gpu_conv_pool as gpu
from benchmarks.cases.conv_pool import CASES, ConvPoolCase

SMALL = [
    ConvPoolCase(2, 1, 8, 4),
    ConvPoolCase(1, 3, 13, 5, padding=3, kernel=7, stride=2, window=3, step=2, margin=1),
    ConvPoolCase(2, 5, 12, 4, kernel=5, dims=1),
]
ARGUMENTS = Namespace(device="cpu", rounds=3, no_compile=True)


def test_the_grid_is_that_of_the_cpu_at_eight_times_the_batch():
    assert [(c.n, c.c, c.s, c.k) for c in gpu.grid(False)] == [(8 * c.n, c.c, c.s, c.k) for c in CASES]
    assert 0 < len(gpu.grid(True)) < len(CASES)
    assert set(gpu.DTYPES) == {"fp32", "tf32", "bf16", "fp16"}


def test_the_fewest_bytes():
    """Of x [2, 1, 8, 8], weight [4, 1, 3, 3] and y [2, 4, 3, 3], in two bytes an element."""
    case, x, weight, y = SMALL[0], 128, 36, 72
    assert gpu.least_bytes(case, gpu.FORWARD, 2) == 2 * (x + weight + y)
    # forward, and x, the gradients of y and of weight, weight again, and codes written and read
    assert gpu.least_bytes(case, "training", 2) == 2 * (x + weight + y) + 2 * (x + 2 * weight + y) + 2 * y


@pytest.mark.parametrize("precision", gpu.DTYPES)
@pytest.mark.parametrize("phase", gpu.PHASES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_record(case, phase, precision):
    record = gpu.measure(case, precision, phase, ARGUMENTS, gpu.HostTimer())
    assert record["status"] in ("ok", "void")
    layouts = {gpu.OURS_NHWC, gpu.STOCK_NHWC} if case.dims == 2 and case.c > 1 else set()
    assert set(record["seconds"]) == {gpu.OURS, gpu.STOCK, gpu.CONTROL} | layouts
    assert set(record["peak_bytes"]) == set(record["seconds"]) - {gpu.CONTROL}
    assert record["ratios"][gpu.best_peer(record)] > 0
    assert record["flop"] == case.flop(phase)


def test_ours_computes_what_the_stock_module_does():
    for case in SMALL:
        work = gpu.Workload(case, "fp32", "cpu", compiled=False)
        x = work.inputs[gpu.STOCK][0]
        torch.testing.assert_close(work.modules[gpu.OURS](x), work.modules[gpu.STOCK](x))


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu.Workload, "errors", lambda self: (1.0, 0.1, 0.1))
    record = gpu.measure(SMALL[0], "fp32", gpu.FORWARD, ARGUMENTS, gpu.HostTimer())
    assert record["status"] == "wrong"
    assert "seconds" not in record


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "grid", lambda quick: SMALL)
    gpu.main(
        ["--device", "cpu", "--rounds", "3", "--no-compile", "--precision", "fp32", "--out", str(tmp_path)]
    )
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(result["records"]) == len(gpu.PHASES) * len(SMALL)
    assert result["left_out"] == 0
    assert result["bandwidth"] > 0
    text = next(tmp_path.glob("*.md")).read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    for case in SMALL:
        assert case.name in text
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000


def test_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "grid", lambda quick: SMALL)
    gpu.main(["--device", "cpu", "--limit", "-1", "--out", str(tmp_path)])
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert (result["records"], result["left_out"]) == ([], 4 * len(gpu.PHASES) * len(SMALL))
