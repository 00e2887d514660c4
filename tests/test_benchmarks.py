"""The benchmark harness itself: pairing, statistics, the control, and what a report may not hide."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # at the end: an installed cnnrnn_ext keeps its place

from benchmarks import cases, limits, measure, peers, report
from benchmarks.peers import OURS, STOCK
from cnnrnn_ext import _timing


class FakeMachine:
    """A clock that only calls advance, and a log of everything that happened."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def contender(self, name, costs):
        """A callable whose i-th call takes ``costs(i)`` seconds."""
        calls = iter(range(1_000_000))

        def run():
            self.log.append(name)
            self.now += costs(next(calls))

        return run

    def sleep(self, seconds):
        self.log.append(seconds)

    def paired(self, contenders, rounds, **options):
        options = {"warmup": 0, "turn_s": 0.0} | options
        return _timing.paired(contenders, rounds, clock=lambda: self.now, sleep=self.sleep, **options)


def test_each_turn_is_a_pause_one_uncounted_call_and_counted_calls():
    machine = FakeMachine()
    # The uncounted call of every turn is slow; it must not show in the figures.
    slow_first = machine.contender("a", lambda i: 9.0 if i % 4 == 0 else 1.0)
    timings = machine.paired({"a": slow_first}, rounds=2, turn_s=2.5)
    assert machine.log == [0.1, "a", "a", "a", "a"] * 2
    assert timings.seconds == {"a": [1.0, 1.0]}


def test_warmup_calls_are_not_counted_and_calls_per_turn_are_bounded():
    machine = FakeMachine()
    run = machine.contender("a", lambda i: 5.0 if i < 3 else 0.001)
    timings = machine.paired({"a": run}, rounds=2, warmup=3, turn_s=1.0, max_calls=4)
    assert machine.log == ["a"] * 3 + [0.1, *["a"] * 5] * 2
    assert timings.min_ms("a") == pytest.approx(1.0)
    assert timings.median_ms("a") == pytest.approx(1.0)


def test_order_rotates_and_neighbours_change():
    machine = FakeMachine()
    machine.paired({name: machine.contender(name, lambda _: 1.0) for name in "abc"}, rounds=6)
    turns = [entry for entry in machine.log if entry != 0.1][::2]
    rounds = ["".join(turns[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]


def test_two_contenders_change_places():
    machine = FakeMachine()
    machine.paired({name: machine.contender(name, lambda _: 1.0) for name in "ab"}, rounds=4)
    turns = "".join(entry for entry in machine.log if entry != 0.1)[::2]
    assert turns == "abbabaab"


def test_ratios_are_paired_by_round():
    # The machine drifts by 100×: the median times of a and b tell nothing, the paired ratios everything.
    seconds = {"a": [2.0, 30.0, 400.0, 5.0], "b": [1.0, 10.0, 100.0, 1.0]}
    ratio = _timing.Timings(seconds).ratio("a", "b")
    assert (ratio.p25, ratio.median, ratio.p75) == (2.75, 3.5, 4.25)


@pytest.mark.parametrize(("second", "valid"), [(1.0, True), (1.04, True), (1.06, False), (0.94, False)])
def test_control_beyond_five_percent_is_void(second, valid):
    timings = _timing.Timings({"a": [1.0] * 3, "control": [1.0, second, second]}, control_of="a")
    assert timings.control.median == second
    assert timings.valid is valid


def test_control_is_a_second_turn_of_the_same_contender():
    machine = FakeMachine()
    runs = {name: machine.contender(name, lambda _: 1.0) for name in ("stock", "ours")}
    timings = machine.paired(runs, rounds=3, control="stock")
    assert machine.log.count("stock") == 2 * machine.log.count("ours") == 12
    assert set(timings.seconds) == {"stock", "ours", "control"}
    assert timings.valid


def test_without_control_nothing_is_valid():
    assert not _timing.Timings({"a": [1.0, 1.0]}).valid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1}, "rounds"),
        ({"rounds": 2, "pause_s": 0.05}, "pause_s"),
        ({"rounds": 2, "control": "b"}, "control"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _timing.paired({"a": lambda: None}, **options)


COMPLETE = {
    "family": "conv_pool",
    "case": "1×1×8² → 2",
    "phase": "forward",
    "threads": 2,
    "allocator": "tuned",
    "input_grad": False,
    "flop": 2e6,
    "reads": {"bytes": 1000, "from_bytes": 1000},
    "skipped": {},
    "kernels": ["conv_pool2d: cpu/avx2"],
    "errors": {"output": {"ours": 1e-6, "torch": 2e-6}},
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
    assert report.headline(result).startswith("VOID, tuned allocator, 2 thread(s)")
    assert rows(result)[1][5] == "**void**"
    assert report.headline(assembled(good)).startswith("Against the best peer")
    written = report.write(result, tmp_path)
    assert {path.suffix for path in written} >= {".json", ".md"}
    assert all(path.stat().st_size > 500 for path in written)
    assert "VOID" in (tmp_path / f"{report.slug(result)}.md").read_text(encoding="utf-8")


def test_wrong_record_is_not_timed_but_named():
    wrong = {**COMPLETE, "status": "wrong", "errors": {"grad bias": {"ours": 5e-6, "torch": 2e-6}}}
    result = assembled(record(2.0, 8.0, 4.0), wrong)
    assert "WRONG" in report.headline(result)
    (first, second) = rows(result)
    assert len(first) == len(second)
    assert "grad bias: 5.0e-06, torch 2.0e-06" in second


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


TINY = (cases.ConvPoolCase(2, 4, 9, 3), cases.ConvPoolCase(2, 3, 8, 5, padding=1), cases.LSTMCase(3, 2, 5, 4))


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


@pytest.mark.parametrize("phase", cases.PHASES)
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_record_checks_every_output_and_gradient(case, phase, quick_clock):
    result = measure.record(case, phase, 1, "tuned", stand_in(peers._eager), rounds=2)
    assert result["status"] == "ok"
    parameters = {"grad " + name for name, _ in case.stock().named_parameters()}
    outputs = {"output"} if case.family == "conv_pool" else {"output", "h_n", "c_n"}
    expected = outputs if phase == "forward" else {"output"} | parameters
    if phase == "training" and case.input_grad:
        expected |= {"grad input"}
    assert set(result["errors"]) == expected
    assert all(0 < e["torch"] < 1e-5 and e["ours"] == e["torch"] for e in result["errors"].values())


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_record_refuses_a_wrong_contender(case, quick_clock):
    def off_in_one_gradient(problem):
        run = peers._eager(problem)
        return lambda: [t + 1e-4 if i == 1 else t for i, t in enumerate(run())]

    result = measure.record(case, "training", 1, "tuned", stand_in(off_in_one_gradient), rounds=2)
    assert result["status"] == "wrong"
    assert "contenders" not in result


def test_a_peer_that_fails_or_computes_something_else_is_left_out(quick_clock):
    def failing(problem):
        raise RuntimeError("no such operator")

    def other(problem):
        run = peers._eager(problem)
        return lambda: [t * 1.1 for t in run()]

    contenders = (
        *stand_in(peers._eager),
        peers.Peer("failing", failing),
        peers.Peer("other", other),
        peers.Peer("absent", failing, packages=("no-such-package",)),
    )
    result = measure.record(TINY[0], "forward", 1, "tuned", contenders, rounds=2)
    assert set(result["contenders"]) == {OURS, STOCK, "control"}
    assert result["skipped"]["failing"] == "RuntimeError: no such operator"
    assert result["skipped"]["other"].startswith("computes something else")
    assert result["skipped"]["absent"] == "no-such-package not installed"


def test_upstream_gradient_is_zero_only_at_near_ties():
    case = TINY[0]
    stock, x = case.stock().double(), case.input().double()
    assert (case.upstream(stock, x) != 0).float().mean() > 0.95
    torch.nn.init.zeros_(stock[0].weight)  # every window is now one big tie, above zero
    torch.nn.init.ones_(stock[0].bias)
    assert (case.upstream(stock, x) == 0).all()


def test_grids_are_those_promised():
    assert [sum(c.family == f for c in cases.CASES) for f in cases.FAMILIES] == [7, 7]
    assert {c.family for c in cases.select(quick=True)} == set(cases.FAMILIES)
    assert {c.family for c in cases.select("lstm")} == {"lstm"}


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
