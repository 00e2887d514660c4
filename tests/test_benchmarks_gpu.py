"""The GPU benchmark, as far as a CPU can try it: its grid, records and report. Figures mean nothing here."""

import json
from itertools import pairwise

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


ALONE = {gpu.OURS, gpu.STOCK}


@pytest.mark.parametrize("extra", [(), (gpu.SELF,)], ids=["alone", "control"])
@pytest.mark.parametrize("point", SMALL.values(), ids=SMALL)
def test_the_records_of_a_point(point, extra):
    records = gpu.measure(point, "cpu", gpu.HostTimer(), rounds=3, extra=extra)
    assert [record["phase"] for record in records] == list(gpu.PHASES)
    for record in records:
        assert record["kernel"].startswith("cpu")
        assert set(record["seconds"]) == ALONE | set(extra)
        assert set(record["ratios"]) == {gpu.STOCK, *extra}
        assert record["rounds"] == 3
        assert gpu.best_peer(record) == (gpu.STOCK, record["ratios"][gpu.STOCK])
        if extra:
            assert (record["status"] == "ok") == (abs(record["control"] - 1) <= 0.05)
        else:
            assert (record["status"], record["control"]) == ("ok", None)


def test_ours_and_the_stock_module_agree_on_lengths():
    work = gpu.Workload(SMALL["lengths"], "cpu")
    x = work.inputs[0]
    torch.testing.assert_close(work.output(gpu.OURS, x), work.output(gpu.STOCK, x))


def test_rounds_read_other_inputs(monkeypatch):
    """Neighbouring rounds never read the same part of the buffer."""
    read, run = [], gpu.Workload.output

    def output(self, contender, x):
        read.append((contender, x.data_ptr()))
        return run(self, contender, x)

    monkeypatch.setattr(gpu.Workload, "output", output)
    gpu.measure(SMALL["plain"], "cpu", gpu.HostTimer(), rounds=4)
    places = [place for contender, place in read if contender == gpu.STOCK][-5:]
    assert all(a != b for a, b in pairwise(places))


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu.Workload, "error", lambda self: 1.0)
    for record in gpu.measure(SMALL["plain"], "cpu", gpu.HostTimer(), rounds=3):
        assert record["status"] == "differs from torch.nn by 1.0e+00"
        assert "seconds" not in record


class Clock:
    """A timer whose calls take the seconds that are written down for them."""

    def __init__(self, each):
        self.now, self.each = 0.0, each

    def time(self, calls):
        self.now += self.each * len(calls)
        return [self.each] * len(calls)


@pytest.mark.parametrize(("each", "rounds"), [(0.001, 11), (0.01, 7), (1.0, 3)])
def test_a_point_gets_as_many_rounds_as_its_share_allows(each, rounds):
    records = gpu.measure(SMALL["plain"], "cpu", Clock(each), rounds=11, seconds=0.21)
    assert records[1]["rounds"] == rounds


def test_the_whole_grid_comes_in_time():
    """At twice the predicted time of a round, and with all that happens beside the rounds, each point has its
    turn within the limit."""
    points, clock = list(gpu.grid()), Clock(0)
    pace = gpu.Pace(points, 330, clock=lambda: clock.now)
    for point in points:
        assert pace.left > 0
        share = pace.begin(point)
        each = share / 8
        clock.now += 0.05 + each * gpu.rounds_within(share, 11)(each)
    assert clock.now < 360


def test_the_plan_needs_no_gpu(capsys):
    gpu.main(["--plan"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(list(gpu.grid()))
    assert lines[0].startswith("LSTM fp16 T1024 N16 H768")
    assert lines[-1].startswith("576 points")
    seconds = sum(float(line.split()[-2]) for line in lines[:-1])
    assert abs(seconds - 330) < 3


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "grid", lambda quick: iter(SMALL.values()))
    gpu.main(["--device", "cpu", "--rounds", "3", "--no-compile", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["records"]) == 2 * len(SMALL)
    assert result["left_out"] == 0
    text = path.with_suffix(".md").read_text()
    for point in SMALL.values():
        assert point.name in text
    assert path.with_suffix(".png").stat().st_size > 10_000

    result["records"][0]["ratios"] = {gpu.STOCK: 0.25}  # a recorded run, drawn anew
    path.write_text(json.dumps(result))
    path.with_suffix(".png").unlink()
    gpu.main(["--report", str(path)])
    anew = path.with_suffix(".md").read_text()
    assert "| torch.nn | 0.25" in anew
    assert path.with_suffix(".png").exists()


def test_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "grid", lambda quick: iter(SMALL.values()))
    gpu.main(["--device", "cpu", "--limit", "-1", "--out", str(tmp_path)])
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert (result["records"], result["left_out"]) == ([], 2 * len(SMALL))
