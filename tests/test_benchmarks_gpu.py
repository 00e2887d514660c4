"""The GPU benchmark, as far as a CPU can try it: its grid, records and report. Figures mean nothing here."""

import json

import pytest
import torch

from benchmarks import gpu


def test_the_grid_is_complete():
    points = list(gpu.grid())
    assert len(set(points)) == len(points)
    plain = {(p.cell, p.dtype, p.t, p.n, p.h) for p in points if p.layers == 1 and not p.lengths}
    assert len(plain) == 2 * 4 * 2 * 5 * 7
    assert points[0] == gpu.Point("LSTM", "fp16", 1024, 16, 768)
    assert {(p.dtype, p.layers, p.bidirectional, p.h) for p in points if p.layers > 1} == {
        (dtype, 2, True, 256) for dtype in gpu.DTYPES
    }


SMALL = {
    "plain": gpu.Point("LSTM", "fp32", 3, 2, 8),
    "lengths": gpu.Point("GRU", "fp32", 4, 3, 8, lengths=True),
    "both ways": gpu.Point("GRU", "fp32", 3, 2, 8, layers=2, bidirectional=True),
}


@pytest.mark.parametrize("phase", gpu.PHASES)
@pytest.mark.parametrize("point", SMALL.values(), ids=SMALL)
def test_a_record(point, phase):
    record = gpu.measure(point, phase, "cpu", compiled=False, rounds=3, timer=gpu.HostTimer())
    assert record["status"] in ("ok", "void")
    assert record["kernel"].startswith("cpu")
    assert set(record["seconds"]) == {gpu.OURS, gpu.STOCK, gpu.SELF}
    assert set(record["ratios"]) == {gpu.STOCK, gpu.SELF}
    assert gpu.best_peer(record) == (gpu.STOCK, record["ratios"][gpu.STOCK])


def test_ours_and_the_stock_module_agree_on_lengths():
    work = gpu.Workload(SMALL["lengths"], "cpu", compiled=False)
    x = work.inputs[0]
    torch.testing.assert_close(work.output(gpu.OURS, x), work.output(gpu.STOCK, x))


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu.Workload, "error", lambda self: 1.0)
    record = gpu.measure(SMALL["plain"], "forward", "cpu", compiled=False, rounds=3, timer=gpu.HostTimer())
    assert record["status"] == "differs from torch.nn by 1.0e+00"
    assert "seconds" not in record


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "grid", lambda quick: iter(SMALL.values()))
    gpu.main(["--device", "cpu", "--rounds", "3", "--no-compile", "--out", str(tmp_path)])
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(result["records"]) == 2 * len(SMALL)
    assert result["left_out"] == 0
    text = next(tmp_path.glob("*.md")).read_text()
    for point in SMALL.values():
        assert point.name in text
    assert next(tmp_path.glob("*.png")).stat().st_size > 10_000


def test_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "grid", lambda quick: iter(SMALL.values()))
    gpu.main(["--device", "cpu", "--limit", "-1", "--out", str(tmp_path)])
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert (result["records"], result["left_out"]) == ([], 2 * len(SMALL))
