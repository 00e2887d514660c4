"""The benchmarks: cases, the checking of every contender, and what a report may not hide."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # at the end: an installed cnnrnn_ext keeps its place

from benchmarks import cases, gpu_conv_pool, limits, measure, peers, plot, report
from benchmarks.peers import OURS, STOCK
from cnnrnn_ext import _timing

COMPLETE = {
    "family": "conv_pool",
    "group": "conv_pool",
    "dtype": "float32",
    "tolerance": None,
    "case": "1×1×8² → 2",
    "phase": "forward",
    "threads": 2,
    "allocator": "tuned",
    "input_grad": False,
    "flop": 2e6,
    "reads": {"bytes": 1000, "from_bytes": 1000},
    "skipped": {},
    "kernels": ["conv_pool2d: cpu/avx2"],
    "errors": {"output": {"ours": 1e-6, "torch": 2e-6, "limit": 4e-6, "scale": 1.0}},
    "attempts": 1,
    "rounds": 4,
}


def record(ours_ms, stock_ms, peer_ms, control=1.0, **changes):
    """A record with these times; every round the same."""
    milliseconds = {OURS: ours_ms, STOCK: stock_ms, "ONNX Runtime": peer_ms, "control": stock_ms * control}
    seconds = {name: [1e-3 * value] * 4 for name, value in milliseconds.items()}
    return {**COMPLETE, **measure.summary(_timing.Timings(seconds, STOCK)), **changes}


LIMITS = {"fma_gflops": {"2": 4.0}, "read_gbs": {"L2": {"2": 2.0}}, "bytes_per_thread": {"L2": {"2": 1}}}


def assembled(*records, machine=LIMITS):
    return report.assemble(list(records), machine, cores=2, quick=False)


def rows(result):
    """The cells of every table row that describes a case."""
    lines = report.markdown(result).splitlines()
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("| 1×1×8²")]


def test_losses_are_shown_like_wins():
    result = assembled(record(2.0, 8.0, 4.0), record(8.0, 8.0, 4.0), record(4.0, 8.0, 4.1))
    win, loss, even = rows(result)
    assert (win[1], win[2], win[3]) == ("2.00", "8.00 (4.00)", "4.00 (2.00)")
    assert win[4:6] == ["ONNX Runtime 2.00 (2.00–2.00)", "**win**"]
    assert loss[4:6] == ["ONNX Runtime 0.50 (0.50–0.50)", "**loss**"]
    assert even[5] == "**even**"  # 1.025 is less than what the control may err
    assert "1 wins, 1 losses, 1 undecided" in report.headline(result)


def test_best_peer_is_the_fastest_even_if_it_is_stock():
    assert record(2.0, 3.0, 4.0)["best_peer"] == STOCK
    assert record(2.0, 4.0, 3.0)["best_peer"] == "ONNX Runtime"


def test_void_control_voids_the_report_in_its_first_line(tmp_path):
    good, bad = record(2.0, 8.0, 4.0), record(2.0, 8.0, 4.0, control=1.2)
    assert (good["status"], bad["status"]) == ("ok", "void")
    result = assembled(good, bad)
    assert report.headline(result).startswith("VOID, conv_pool, tuned allocator, 2 thread(s)")
    assert rows(result)[1][5] == "**void**"
    assert report.headline(assembled(good)).startswith("Against the best peer")
    written = report.write(result, tmp_path)
    assert {path.suffix for path in written} >= {".json", ".md"}
    assert all(path.stat().st_size > 500 for path in written)
    assert "VOID" in (tmp_path / f"{report.slug(result)}.md").read_text(encoding="utf-8")


def test_wrong_record_is_not_timed_but_named():
    error = {"ours": 5e-6, "torch": 2e-6, "limit": 4e-6, "scale": 1.0}
    wrong = {**COMPLETE, "status": "wrong", "errors": {"grad bias": error}}
    result = assembled(record(2.0, 8.0, 4.0), wrong)
    assert "WRONG" in report.headline(result)
    (first, second) = rows(result)
    assert len(first) == len(second)
    assert "grad bias: 5.0e-06, torch 2.0e-06, limit 4.0e-06" in second


def test_missing_peer_is_named(monkeypatch):
    monkeypatch.setattr(
        report, "PEERS", (*peers.PEERS, peers.Peer("Absent", None, packages=("no-such-package",)))
    )
    assert "Absent (no-such-package not installed)" in report.headline(assembled(record(2.0, 8.0, 4.0)))


def test_limits_stand_beside_the_figures_or_are_named_missing():
    # 2e6 operations in 2 ms are 1 of 4 GFLOP/s; 1000 bytes in 2 ms are 0.5 of 2000 MB/s.
    (row,) = rows(assembled(record(2.0, 8.0, 4.0)))
    assert row[7] == "25 %"
    missing = assembled(record(2.0, 8.0, 4.0), machine={"not_measured": "no C compiler found"})
    assert rows(missing)[0][7:9] == ["–", "–"]
    assert "not measured (no C compiler found)" in report.markdown(missing)


def test_figures_of_ours_beside_ours():
    seconds = {OURS: [1.0] * 4, STOCK: [3.0] * 4, f"{OURS} padded": [1.5] * 4, "control": [3.0] * 4}
    timed = measure.summary(_timing.Timings(seconds, STOCK), [f"{OURS} padded"])
    assert timed["best_peer"] == STOCK  # a variant of ours is no peer, however fast
    result = assembled({**COMPLETE, **timed, "variant": {"name": "padded", "cost": 1.6}})
    assert rows(result)[0][5] == "padded 1.50 (steps 1.60)"


def test_error_of_narrow_weights_is_shown_with_its_limit():
    error = {"ours": 4e-3, "torch": 1e-7, "limit": 2e-2, "scale": 2.0}
    narrow = record(2.0, 8.0, 4.0, tolerance=0.01, errors={"output": error})
    assert rows(assembled(narrow))[0][-2] == "2.0e-03 (limit 1e-02)"


def test_means_are_geometric_per_group_and_leave_out_what_does_not_count():
    void = record(1.0, 100.0, 100.0, control=1.2)
    kept = [record(2.0, 8.0, 4.0), record(1.0, 16.0, 8.0), record(1.0, 2.0, 3.0, group="other")]
    default = record(1.0, 100.0, 100.0, allocator="default")
    first, second = report.means([*kept, void, default])
    assert (first.records, first.eager, first.best) == (2, pytest.approx(8.0), pytest.approx(4.0))
    assert (first.eager_least, first.best_least) == (4.0, 2.0)
    assert (second.group, second.best) == ("other", 2.0)


def test_left_out_peers_are_named_with_their_reason():
    result = assembled(record(2.0, 8.0, 4.0, skipped={"torch.compile": "takes no such thing"}))
    assert "torch.compile: takes no such thing (1 records: conv_pool 1×1×8² → 2, forward)" in report.markdown(
        result
    )


def test_a_crash_is_in_the_first_line():
    result = assembled(record(2.0, 8.0, 4.0)) | {"crashes": ["tuned allocator, 2 thread(s): exit status -11"]}
    assert report.headline(result).startswith("CRASHED, tuned allocator, 2 thread(s): exit status -11")


@pytest.mark.parametrize(
    ("ms", "text"), [(128.634, "128.63"), (1.0, "1.00"), (0.0312345, "0.0312"), (0.5, "0.500")]
)
def test_short_times_keep_their_digits(ms, text):
    assert report.time_text(ms) == text


def test_every_picture_that_the_report_shows_is_drawn(tmp_path):
    result = assembled(record(2.0, 8.0, 4.0), record(2.0, 8.0, 4.0, family="cell", phase="training"))
    drawn = plot.draw(result, tmp_path)
    shown = [line.split("(")[-1].rstrip(")") for line in report.markdown(result).splitlines() if "![" in line]
    assert [path.name for path in drawn] == shown
    assert all(path.stat().st_size > 5000 for path in drawn)


TINY_RNN = cases.RNNCase("lstm", 8, 3, 5, 4)
TINY = (
    cases.ConvPoolCase(2, 4, 9, 3),
    cases.ConvPoolCase(2, 3, 8, 5, padding=1),
    cases.ConvPoolCase(2, 5, 9, 3, padding=2, kernel=5, window=3, step=2, margin=1, h=11),
    cases.ConvPoolCase(1, 15, 6, 5, padding=1, window=1),
    cases.ConvPoolCase(2, 4, 20, 3, kernel=5, dims=1),
    TINY_RNN,
    dataclasses.replace(TINY_RNN, cell="gru", layers=2, bidirectional=True, batch_first=True),
    dataclasses.replace(TINY_RNN, cell="rnn_tanh", state=True),
    dataclasses.replace(TINY_RNN, form="packed"),
    dataclasses.replace(TINY_RNN, cell="gru", form="lengths"),
    dataclasses.replace(TINY_RNN, form="resets"),
    dataclasses.replace(TINY_RNN, dtype=torch.bfloat16),
    *(cases.CellCase(cell, 3, 4) for cell in ("lstm", "gru", "rnn_tanh")),
)


def stand_in(build):
    return peers.Peer(OURS, build), peers.Peer(STOCK, peers._eager)


@pytest.fixture
def quick_clock(monkeypatch):
    """Records without their pauses: what is tested here is the checking, not the clock."""
    monkeypatch.setattr(
        measure,
        "paired",
        lambda runs, rounds, control: _timing.Timings(
            {name: [1.0] * rounds for name in (*runs, "control")}, control
        ),
    )
    monkeypatch.setattr(measure, "kernels_of", lambda run: [])


def names(case):
    return f"{case.family} {case.name}"


@pytest.mark.parametrize("phase", cases.PHASES)
@pytest.mark.parametrize("case", TINY, ids=names)
def test_record_checks_every_output_and_gradient(case, phase, quick_clock):
    result = measure.record(case, phase, 1, "tuned", stand_in(peers._eager), rounds=2)
    assert result["status"] == "ok"
    parameters = {"grad " + name for name, _ in case.stock().named_parameters()}
    expected = set(case.output_names()) if phase == "forward" else {"output"} | parameters
    if phase == "training" and case.input_grad:
        expected |= {"grad input"}
    assert set(result["errors"]) == expected
    coarse = 1e-5 if case.dtype == torch.float32 else 0.5
    assert all(0 < e["torch"] < coarse and e["ours"] == e["torch"] for e in result["errors"].values())


@pytest.mark.parametrize("phase", cases.PHASES)
@pytest.mark.parametrize("case", TINY, ids=names)
def test_our_modules_compute_every_case(case, phase, quick_clock):
    """Each module with its keywords, against float64: what a case of that kind asks of it exists."""
    result = measure.record(case, phase, 1, "tuned", stand_in(peers.ours), rounds=2)
    assert result["status"] == "ok", report.worst_error(result)
    variant = case.variant and f"{OURS} {case.variant[0]}"
    assert set(result["contenders"]) == {OURS, STOCK, "control"} | ({variant} if variant else set())


@pytest.mark.parametrize("case", TINY, ids=names)
def test_record_refuses_a_wrong_contender(case, quick_clock):
    def off_in_one_gradient(problem):
        run = peers._eager(problem)
        off = 1e-4 if case.dtype == torch.float32 else 10.0
        return peers.Run(lambda: [t + off if i == 1 else t for i, t in enumerate(run.results())])

    result = measure.record(case, "training", 1, "tuned", stand_in(off_in_one_gradient), rounds=2)
    assert result["status"] == "wrong"
    assert "contenders" not in result


def test_tolerance_stands_for_torchs_error_where_there_is_none(quick_clock):
    case = dataclasses.replace(TINY_RNN, weight_dtype=torch.int8)

    def off(by):
        def build(problem):
            run = peers._eager(problem)
            return peers.Run(lambda: [t + by * t.abs().max() for t in run.results()])

        return build

    for by, status in ((0.015, "ok"), (0.025, "wrong")):
        found = measure.record(case, "forward", 1, "tuned", stand_in(off(by)), rounds=2)["status"]
        assert found == status


def test_a_failure_of_ours_is_a_wrong_record_and_not_the_end(quick_clock):
    def failing(problem):
        raise AttributeError("no such module")

    result = measure.record(TINY_RNN, "forward", 1, "tuned", stand_in(failing), rounds=2)
    assert (result["status"], report.worst_error(result)) == ("wrong", "AttributeError: no such module")
    assert "AttributeError: no such module" in report.markdown(assembled(result))


def test_a_peer_that_fails_or_computes_something_else_is_left_out(quick_clock):
    def failing(problem):
        raise RuntimeError("no such operator")

    def other(problem):
        run = peers._eager(problem)
        return peers.Run(lambda: [t * 1.1 for t in run.results()])

    contenders = (
        *stand_in(peers._eager),
        peers.Peer("failing", failing),
        peers.Peer("other", other),
        peers.Peer("absent", failing, packages=("no-such-package",)),
        peers.Peer("barred", failing, barred="no_compile"),
    )
    result = measure.record(TINY_RNN, "forward", 1, "tuned", contenders, rounds=2)
    assert set(result["contenders"]) == {OURS, STOCK, "control"}
    assert result["skipped"]["failing"] == "RuntimeError: no such operator"
    assert result["skipped"]["other"].startswith("computes something else")
    assert result["skipped"]["absent"] == "no-such-package not installed"
    assert result["skipped"]["barred"] == TINY_RNN.no_compile


@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
@pytest.mark.parametrize("case", TINY, ids=names)
def test_bound_peers_compute_every_case_that_they_take(case, name, quick_clock):
    (peer,) = (p for p in peers.PEERS if p.name == name)
    if reason := peer.missing():
        pytest.skip(reason)
    result = measure.record(case, "forward", 1, "tuned", (*stand_in(peers._eager), peer), rounds=2)
    assert name in (result["skipped"] if case.no_onnx else result["contenders"]), result["skipped"]


def test_lengths_are_uniform_in_their_range_and_cost_what_they_are():
    case = cases.RNNCase("gru", 40, 200, 3, 4, form="lengths")
    lengths = case.lengths()
    assert lengths.min() >= 10
    assert lengths.max() == 40
    assert lengths.double().mean() == pytest.approx(25, abs=2)
    padded = case.variant[1]
    assert padded.flop("forward") / case.flop("forward") == pytest.approx(40 * 200 / lengths.sum().item())
    assert case.variant_cost == padded.flop("forward") / case.flop("forward")


def test_operations_and_bytes_of_a_stack():
    case = cases.RNNCase("gru", 10, 2, 5, 4, layers=2, bidirectional=True)
    elements = 2 * 3 * 4 * (5 + 4) + 2 * 3 * 4 * (8 + 4)  # directions × gates × H × (input + H), two layers
    assert case.flop("forward") == 2 * 10 * 2 * elements
    recurrent = 4 * 2 * (2 * 3 * 4 * 4)
    assert case.reads("forward") == (10 * recurrent + 4 * (2 * 3 * 4 * (5 + 8) + 10 * 2 * 5), recurrent // 2)


def test_upstream_gradient_is_zero_only_at_near_ties():
    case = TINY[0]
    stock, x = case.stock().double(), case.input().double()
    assert (case.upstream(stock, x) != 0).float().mean() > 0.95
    torch.nn.init.zeros_(stock[0].weight)  # every window is now one big tie, above zero
    torch.nn.init.ones_(stock[0].bias)
    assert (case.upstream(stock, x) == 0).all()


def test_grids_are_those_promised():
    count = {f: sum(c.family == f for c in cases.CASES) for f in cases.FAMILIES}
    assert count == {
        "conv_pool": 35,
        "lstm": 10,
        "gru": 10,
        "rnn_tanh": 10,
        "variable": 6,
        "streaming": 15,
        "cell": 24,
        "bfloat16": 3,
        "narrow": 6,
        "workload": 17,
    }
    assert len({names(c) for c in cases.CASES}) == len(cases.CASES)
    quick = {c.family for c in cases.select(quick=True)}
    assert quick == set(cases.FAMILIES) - {"bfloat16"}
    assert {c.family for c in cases.select("lstm")} == {"lstm"}
    assert [c.name for c in cases.select(text="gru cell n1 i64")] == ["GRU cell N1 I64 H64"]
    by_default = cases.select(allocator="default")
    assert {c.family for c in by_default} == {"conv_pool", "lstm"}
    assert len(by_default) == 14


def test_limits_without_a_compiler_are_not_measured(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(limits.shutil, "which", lambda name: None)
    with pytest.raises(limits.NotMeasuredError, match="no C compiler"):
        limits.measure([1])


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_limit_loops_do_the_work_they_are_timed_for():
    library = limits._load()
    flop = library.flop_per_iteration()
    assert library.fma_loop(1) == pytest.approx(0.001 * flop / 2)  # every lane of every chain: 0 * x + 0.001
    ones = limits._aligned_ones(1 << 16)
    assert library.read_loop(ones.ctypes.data, ones.size, 3) == 3 * ones.size  # every float read three times


# ---- on a GPU ----


def test_gpu_grid_of_conv_pool(monkeypatch, tmp_path):
    """The program runs from case to table, on the CPU: every record is checked, and its costs are right."""
    case = cases.ConvPoolCase(2, 4, 9, 5, padding=1)
    monkeypatch.setattr(gpu_conv_pool, "grid", lambda quick: [case])
    options = [
        "--device",
        "cpu",
        "--no-compile",
        "--rounds",
        "2",
        "--precision",
        "fp32",
        "--out",
        str(tmp_path),
    ]
    gpu_conv_pool.main(options)
    (path,) = tmp_path.glob("*.json")
    forward, training = json.loads(path.read_text())["records"]
    assert forward["kernel"].startswith("cpu")
    assert set(forward["seconds"]) == {
        "ours", "ours, channels_last", "eager", "eager, channels_last", "eager again",
    }  # fmt: skip
    assert forward["flop"] == 2 * 2 * 5 * 4 * 9 * 9 * 9
    assert training["flop"] == 3 * forward["flop"]
    x, weights, y = 2 * 4 * 9 * 9, 5 * 4 * 9, 2 * 5 * 4 * 4
    assert forward["least_bytes"] == 4 * (x + weights + y)
    assert training["least_bytes"] == 4 * (3 * x + 3 * weights + 2 * y) + 2 * y
    assert f"| {case.name} | fp32 | training |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()


def test_gpu_grid_tells_a_wrong_result(monkeypatch):
    case = cases.ConvPoolCase(1, 2, 8, 3)
    monkeypatch.setattr(cases.ConvPoolCase, "ours", lambda self, stock: _Halved(self.block.ours(stock)))
    args = gpu_conv_pool.parse(["--device", "cpu", "--no-compile"])
    record = gpu_conv_pool.measure(case, "fp32", "forward", args, gpu_conv_pool.HostTimer())
    assert record["status"] == "wrong"
    assert "seconds" not in record


class _Halved(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def load_state_dict(self, state):
        self.module.load_state_dict(state)

    def forward(self, x):
        return self.module(x) / 2
