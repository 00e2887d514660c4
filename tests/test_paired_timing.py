"""Paired timing: turns, pauses, samples, the probe, the order, statistics and the control."""

import pytest

from cnnrnn_ext import _timing


class FakeMachine:
    """A clock that calls advance, and reading it by ``tick``; a log of everything that happened."""

    def __init__(self):
        self.now, self.tick, self.log = 0.0, 0.0, []

    def clock(self):
        self.now += self.tick
        return self.now

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
        return _timing.paired(contenders, rounds, clock=self.clock, sleep=self.sleep, **options)


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
    timings = machine.paired({"a": run}, rounds=2, warmup=3, warmup_s=99.0, turn_s=1.0, max_samples=4)
    assert machine.log == ["a"] * 3 + [0.1, *["a"] * 5] * 2
    assert timings.min_ms("a") == pytest.approx(1.0)
    assert timings.median_ms("a") == pytest.approx(1.0)


def test_warmup_of_slow_calls_ends_after_two():
    machine = FakeMachine()
    machine.paired({"a": machine.contender("a", lambda _: 5.0)}, rounds=2, warmup=9, warmup_s=1.0)
    assert machine.log == ["a", "a", *[0.1, "a", "a"] * 2]


def test_short_calls_are_timed_together():
    machine = FakeMachine()
    run = machine.contender("a", lambda i: 9e-3 if i == 0 else 1e-3)  # the fastest warm-up call decides
    timings = machine.paired({"a": run}, rounds=2, warmup=2, turn_s=0.02, sample_s=5e-3)
    assert machine.log == ["a"] * 2 + [0.1, *["a"] * (1 + 4 * 5)] * 2  # four samples of five calls
    assert timings.median_ms("a") == pytest.approx(1.0)


def on_a_shared_core(machine, shared):
    """A contender that takes 1 s, and 2 s in calls where ``shared``; there the probe is slow too."""
    calls = iter(range(1_000_000))

    def run():
        slow = shared(next(calls))
        machine.now += 2.0 if slow else 1.0
        machine.tick = 2e-3 if slow else 1e-3

    return run


def test_samples_beside_a_slow_probe_do_not_count():
    machine = FakeMachine()
    run = on_a_shared_core(machine, lambda i: i in (2, 3, 4))
    timings = machine.paired({"a": run}, rounds=2, turn_s=2.0, patience_s=99.0)
    assert timings.median_ms("a") == pytest.approx(1e3, rel=0.01)


def test_where_every_sample_is_disturbed_they_all_count():
    machine = FakeMachine()
    machine.tick = 1e-3
    run = on_a_shared_core(machine, lambda i: True)
    timings = machine.paired({"a": run}, rounds=2, turn_s=2.0, patience_s=5.0)
    assert timings.median_ms("a") == pytest.approx(2e3, rel=0.01)


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
