"""The passes of a measurement, with a clock that tells what it is told to."""

from pathlib import Path

import pytest
import torch

from bench.harness import (
    Budget,
    Case,
    Entry,
    Error,
    Run,
    Unavailable,
    measure,
    peak_extra_bytes,
    quantile,
)

CPU = torch.device("cpu")


class FakeClock:
    """A call returns its provider's name; round r of it takes seconds[name][r]."""

    def __init__(self, seconds):
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.order = []

    def __call__(self, call):
        name = call()
        self.order.append(name)
        return next(self.seconds[name])


def entry(name, *, error=0.0, scale=None, **options):
    """A provider whose result is off by `error`, where 1 is allowed."""

    def prepare():
        calls = {"mode": lambda number: name}
        return Run(calls, lambda: {"value": Error(error, 1.0)}, scale or {})

    return Entry(name, prepare, **options)


def run(entries, seconds, *, rounds=3):
    case = Case({"op": "test"}, ["mode"], entries, "plain", CPU)
    budget = Budget(seconds=0.0, min_rounds=rounds, max_rounds=rounds, memory_repeats=1)
    clock = FakeClock(seconds)
    return {row.provider: row for row in measure(case, budget, clock=clock)}, clock


def test_medians_and_quantiles_of_hand_computed_rounds():
    rows, _ = run(
        [entry("plain"), entry("fast"), entry("bound", is_bound=True)],
        {
            "plain": [1.0, 2.0, 4.0, 8.0, 16.0],
            "fast": [0.5, 3.0, 1.0, 2.0, 12.0],
            "bound": [0.5] * 5,
        },
        rounds=5,
    )
    time = rows["fast"].times["mode"]
    assert time["median_ms"] == 2000 and time["rounds"] == 5
    # Sorted 0.5, 1, 2, 3, 12: p20 lies 0.8 of the way from the first to the second.
    assert time["p20_ms"] == pytest.approx(900) and time["p80_ms"] == pytest.approx(4800)
    assert rows["plain"].times["mode"]["x_bound"] == pytest.approx(8)


def test_ratio_is_the_median_of_rounds_not_the_ratio_of_medians():
    seconds = {"plain": [1.0, 10.0, 2.0], "other": [2.0, 5.0, 6.0]}
    rows, _ = run([entry("plain"), entry("other")], seconds)
    # Rounds: 2, 0.5, 3; medians: 5 / 2 = 2.5.
    assert rows["other"].times["mode"]["x_baseline"] == pytest.approx(2)


def test_slowest_bound_binds_and_a_bound_may_be_part_of_its_call():
    rows, _ = run(
        [
            entry("plain"),
            entry("half", scale={"mode": 0.5}, is_bound=True),
            entry("whole", is_bound=True),
        ],
        {"plain": [6.0] * 3, "half": [4.0] * 3, "whole": [1.0] * 3},
    )
    assert rows["half"].times["mode"]["median_ms"] == 2000
    assert rows["plain"].times["mode"]["x_bound"] == pytest.approx(3)
    assert rows["whole"].times["mode"]["x_bound"] == pytest.approx(0.5)
    assert [row.rank for row in rows.values()] == [1, None, None]


def test_every_provider_runs_once_per_round_in_rotating_order():
    _, clock = run([entry(name) for name in "abc"], dict.fromkeys("abc", [1.0] * 3))
    assert "".join(clock.order) == "abcbcacab"


@pytest.mark.parametrize(
    ("seconds", "max_rounds", "expected"), [(5.0, 99, 5), (0.0, 99, 2), (50.0, 7, 7)]
)
def test_rounds_stop_when_the_seconds_are_spent(seconds, max_rounds, expected):
    case = Case({}, ["mode"], [entry("plain")], "plain", CPU)
    budget = Budget(seconds, min_rounds=2, max_rounds=max_rounds, memory_repeats=1)
    (row,) = measure(case, budget, clock=FakeClock({"plain": [1.0] * 99}))
    assert row.times["mode"]["rounds"] == expected


@pytest.mark.parametrize("error", [1.5, float("nan")])
def test_a_wrong_provider_is_shown_and_not_ranked(error):
    seconds = {"plain": [2.0] * 3, "wrong": [1.0] * 3}
    rows, _ = run([entry("plain"), entry("wrong", error=error)], seconds)
    assert rows["wrong"].status == "wrong" and "value" in rows["wrong"].reason
    assert rows["wrong"].rank is None and rows["wrong"].times["mode"]["median_ms"] == 1000
    assert rows["plain"].rank == 1


def test_a_smaller_job_is_shown_and_not_ranked():
    seconds = {"plain": [2.0] * 3, "mean": [1.0] * 3}
    rows, _ = run([entry("plain"), entry("mean", does_job=False)], seconds)
    assert rows["mean"].rank is None and rows["mean"].status == "ok"
    assert rows["plain"].rank == 1


def _raise(error, cause=None):
    def prepare():
        raise error from cause

    return prepare


@pytest.mark.parametrize(
    ("prepare", "status", "reason"),
    [
        (_raise(ModuleNotFoundError("No module named 'peer'")), "skipped", "No module named"),
        (_raise(Unavailable("needs an NVIDIA GPU")), "skipped", "needs an NVIDIA GPU"),
        (_raise(RuntimeError("no extension"), ImportError("x")), "skipped", "no extension"),
        (_raise(ValueError("bad tile\nsecond line")), "crashed", "ValueError: bad tile"),
        (_raise(torch.OutOfMemoryError("Tried 65 GiB. GPU 0")), "crashed", "too little memory"),
    ],
)
def test_what_a_provider_raises_is_its_reason_and_the_run_goes_on(prepare, status, reason):
    seconds = {"plain": [2.0] * 3, "after": [1.0] * 3}
    rows, _ = run([entry("plain"), Entry("peer", prepare), entry("after")], seconds)
    assert rows["peer"].status == status and reason in rows["peer"].reason
    assert "\n" not in rows["peer"].reason and not rows["peer"].times
    assert rows["after"].rank == 1 and rows["after"].times["mode"]["rounds"] == 3


def test_a_provider_that_crashes_while_timed_is_dropped_alone():
    def prepare():
        calls = []

        def call(number):
            calls.append(number)
            if len(calls) == 4:  # warm-up, memory, one timed round
                raise RuntimeError("illegal tile")
            return "flaky"

        return Run({"mode": call})

    seconds = {"plain": [2.0] * 3, "flaky": [1.0] * 3, "after": [4.0] * 3}
    rows, _ = run([entry("plain"), Entry("flaky", prepare), entry("after")], seconds)
    assert rows["flaky"].status == "crashed" and rows["flaky"].rank is None
    assert rows["after"].times["mode"]["x_baseline"] == pytest.approx(2)
    assert rows["after"].times["mode"]["rounds"] == 3


def test_whose_code_runs_is_announced():
    heard = []
    case = Case({}, ["mode"], [entry("a"), entry("b")], "a", CPU)
    clock = FakeClock({"a": [1.0], "b": [1.0]})
    measure(case, Budget(0.0, 1, 1, 1), clock=clock, on_start=heard.append)
    assert heard == ["a", "b", "a", "b", ""]


def test_rows_are_handed_out_after_each_provider_and_replaced_in_the_end():
    """The first rounds are with the bound alone, so that nothing later can lose them."""
    heard = []

    def hear(rows):
        heard.append({row.provider: row.times.get("mode", {}).get("x_bound") for row in rows})

    entries = [entry("bound", is_bound=True), entry("a"), entry("b")]
    case = Case({}, ["mode"], entries, "a", CPU)
    clock = FakeClock({"bound": [1.0] * 9, "a": [4.0, 2.0], "b": [5.0, 3.0]})
    rows = measure(case, Budget(0.0, 1, 1, 1), clock=clock, on_rows=hear)
    assert heard == [{"bound": None}, {"bound": 1, "a": 4}, {"bound": 1, "a": 4, "b": 5}]
    assert [row.times["mode"]["x_bound"] for row in rows] == [1, 2, 3]
    assert rows[2].times["mode"]["x_baseline"] == 1.5 and rows[1].rank == 1


def test_quantile_interpolates():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2
    assert quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert quantile([7.0], 0.8) == 7


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory marks")
def test_peak_memory_counts_what_was_freed_before_the_call_returned():
    megabytes = 2**20 // 4

    def call():
        large = torch.ones(64 * megabytes)
        del large
        return torch.ones(16 * megabytes)

    call()
    assert peak_extra_bytes(call, CPU) / 2**20 == pytest.approx(64, abs=4)
    assert peak_extra_bytes(lambda: None, CPU) / 2**20 < 4
